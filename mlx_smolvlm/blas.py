"""OpenBLAS for MLX's CPU backend on Linux.

MLX's wheel for Linux brings the reference BLAS, which multiplies matrices at about 2 GFLOP/s.
The dynamic linker looks for `cblas_sgemm` in the global scope before it looks there, so a
library that is loaded with RTLD_GLOBAL before `mlx.core` takes its place. PyPI's
`cmeel-openblas`, which this package depends on on Linux, brings one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "MLX_SMOLVLM_OPENBLAS"  # 0 leaves MLX as it is
_LIBRARY = "cmeel.prefix/lib/libopenblas.so.0"

problem: str | None = None
"""Why OpenBLAS is not used on Linux; None if it is, or on other systems."""


def load_openblas() -> None:
    """Load OpenBLAS for `mlx.core`, which must not have been imported yet.

    Nothing happens on other systems than Linux, or if `MLX_SMOLVLM_OPENBLAS` is 0. What
    prevents it is kept in `problem`, for `mlx-smolvlm doctor`; MLX then works as ever, slowly.
    """
    global problem
    problem = _load() if sys.platform == "linux" else None


def _load() -> str | None:
    """Load the library; the reason if that is not done."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE} is 0"
    if "mlx.core" in sys.modules:
        return "mlx.core was imported before mlx_smolvlm"
    spec = find_spec("cmeel")
    if spec is None or spec.origin is None:
        return "cmeel-openblas is not installed"
    try:
        ctypes.CDLL(str(Path(spec.origin).parents[1] / _LIBRARY), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return None
