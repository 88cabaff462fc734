"""Batches of examples: rows padded, pictures decoded while the device is busy.

One batch is prepared ahead, in a thread. Where the encoder is not trained, pictures and videos
are encoded once and their embeddings kept, up to a number of bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_smolvlm.errors import DatasetError, SmolVLMError
from mlx_smolvlm.media import TILE_BATCH, Medium
from mlx_smolvlm.smolvlm import SmolVLM
from mlx_smolvlm.train.answer_loss import Batch
from mlx_smolvlm.train.dataset import MEDIA, Example
from mlx_smolvlm.train.order import padded
from mlx_smolvlm.train.rows import Row, Sight, opened, row_of, sized

FEATURE_BYTES = 512 * 1024**2

Items = Callable[[int], Sequence[Example]]  # the examples of the batch of a number


@dataclass
class Shown:
    """A row, what names its media among others, and their tiles where they are not known yet."""

    row: Row
    example: Example
    key: str
    tiles: list[np.ndarray] | None


class Features:
    """Embeddings of media of examples, those used last, up to `FEATURE_BYTES`."""

    def __init__(self, vlm: SmolVLM) -> None:
        self._encoder = vlm.engine.encoder
        self._known: OrderedDict[str, list[mx.array]] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(one.nbytes for many in self._known.values() for one in many)

    def find(self, key: str) -> list[mx.array] | None:
        """What is known under `key`."""
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def encode(self, key: str, tiles: Sequence[np.ndarray]) -> list[mx.array]:
        """Embeddings of media with `tiles` (n, H, W, 3) each, as an answer would encode them."""
        found = [
            mx.concatenate(
                [
                    self._encoder(mx.array(many[at : at + TILE_BATCH]))
                    for at in range(0, len(many), TILE_BATCH)
                ]
            )
            for many in tiles
        ]
        mx.eval(found)
        self._known[key] = found
        while self.nbytes > FEATURE_BYTES:
            self._known.popitem(last=False)
        return found


class Loader:
    """Batches by number, the next one already under way."""

    def __init__(
        self, vlm: SmolVLM, items: Items, count: int, sight: Sight, features: Features | None
    ) -> None:
        """A loader of `count` batches.

        Args:
            vlm: For its prompts and its encoder.
            items: Examples of a batch.
            count: Batches that there are.
            sight: How media are looked at.
            features: Where embeddings are kept; None if the encoder is trained, and batches
                have pixels.
        """
        self._vlm, self._items, self._count = vlm, items, count
        self._sight, self._features = sight, features
        self._pool, self._tokens = ThreadPoolExecutor(1), 0
        self._ahead: tuple[int, Future[list[Shown]]] | None = None

    def batch(self, number: int) -> Batch:
        """The batch `number`.

        Raises:
            DatasetError: A picture or video cannot be read.
        """
        if self._ahead is None or self._ahead[0] != number:
            self._ahead = (number, self._pool.submit(self._prepare, number))
        shown = self._ahead[1].result()
        self._ahead = None
        if number + 1 < self._count:
            self._ahead = (number + 1, self._pool.submit(self._prepare, number + 1))
        return self._joined(shown, number)

    def take_tokens(self) -> int:
        """Tokens of the rows of batches since it was asked last."""
        tokens, self._tokens = self._tokens, 0
        return tokens

    def close(self) -> None:
        """Let the thread end."""
        self._pool.shutdown(cancel_futures=True)

    def _prepare(self, number: int) -> list[Shown]:
        """The rows of a batch, with the tiles of what is not encoded yet."""
        return [self._shown(example) for example in self._items(number)]

    def _shown(self, example: Example) -> Shown:
        # Embeddings are kept in the messages' order, in which pictures and videos may alternate.
        items = [item["type"] for message in example.messages for item in message["content"]]
        order = [kind for kind in items if kind in MEDIA]
        key = repr((example.images, example.videos, order))
        builder = self._vlm.engine.prompt_builder
        if self._features is not None and key in self._features:
            media = sized(self._vlm, example, self._sight)
            return Shown(row_of(builder, example, media), example, key, None)
        media = opened(self._vlm, example, self._sight)
        row = row_of(builder, example, media)
        return Shown(row, example, key, self._tiles(example, media))

    def _tiles(self, example: Example, media: tuple[Medium, ...]) -> list[np.ndarray]:
        """The tiles (n, H, W, 3) of each of `media`."""
        config = self._vlm.config
        try:
            return [np.stack([tile for _, tile in medium.tiles(config)]) for medium in media]
        except SmolVLMError as error:
            raise DatasetError(f"{example.where}: {error}") from None

    def _joined(self, shown: Sequence[Shown], number: int) -> Batch:
        """The rows as one batch."""
        length = max(padded(one.row.ids.size) for one in shown)
        input_ids = np.zeros((len(shown), length), np.int32)
        is_target = np.zeros((len(shown), length), bool)
        for i, one in enumerate(shown):
            input_ids[i, : one.row.ids.size] = one.row.ids
            is_target[i, : one.row.ids.size] = one.row.is_target
        self._tokens += sum(one.row.ids.size for one in shown)
        flat = np.flatnonzero(is_target)
        pixels: list[np.ndarray] = []
        embeds: list[mx.array] = []
        for one in shown:
            if self._features is None:
                pixels += one.tiles or []
            else:
                embeds += self._embeds(one)
        return Batch(
            input_ids=input_ids,
            places=(flat - 1).astype(np.int32),
            targets=input_ids.reshape(-1)[flat],
            pixel_values=np.concatenate(pixels) if pixels else None,
            image_embeds=mx.concatenate(embeds) if embeds else None,
            seed=number,
        )

    def _embeds(self, one: Shown) -> list[mx.array]:
        """Embeddings of what a row shows."""
        assert self._features is not None
        found = self._features.find(one.key)
        if found is not None:
            return found
        if one.tiles is None:  # let go between the look and now
            media = opened(self._vlm, one.example, self._sight)
            one.tiles = self._tiles(one.example, media)
        return self._features.encode(one.key, one.tiles) if one.tiles else []
