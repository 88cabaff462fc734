"""Run the SmolVLM family of vision-language models on Apple's MLX.

    import mlx_smolvlm as smolvlm
    vlm = smolvlm.load("demo")
    print(vlm.ask("What is in this picture?", "photo.png"))

Package.md describes the rest.
"""

from typing import TYPE_CHECKING, Any

import mlx_smolvlm.blas

mlx_smolvlm.blas.load_openblas()  # only works before mlx.core is imported

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

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    """`Video`, when it is first asked for: it brings Pillow, which import alone does not."""
    if name != "Video":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlx_smolvlm.video import Video

    return Video


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
