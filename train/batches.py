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
from mlx_smolvlm.media.encode import TILE_BATCH, Footage, Medium, Picture
from mlx_smolvlm.media.picture import read_upright_size
from mlx_smolvlm.media.tiles import Detail, compute_grid
from mlx_smolvlm.media.video import Video
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.prompt.messages import Request
from mlx_smolvlm.smolvlm import SmolVLM
from mlx_smolvlm.train.dataset import MEDIA, Example, Message
from mlx_smolvlm.train.loss import Batch


@dataclass(frozen=True)
class MediaOptions:
    """How media are looked at: `detail` of pictures, frames of videos (None: as trained)."""

    detail: Detail = "high"
    fps: float | None = None
    max_frames: int | None = None


@dataclass(frozen=True)
class ExampleRow:
    """Token ids int32 (L,), and whether each is to be predicted, bool (L,)."""

    ids: np.ndarray
    is_target: np.ndarray


def build_row(builder: PromptBuilder, example: Example, media: tuple[Medium, ...]) -> ExampleRow:
    """The tokens of `example`, whose opened media are `media`.

    Raises:
        DatasetError: The chat template refuses the messages, or writes an answer in another
            way than it begins one.
    """
    try:
        return _build_row(builder, list(example.messages), media)
    except SmolVLMError as error:
        raise DatasetError(f"{example.where}: {error}") from None


def _build_row(
    builder: PromptBuilder, messages: list[Message], media: tuple[Medium, ...]
) -> ExampleRow:
    ids = _build_ids(builder, messages, media, False)
    is_target = np.zeros(ids.size, bool)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _build_ids(builder, messages[:number], media, True)
        start = prompt.size
        ends = np.flatnonzero(np.isin(ids[start:], builder.config.eos_token_ids))
        if not np.array_equal(ids[:start], prompt) or ends.size == 0:
            raise DatasetError(
                f"the chat template does not write message {number + 1} as an answer to the "
                "messages before it; this checkpoint cannot be trained on it"
            )
        is_target[start : start + int(ends[0]) + 1] = True
    return ExampleRow(ids, is_target)


def _build_ids(
    builder: PromptBuilder, messages: list[Message], media: tuple[Medium, ...], asks: bool
) -> np.ndarray:
    """Ids of `messages`, with as many of `media` as they have items."""
    items = [item["type"] for message in messages for item in message["content"]]
    shown = media[: items.count("image") + items.count("video")]
    grids = [one.grid for one in shown if isinstance(one, Picture)]
    times = [one.times for one in shown if isinstance(one, Footage)]
    return builder.build(messages, grids, asks, times)


def open_media(vlm: SmolVLM, example: Example, media_options: MediaOptions) -> tuple[Medium, ...]:
    """The media of `example`, pictures decoded.

    Raises:
        DatasetError: One cannot be read.
    """
    request = Request(
        list(example.messages), list(example.images), _make_videos(example, media_options)
    )
    try:
        return vlm.engine.open_media(request, media_options.detail)
    except SmolVLMError as error:
        raise DatasetError(f"{example.where}: {error}") from None


def measure_media(
    vlm: SmolVLM, example: Example, media_options: MediaOptions
) -> tuple[Medium, ...]:
    """The media of `example` without their pixels; errors as `open_media`."""
    try:
        pictures = []
        for path in example.images:
            grid = compute_grid(read_upright_size(path), vlm.config, media_options.detail)
            pictures.append(Picture(None, grid, media_options.detail, str(path)))
        if not example.videos:
            return tuple(pictures)
        request = Request(list(example.messages), [], _make_videos(example, media_options))
        request.messages = [
            {**m, "content": [item for item in m["content"] if item["type"] != "image"]}
            for m in request.messages
        ]
        media = vlm.engine.open_media(request, media_options.detail)
        footage = [one for one in media if isinstance(one, Footage)]
    except SmolVLMError as error:
        raise DatasetError(f"{example.where}: {error}") from None
    from mlx_smolvlm.media.encode import order_media

    return order_media(example.messages, pictures, footage)


def _make_videos(example: Example, media_options: MediaOptions) -> list[Video]:
    """The videos of `example`, to be sampled as `media_options` says."""
    return [
        Video(one, fps=media_options.fps, max_frames=media_options.max_frames)
        for one in example.videos
    ]


WINDOW = 32  # batches that are sorted together
ROUND = 32  # lengths of batches are multiples of it, so that buffers can be used again
_GOLDEN = 0.6180339887498949  # multiples of it fill the unit interval evenly


def pad_length(length: int) -> int:
    """Tokens that a row of `length` takes in a batch of such rows."""
    return -(-length // ROUND) * ROUND


class BatchOrder:
    """Batches of examples; an example is (dataset, index)."""

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        shares: Sequence[float] | None,
        batch_size: int,
        batches: int,
        seed: int,
    ) -> None:
        """An order of `batches` batches.

        Args:
            lengths: Of the examples of each dataset, in tokens.
            shares: How much of the mixture each dataset is, in any unit; None takes all
                examples alike.
            batch_size: Examples of a batch.
            batches: How many there will be; the last window ends with them.
            seed: What the order follows from.
        """
        self._lengths, self._size, self._seed = lengths, batch_size, seed
        self._total = batches * batch_size
        own = [[(d, i) for i in range(len(many))] for d, many in enumerate(lengths)]
        self._pools = [[one for many in own for one in many]] if shares is None else own
        parts = np.cumsum([1.0] if shares is None else shares)
        self._bounds = parts[:-1] / parts[-1]
        self._window = -1
        self._batches: list[list[tuple[int, int]]] = []
        self._draw_counts = np.zeros((1, len(self._pools)), int)  # before each window
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}  # epoch and order, by pool

    def get_batch(self, number: int) -> list[tuple[int, int]]:
        """The examples of the batch `number`."""
        window, place = divmod(number, WINDOW)
        if window != self._window:
            self._batches, self._window = self._make_window(window), window
        return self._batches[place]

    def _make_window(self, window: int) -> list[list[tuple[int, int]]]:
        """The batches of a window."""
        while len(self._draw_counts) <= window:
            last = len(self._draw_counts) - 1
            counts = np.bincount(self._draw_pools(last), minlength=len(self._pools))
            self._draw_counts = np.vstack([self._draw_counts, self._draw_counts[last] + counts])
        places, found = self._draw_counts[window].copy(), []
        for pool in self._draw_pools(window):
            found.append(self._get_example(int(pool), int(places[pool])))
            places[pool] += 1
        found.sort(key=lambda one: pad_length(self._lengths[one[0]][one[1]]))
        batches = [found[at : at + self._size] for at in range(0, len(found), self._size)]
        order = np.random.default_rng([self._seed, 1, window]).permutation(len(batches))
        return [batches[i] for i in order]

    def _draw_pools(self, window: int) -> np.ndarray:
        """The pool of each draw of a window."""
        start = window * WINDOW * self._size
        draws = np.arange(start, min(start + WINDOW * self._size, self._total))
        offset = np.random.default_rng([self._seed, 2]).random()
        return np.searchsorted(self._bounds, (draws * _GOLDEN + offset) % 1, side="right")

    def _get_example(self, pool: int, place: int) -> tuple[int, int]:
        """The example that a pool gives when `place` were drawn from it before."""
        many: list[tuple[int, int]] = self._pools[pool]
        epoch, place = divmod(place, len(many))
        if pool not in self._permutations or self._permutations[pool][0] != epoch:
            rng = np.random.default_rng([self._seed, 3, pool, epoch])
            self._permutations[pool] = (epoch, rng.permutation(len(many)))
        return many[int(self._permutations[pool][1][place])]


CACHE_BYTES = 512 * 1024**2

SelectExamples = Callable[[int], Sequence[Example]]  # the examples of the batch of a number


@dataclass
class PreparedRow:
    """A row, what names its media among others, and their tiles where they are not known yet."""

    row: ExampleRow
    example: Example
    key: str
    tiles: list[np.ndarray] | None


class EmbeddingCache:
    """Embeddings of media of examples, those used last, up to `CACHE_BYTES`."""

    def __init__(self, vlm: SmolVLM) -> None:
        self._encoder = vlm.engine.encoder
        self._embeds_by_key: OrderedDict[str, list[mx.array]] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._embeds_by_key

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(one.nbytes for many in self._embeds_by_key.values() for one in many)

    def find(self, key: str) -> list[mx.array] | None:
        """What is known under `key`."""
        if key in self._embeds_by_key:
            self._embeds_by_key.move_to_end(key)
        return self._embeds_by_key.get(key)

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
        self._embeds_by_key[key] = found
        while self.nbytes > CACHE_BYTES:
            self._embeds_by_key.popitem(last=False)
        return found


class BatchLoader:
    """Batches by number, the next one already under way."""

    def __init__(
        self,
        vlm: SmolVLM,
        items: SelectExamples,
        count: int,
        media_options: MediaOptions,
        features: EmbeddingCache | None,
    ) -> None:
        """A loader of `count` batches.

        Args:
            vlm: For its prompts and its encoder.
            items: Examples of a batch.
            count: Batches that there are.
            media_options: How media are looked at.
            features: Where embeddings are kept; None if the encoder is trained, and batches
                have pixels.
        """
        self._vlm, self._items, self._count = vlm, items, count
        self._media_options, self._features = media_options, features
        self._pool, self._tokens = ThreadPoolExecutor(1), 0
        self._ahead: tuple[int, Future[list[PreparedRow]]] | None = None

    def load_batch(self, number: int) -> Batch:
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
        return self._collate(shown, number)

    def take_tokens(self) -> int:
        """Tokens of the rows of batches since it was asked last."""
        tokens, self._tokens = self._tokens, 0
        return tokens

    def close(self) -> None:
        """Let the thread end."""
        self._pool.shutdown(cancel_futures=True)

    def _prepare(self, number: int) -> list[PreparedRow]:
        """The rows of a batch, with the tiles of what is not encoded yet."""
        return [self._prepare_row(example) for example in self._items(number)]

    def _prepare_row(self, example: Example) -> PreparedRow:
        # Embeddings are kept in the messages' order, in which pictures and videos may alternate.
        items = [item["type"] for message in example.messages for item in message["content"]]
        order = [kind for kind in items if kind in MEDIA]
        key = repr((example.images, example.videos, order))
        builder = self._vlm.engine.prompt_builder
        if self._features is not None and key in self._features:
            media = measure_media(self._vlm, example, self._media_options)
            return PreparedRow(build_row(builder, example, media), example, key, None)
        media = open_media(self._vlm, example, self._media_options)
        row = build_row(builder, example, media)
        return PreparedRow(row, example, key, self._cut_tiles(example, media))

    def _cut_tiles(self, example: Example, media: tuple[Medium, ...]) -> list[np.ndarray]:
        """The tiles (n, H, W, 3) of each of `media`."""
        config = self._vlm.config
        try:
            return [np.stack([tile for _, tile in medium.make_tiles(config)]) for medium in media]
        except SmolVLMError as error:
            raise DatasetError(f"{example.where}: {error}") from None

    def _collate(self, shown: Sequence[PreparedRow], number: int) -> Batch:
        """The rows as one batch."""
        length = max(pad_length(one.row.ids.size) for one in shown)
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
                embeds += self._find_embeds(one)
        return Batch(
            input_ids=input_ids,
            places=(flat - 1).astype(np.int32),
            targets=input_ids.reshape(-1)[flat],
            pixel_values=np.concatenate(pixels) if pixels else None,
            image_embeds=mx.concatenate(embeds) if embeds else None,
            seed=number,
        )

    def _find_embeds(self, one: PreparedRow) -> list[mx.array]:
        """Embeddings of what a row shows."""
        assert self._features is not None
        found = self._features.find(one.key)
        if found is not None:
            return found
        if one.tiles is None:  # let go between the look and now
            media = open_media(self._vlm, one.example, self._media_options)
            one.tiles = self._cut_tiles(one.example, media)
        return self._features.encode(one.key, one.tiles) if one.tiles else []
