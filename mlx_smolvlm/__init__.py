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
    from mlx_smolvlm.runtime import load_openblas

    load_openblas()  # only works before mlx.core is imported

if TYPE_CHECKING:
    from mlx_smolvlm.conversation import Conversation
    from mlx_smolvlm.errors import (
        CheckpointError,
        ConstraintError,
        ContextError,
        DatasetError,
        MediaError,
        MemoryLimitError,
        PromptError,
        SmolVLMError,
        SmolVLMWarning,
        TrainingError,
    )
    from mlx_smolvlm.generate.choose import Choice
    from mlx_smolvlm.generate.long_video import Part
    from mlx_smolvlm.generate.sampling import Sampling, SamplingOptions
    from mlx_smolvlm.generate.stream import AnswerStream, Chunk, Reply
    from mlx_smolvlm.kv.options import CacheOptions
    from mlx_smolvlm.media.encode import Progress
    from mlx_smolvlm.media.video import Video
    from mlx_smolvlm.smolvlm import SmolVLM, load

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
    "MemoryLimitError",
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

_MODULES = {  # public name -> the module that defines it
    "AnswerStream": "mlx_smolvlm.generate.stream",
    "CacheOptions": "mlx_smolvlm.kv.options",
    "CheckpointError": "mlx_smolvlm.errors",
    "Choice": "mlx_smolvlm.generate.choose",
    "Chunk": "mlx_smolvlm.generate.stream",
    "ConstraintError": "mlx_smolvlm.errors",
    "ContextError": "mlx_smolvlm.errors",
    "Conversation": "mlx_smolvlm.conversation",
    "DatasetError": "mlx_smolvlm.errors",
    "MediaError": "mlx_smolvlm.errors",
    "MemoryLimitError": "mlx_smolvlm.errors",
    "Part": "mlx_smolvlm.generate.long_video",
    "Progress": "mlx_smolvlm.media.encode",
    "PromptError": "mlx_smolvlm.errors",
    "Reply": "mlx_smolvlm.generate.stream",
    "Sampling": "mlx_smolvlm.generate.sampling",
    "SamplingOptions": "mlx_smolvlm.generate.sampling",
    "SmolVLM": "mlx_smolvlm.smolvlm",
    "SmolVLMError": "mlx_smolvlm.errors",
    "SmolVLMWarning": "mlx_smolvlm.errors",
    "TrainingError": "mlx_smolvlm.errors",
    "Video": "mlx_smolvlm.media.video",
    "load": "mlx_smolvlm.smolvlm",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line starts quickly."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
