"""transformers' video processing without torchvision, which is not at hand everywhere.

Only the functions of torchvision that SmolVLM's processor calls are stood
in for; reading, sampling, sizes, normalizing and the prompt are transformers' own code.
"""

from __future__ import annotations

import contextlib
import enum
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import image_processing_backends, video_processing_utils, video_utils
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor


class InterpolationMode(enum.Enum):
    """The one that SmolVLM asks for."""

    LANCZOS = "lanczos"


def resize(
    video: torch.Tensor, size: tuple[int, int], interpolation: InterpolationMode, antialias: bool
) -> torch.Tensor:
    """Pillow's LANCZOS on uint8, as torchvision has it since 0.27; before it was BICUBIC."""
    assert interpolation is InterpolationMode.LANCZOS
    assert antialias
    assert video.dtype == torch.uint8
    frames = video.reshape(-1, *video.shape[-3:]).permute(0, 2, 3, 1).numpy()
    wanted = (size[1], size[0])
    done = [
        np.asarray(Image.fromarray(one).resize(wanted, Image.Resampling.LANCZOS)) for one in frames
    ]
    result = torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2)
    return result.reshape(*video.shape[:-2], *size)


def normalize(
    video: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, inplace: bool
) -> torch.Tensor:
    """As torchvision's."""
    assert video.is_floating_point()
    return (video - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def grayscale_to_rgb(video: torch.Tensor) -> torch.Tensor:
    """As torchvision's: what has three channels stays as it is."""
    assert video.shape[-3] == 3
    return video


STAND_IN = SimpleNamespace(
    InterpolationMode=InterpolationMode,
    resize=resize,
    normalize=normalize,
    grayscale_to_rgb=grayscale_to_rgb,
)


def fetch_videos(_self: Any, videos: Any, sample_indices_fn: Any = None) -> Any:
    """`BaseVideoProcessor.fetch_videos` with PyAV in place of torchcodec."""
    if isinstance(videos, list):
        return list(zip(*[fetch_videos(_self, v, sample_indices_fn) for v in videos], strict=True))
    return video_utils.load_video(videos, backend="pyav", sample_indices_fn=sample_indices_fn)


@contextlib.contextmanager
def torchvision() -> Iterator[None]:
    """transformers finds the stand-ins for as long as this lasts."""
    backends: ModuleType = image_processing_backends
    with contextlib.ExitStack() as stack:

        def patch(target: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, value, create=True))

        patch(backends, "tvF", STAND_IN)
        patch(video_processing_utils, "tvF", STAND_IN)
        patch(backends, "pil_torch_interpolation_mapping", {1: InterpolationMode.LANCZOS})
        patch(backends, "is_torchvision_greater_or_equal", lambda _version: True)
        patch(SmolVLMVideoProcessor, "fetch_videos", fetch_videos)
        yield


class _Processor(SmolVLMProcessor):
    """Without the check of the video processor's class, which needs torchvision.

    It keeps what it knows of the videos.
    """

    unused_input_names = ("rows", "cols")

    def check_argument_for_proper_class(self, *_: Any) -> None:
        return None


class VideoOracle:
    """Prompts and pixels of videos by the processor of one checkpoint.

    Args:
        folder: With preprocessor_config.json or video_preprocessor_config.json.
        tokenizer: A fast tokenizer.
        image_seq_len: Tokens a tile.
        pictures: Settings of the image processor that are to differ.
    """

    def __init__(self, folder: Any, tokenizer: Any, image_seq_len: int, **pictures: Any) -> None:
        self.videos = SmolVLMVideoProcessor.from_pretrained(folder)
        # As loaded, it may have the size of pictures (docs/decisions/video.md).
        names = ("video_preprocessor_config.json", "preprocessor_config.json")
        path = next(Path(folder) / name for name in names if (Path(folder) / name).exists())
        settings = json.loads(path.read_text(encoding="utf-8"))
        self.videos.size = settings["video_sampling"]["video_size"]
        self.processor = _Processor(
            SmolVLMImageProcessorPil(**pictures),
            tokenizer,
            self.videos,
            image_seq_len=image_seq_len,
        )

    def __call__(
        self,
        messages: list[dict[str, Any]],
        videos: list[Any],
        images: list[Any] | None = None,
        metadata: list[dict[str, Any]] | None = None,
        **sampling: Any,
    ) -> Any:
        """`input_ids` (1, L), `pixel_values` (V, N, C, H, W), `video_metadata`.

        Args:
            messages: With items of type "video".
            videos: Paths, or arrays (T, H, W, 3).
            images: For items of type "image".
            metadata: Of arrays: total_num_frames, fps and duration.
            **sampling: fps and num_frames, if not as the checkpoint says.
        """
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        sampling = {"fps": self.videos.fps, "num_frames": self.videos.num_frames, **sampling}
        with torchvision():
            return self.processor(
                text=[text],
                images=[images] if images else None,
                videos=videos or None,
                video_metadata=metadata,
                do_sample_frames=True,
                return_metadata=True,
                return_tensors="pt",
                **sampling,
            )
