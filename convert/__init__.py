"""Other people's checkpoints to folders of this package's format, and what that cost."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_smolvlm.convert.compare_options import CompareOptions
    from mlx_smolvlm.convert.comparison import Comparison
    from mlx_smolvlm.convert.measure import compare

__all__ = ["CompareOptions", "Comparison", "compare"]

_MEASURES = {"compare": "measure", "CompareOptions": "compare_options", "Comparison": "comparison"}


def __getattr__(name: str) -> Any:
    """What measures a conversion, when it is first asked for: converting does without."""
    if name not in _MEASURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MEASURES[name]}"), name)
