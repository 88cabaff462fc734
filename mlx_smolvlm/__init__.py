"""Run the SmolVLM family of vision-language models on Apple's MLX.

    import mlx_smolvlm as smolvlm
    vlm = smolvlm.load("demo")
    print(vlm.ask("What is in this picture?", images=["photo.png"]))

Package.md describes the rest.
"""

from mlx_smolvlm.errors import CheckpointError, MediaError, PromptError, SmolVLMError
from mlx_smolvlm.sampling import Sampling
from mlx_smolvlm.smolvlm import AnswerStream, Chunk, Conversation, Reply, SmolVLM, load

__version__ = "0.1.0"

__all__ = [
    "AnswerStream",
    "CheckpointError",
    "Chunk",
    "Conversation",
    "MediaError",
    "PromptError",
    "Reply",
    "Sampling",
    "SmolVLM",
    "SmolVLMError",
    "load",
]
