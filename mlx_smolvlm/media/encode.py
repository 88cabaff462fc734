"""The pictures and videos of a prompt, and encoding them in batches of bounded size."""

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

TILE_BATCH = 4  # most tiles per call of the encoder; bounds its memory

FrameTile = tuple["Frame | None", np.ndarray]  # (frame of a video or None, tile (H, W, 3))


class Picture:
    """A picture in a prompt.

    Attributes:
        image: The picture; None if only its embeddings are in memory. Then `digest` is given.
        grid: Rows and columns of tiles.
        image_embeds: (N, I, D) once it is encoded, else None.
    """

    def __init__(
        self, image: PIL.Image.Image | None, grid: Grid, detail: Detail, digest: str | None = None
    ) -> None:
        self.image, self.grid, self._detail, self._digest = image, grid, detail, digest
        self.image_embeds: mx.array | None = None

    @property
    def num_tiles(self) -> int:
        """Number of tiles to encode (N)."""
        return self.grid.num_tiles

    @property
    def digest(self) -> str:
        """Digest of the pixels, grid and detail; pictures with the same digest have equal tiles."""
        if self._digest is None:
            assert self.image is not None
            size, pixels = self.image.size, self.image.tobytes()
            self._digest = _compute_digest(f"picture {size} {self.grid} {self._detail}", pixels)
        return self._digest

    def forget_image(self) -> None:
        """Free the pixels of an encoded picture; the digest stays."""
        self._digest, self.image = self.digest, None

    def make_tiles(self, config: Config) -> Iterator[FrameTile]:
        """Yield (None, tile) for each tile (H, W, 3)."""
        from mlx_smolvlm.media.tiles import iterate_tiles

        assert self.image is not None
        for tile in iterate_tiles(self.image, config, self._detail):
            yield None, tile


class Footage:
    """A video in a prompt.

    Attributes:
        times: When its frames are shown.
        clip: The open video; None if only its embeddings are in memory. Then `digest` is given.
        image_embeds: (N, I, D) once it is encoded, else None.
    """

    def __init__(
        self, times: FrameTimes, clip: Clip | None = None, digest: str | None = None
    ) -> None:
        self.times, self.clip, self._digest = times, clip, digest
        self.image_embeds: mx.array | None = None

    @property
    def num_tiles(self) -> int:
        """Number of tiles to encode (N), one per frame."""
        return len(self.times.timestamps_s)

    @property
    def digest(self) -> str:
        """Digest of the source and of the numbers of the sampled frames."""
        if self._digest is None:
            assert self.clip is not None
            self._digest = _compute_digest("video", self.clip.digest())
        return self._digest

    def make_tiles(self, config: Config) -> Iterator[FrameTile]:
        """Yield (frame, tile) for each frame, with its tile (H, W, 3), decoded one by one."""
        from mlx_smolvlm.media.tiles import tile_frame

        assert self.clip is not None
        edge = config.video.longest_edge if config.video else config.tile_size
        for frame in self.clip.read_frames():
            yield frame, tile_frame(frame.picture, edge, config)[0]


def _compute_digest(text: str, data: bytes) -> str:
    """Return the hexadecimal digest of a description and of data."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    digest.update(data)
    return digest.hexdigest()


Medium = Picture | Footage


@dataclass(frozen=True)
class Progress:
    """Progress of encoding: how many of `total` tiles are `decoded` and `encoded`.

    After a frame of the video `name` is decoded, `frame` is that frame and `tile` (H, W, 3) its
    encoder input; both are None after other steps.
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
    """Return all media in the order of their items in `messages`."""
    sources: dict[str, Iterator[Medium]] = {"image": iter(pictures), "video": iter(footage)}
    media: list[Medium] = []
    for message in messages:
        content = message["content"]
        for item in content if not isinstance(content, str) else ():
            if item["type"] in sources:
                media.append(next(sources[item["type"]]))
    return tuple(media)


def encode(
    media: Sequence[Medium],
    encoder: Callable[[mx.array], mx.array],
    config: Config,
    tile_batch: int = TILE_BATCH,
) -> Generator[Progress, None, None]:
    """Set `image_embeds` of each of `media` that has none, and yield after each step.

    While the device encodes a batch of `tile_batch` tiles, the next batch is decoded; at most
    two batches are in memory.

    Args:
        media: Pictures and videos.
        encoder: Maps (N, H, W, 3) to (N, I, D).
        config: Configuration of the checkpoint.
        tile_batch: Most tiles per call of `encoder`.

    Raises:
        MediaError: A video cannot be decoded.
    """
    todo = [medium for medium in media if medium.image_embeds is None]
    total = sum(medium.num_tiles for medium in todo)
    decoded = encoded = 0
    for medium in todo:
        embeds: list[mx.array] = []
        batch: list[np.ndarray] = []
        for count, (frame, tile) in enumerate(medium.make_tiles(config), 1):
            batch.append(tile)
            decoded += 1
            if isinstance(medium, Footage) and medium.clip is not None:
                yield Progress(decoded, encoded, total, frame, tile, medium.clip.name)
            if len(batch) == tile_batch or count == medium.num_tiles:
                if embeds:
                    mx.eval(embeds[-1])
                embeds.append(encoder(mx.array(np.stack(batch))))
                mx.async_eval(embeds[-1])
                batch = []
                encoded = decoded
                yield Progress(decoded, encoded, total)
        medium.image_embeds = mx.concatenate(embeds) if len(embeds) > 1 else embeds[0]
        mx.eval(medium.image_embeds)


def join_embeds(media: Sequence[Medium]) -> mx.array | None:
    """Concatenate the `image_embeds` of all encoded `media` to (N, I, D); None without any."""
    parts = [medium.image_embeds for medium in media if medium.image_embeds is not None]
    return mx.concatenate(parts) if parts else None
