"""Comparison of two checkpoints, such as a conversion and its source."""

from mlx_smolvlm.convert.compare.measure import CompareOptions, compare
from mlx_smolvlm.convert.compare.report import Comparison

__all__ = ["CompareOptions", "Comparison", "compare"]
