"""Measures what a conversion lost: two checkpoints side by side."""

from mlx_smolvlm.convert.compare.measure import CompareOptions, compare
from mlx_smolvlm.convert.compare.report import Comparison

__all__ = ["CompareOptions", "Comparison", "compare"]
