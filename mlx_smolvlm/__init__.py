"""Run the SmolVLM family of vision-language models on Apple's MLX.

    import mlx_smolvlm as smolvlm
    vlm = smolvlm.load("demo")
    print(vlm.ask("What is in this picture?", "photo.png"))

Package.md describes the rest.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "linux":
    from mlx_smolvlm.blas import load_openblas

    load_openblas()  # only works before mlx.core is imported

if TYPE_CHECKING:
    from mlx_smolvlm.answer import AnswerStream, Chunk, Reply
    from mlx_smolvlm.cache_options import CacheOptions
    from mlx_smolvlm.choose import Choice
    from mlx_smolvlm.conversation import Conversation
    from mlx_smolvlm.errors import (
        CheckpointError,
        ConstraintError,
        ContextError,
        DatasetError,
        MediaError,
        PromptError,
        SmolVLMError,
        SmolVLMWarning,
        TrainingError,
    )
    from mlx_smolvlm.media import Progress
    from mlx_smolvlm.parts import Part
    from mlx_smolvlm.sampling import Sampling, SamplingOptions
    from mlx_smolvlm.smolvlm import SmolVLM, load
    from mlx_smolvlm.video import Video

__version__ = "0.1.0"

__all__ = [
    "AnswerStream",
    "CacheOptions",
    "CheckpointError",
    "Choice",
    "Chunk",
    "ConstraintError",
    "ContextError",
    "Conversation",
    "DatasetError",
    "MediaError",
    "Part",
    "Progress",
    "PromptError",
    "Reply",
    "Sampling",
    "SamplingOptions",
    "SmolVLM",
    "SmolVLMError",
    "SmolVLMWarning",
    "TrainingError",
    "Video",
    "load",
]

_MODULES = {  # that define the public names
    "AnswerStream": "mlx_smolvlm.answer",
    "CacheOptions": "mlx_smolvlm.cache_options",
    "CheckpointError": "mlx_smolvlm.errors",
    "Choice": "mlx_smolvlm.choose",
    "Chunk": "mlx_smolvlm.answer",
    "ConstraintError": "mlx_smolvlm.errors",
    "ContextError": "mlx_smolvlm.errors",
    "Conversation": "mlx_smolvlm.conversation",
    "DatasetError": "mlx_smolvlm.errors",
    "MediaError": "mlx_smolvlm.errors",
    "Part": "mlx_smolvlm.parts",
    "Progress": "mlx_smolvlm.media",
    "PromptError": "mlx_smolvlm.errors",
    "Reply": "mlx_smolvlm.answer",
    "Sampling": "mlx_smolvlm.sampling",
    "SamplingOptions": "mlx_smolvlm.sampling",
    "SmolVLM": "mlx_smolvlm.smolvlm",
    "SmolVLMError": "mlx_smolvlm.errors",
    "SmolVLMWarning": "mlx_smolvlm.errors",
    "TrainingError": "mlx_smolvlm.errors",
    "Video": "mlx_smolvlm.video",
    "load": "mlx_smolvlm.smolvlm",
}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used, so that the command line starts at once."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
