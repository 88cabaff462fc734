"""Opened pictures and videos, and their way through the encoder in bounded batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_smolvlm.config import Config

if TYPE_CHECKING:
    import PIL.Image

    from mlx_smolvlm.media.tiles import Detail, Grid
    from mlx_smolvlm.media.timeline import FrameTimes
    from mlx_smolvlm.media.video import Clip, Frame

TILE_BATCH = 4  # tiles that go through the encoder at once; bounds its memory

FrameTile = tuple["Frame | None", np.ndarray]


class Picture:
    """A picture in a prompt; `image_embeds` (N, I, D) once it has been encoded.

    `image` is None if only its embeddings were kept; `digest` is then given.
    """

    def __init__(
        self, image: PIL.Image.Image | None, grid: Grid, detail: Detail, digest: str | None = None
    ) -> None:
        self.image, self.grid, self._detail, self._digest = image, grid, detail, digest
        self.image_embeds: mx.array | None = None

    @property
    def num_tiles(self) -> int:
        """Tiles that the encoder sees (N)."""
        return self.grid.num_tiles

    @property
    def digest(self) -> str:
        """Of the pixels and of how they are cut: equal for pictures with equal tiles."""
        if self._digest is None:
            assert self.image is not None
            size, pixels = self.image.size, self.image.tobytes()
            self._digest = _compute_digest(f"picture {size} {self.grid} {self._detail}", pixels)
        return self._digest

    def make_tiles(self, config: Config) -> Iterator[FrameTile]:
        """Its tiles, (H, W, 3) each."""
        from mlx_smolvlm.media.tiles import tile_picture

        assert self.image is not None
        for tile in tile_picture(self.image, config, self._detail).pixel_values:
            yield None, tile


class Footage:
    """A video in a prompt; `image_embeds` (N, I, D) once it has been encoded.

    `times` says when its frames are shown; `clip` is None if only its embeddings were
    kept; `digest` is then given.
    """

    def __init__(
        self, times: FrameTimes, clip: Clip | None = None, digest: str | None = None
    ) -> None:
        self.times, self.clip, self._digest = times, clip, digest
        self.image_embeds: mx.array | None = None

    @property
    def num_tiles(self) -> int:
        """Tiles that the encoder sees (N), one a frame."""
        return len(self.times.timestamps_s)

    @property
    def digest(self) -> str:
        """Of the file and of the frames taken from it."""
        if self._digest is None:
            assert self.clip is not None
            self._digest = _compute_digest("video", self.clip.digest())
        return self._digest

    def make_tiles(self, config: Config) -> Iterator[FrameTile]:
        """Its frames, each with its tile (H, W, 3), decoded as they are asked for."""
        from mlx_smolvlm.media.tiles import tile_frame

        assert self.clip is not None
        edge = config.video.longest_edge if config.video else config.tile_size
        for frame in self.clip.read_frames():
            yield frame, tile_frame(frame.picture, edge, config)[0]


def _compute_digest(text: str, data: bytes) -> str:
    """Digest of a description and of data."""
    total = hashlib.blake2b(text.encode(), digest_size=16)
    total.update(data)
    return total.hexdigest()


Medium = Picture | Footage


@dataclass(frozen=True)
class Progress:
    """How far pictures and videos are: tiles `decoded` and `encoded` of `total`.

    `frame` is the frame of the video `name` that was decoded last, and `tile` (H, W, 3)
    what the model sees of it; None after other steps.
    """

    decoded: int
    encoded: int
    total: int
    frame: Frame | None = None
    tile: np.ndarray | None = field(default=None, repr=False)
    name: str = ""


def order_media(
    messages: Sequence[Mapping[str, Any]], pictures: Sequence[Picture], footage: Sequence[Footage]
) -> tuple[Medium, ...]:
    """The media in the order of their items in `messages`."""
    nexts: dict[str, Iterator[Medium]] = {"image": iter(pictures), "video": iter(footage)}
    found: list[Medium] = []
    for message in messages:
        content = message["content"]
        for item in content if not isinstance(content, str) else ():
            if item["type"] in nexts:
                found.append(next(nexts[item["type"]]))
    return tuple(found)


def encode(
    media: Sequence[Medium], encoder: Callable[[mx.array], mx.array], config: Config
) -> Generator[Progress, None, None]:
    """Gives each of `media` its `image_embeds`, and yields after each step.

    Those that have them are left alone. While the device encodes a batch of `TILE_BATCH`
    tiles, the next one is decoded; more than two are never held.

    Args:
        media: Pictures and videos.
        encoder: From (N, H, W, 3) to (N, I, D).
        config: Of the checkpoint.

    Raises:
        MediaError: A video cannot be decoded.
    """
    todo = [medium for medium in media if medium.image_embeds is None]
    total = sum(medium.num_tiles for medium in todo)
    decoded = encoded = 0
    for medium in todo:
        done: list[mx.array] = []
        batch: list[np.ndarray] = []
        for count, (frame, tile) in enumerate(medium.make_tiles(config), 1):
            batch.append(tile)
            decoded += 1
            if isinstance(medium, Footage) and medium.clip is not None:
                yield Progress(decoded, encoded, total, frame, tile, medium.clip.name)
            if len(batch) == TILE_BATCH or count == medium.num_tiles:
                if done:
                    mx.eval(done[-1])
                done.append(encoder(mx.array(np.stack(batch))))
                mx.async_eval(done[-1])
                batch = []
                encoded = decoded
                yield Progress(decoded, encoded, total)
        medium.image_embeds = mx.concatenate(done) if len(done) > 1 else done[0]
        mx.eval(medium.image_embeds)


def join_embeds(media: Sequence[Medium]) -> mx.array | None:
    """`image_embeds` (N, I, D) of all encoded `media`, in order; None without any."""
    parts = [medium.image_embeds for medium in media if medium.image_embeds is not None]
    return mx.concatenate(parts) if parts else None
