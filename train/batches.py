"""Batches of training examples: token rows, their order, and a loader that works one batch ahead.

`build_row` turns an example into token ids, `BatchOrder` says which examples a batch holds, and
`BatchLoader` makes the batches, each in a thread while the previous one is trained on.
`EmbeddingCache` keeps the embeddings of pictures and videos if the encoder is not trained.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_smolvlm.errors import DatasetError, SmolVLMError
from mlx_smolvlm.media.encode import TILE_BATCH, Footage, Medium, Picture, order_media
from mlx_smolvlm.media.picture import read_upright_size
from mlx_smolvlm.media.tiles import Detail, compute_grid
from mlx_smolvlm.media.video import Video
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.prompt.messages import Request
from mlx_smolvlm.smolvlm import SmolVLM
from mlx_smolvlm.train.dataset import MEDIA, Example, Message
from mlx_smolvlm.train.loss import Batch

WINDOW = 32  # batches whose examples are sorted by length together
LENGTH_STEP = 32  # batch lengths are multiples of it, so that buffers can be reused
CACHE_BYTES = 512 * 1024**2

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly

SelectExamples = Callable[[int], Sequence[Example]]  # from a batch's number to its examples


@dataclass(frozen=True)
class MediaOptions:
    """How pictures are tiled and videos sampled.

    Attributes:
        detail: As in `SmolVLM.ask`.
        fps: Frames sampled per second of video; None takes the checkpoint's value.
        max_frames: Most frames sampled from a video; None takes the checkpoint's value.
    """

    detail: Detail = "high"
    fps: float | None = None
    max_frames: int | None = None


@dataclass(frozen=True)
class ExampleRow:
    """An example as tokens.

    Attributes:
        ids: Token ids, int32 (L,).
        is_target: Whether the loss counts the token, bool (L,): answers and their end tokens.
    """

    ids: np.ndarray
    is_target: np.ndarray


@dataclass
class PreparedRow:
    """An example's row with the tiles of its media.

    Attributes:
        row: The tokens.
        example: The example.
        key: The key of its embeddings in an `EmbeddingCache`.
        tiles: The tiles (n, H, W, 3) of each medium; None if the embeddings are cached.
    """

    row: ExampleRow
    example: Example
    key: str
    tiles: list[np.ndarray] | None


# Rows and media


def build_row(builder: PromptBuilder, example: Example, media: tuple[Medium, ...]) -> ExampleRow:
    """Return `example` as tokens.

    Args:
        builder: The checkpoint's prompt builder.
        example: The example.
        media: Its media, as `open_media` or `measure_media` returns them.

    Raises:
        DatasetError: The chat template refuses the messages, or its generation prompt is not how
            it begins an answer.
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
    builder: PromptBuilder,
    messages: list[Message],
    media: tuple[Medium, ...],
    add_generation_prompt: bool,
) -> np.ndarray:
    """Return the token ids of `messages`; `media` may hold those of later messages as well."""
    items = [item["type"] for message in messages for item in message["content"]]
    own = media[: items.count("image") + items.count("video")]
    grids = [one.grid for one in own if isinstance(one, Picture)]
    times = [one.times for one in own if isinstance(one, Footage)]
    return builder.build(messages, grids, add_generation_prompt, times)


def open_media(vlm: SmolVLM, example: Example, media_options: MediaOptions) -> tuple[Medium, ...]:
    """Open the pictures and videos of `example` and decode the pictures.

    Raises:
        DatasetError: A file cannot be read.
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
    """Return the media of `example` as `open_media` does, but decode no picture.

    Raises:
        DatasetError: A file cannot be read.
    """
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
    return order_media(example.messages, pictures, footage)


def _make_videos(example: Example, media_options: MediaOptions) -> list[Video]:
    """Return the videos of `example` with the sampling of `media_options`."""
    return [
        Video(one, fps=media_options.fps, max_frames=media_options.max_frames)
        for one in example.videos
    ]


def pad_length(length: int) -> int:
    """Round `length`, in tokens, up to a length that batches have."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


# Order


class BatchOrder:
    """Which examples each batch holds; an example is a pair (dataset index, example index).

    A pool is a dataset, or all datasets together if they have no shares. Each pool is gone through
    in epochs, shuffled anew in each. Examples of `WINDOW` batches are sorted by length, so that
    those of a batch need little padding, and the batches of a window are shuffled.
    """

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        shares: Sequence[float] | None,
        batch_size: int,
        batches: int,
        seed: int,
    ) -> None:
        """Set up the order; no batch is computed yet.

        Args:
            lengths: The length in tokens of each example of each dataset.
            shares: The share of each dataset in the mixture, in any unit; None draws every example
                equally often.
            batch_size: Examples in a batch.
            batches: The number of batches; the last window ends with them.
            seed: The order depends on it and on the other arguments alone.
        """
        self._lengths, self._size, self._seed = lengths, batch_size, seed
        self._total = batches * batch_size
        own = [[(d, i) for i in range(len(many))] for d, many in enumerate(lengths)]
        self._pools = [[one for many in own for one in many]] if shares is None else own
        parts = np.cumsum([1.0] if shares is None else shares)
        self._bounds = parts[:-1] / parts[-1]
        self._window = -1
        self._batches: list[list[tuple[int, int]]] = []
        self._draw_counts = np.zeros((1, len(self._pools)), int)  # draws before each window
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}  # pool: (epoch, permutation)

    def get_batch(self, number: int) -> list[tuple[int, int]]:
        """Return the examples of batch `number`."""
        window, place = divmod(number, WINDOW)
        if window != self._window:
            self._batches, self._window = self._make_window(window), window
        return self._batches[place]

    def _make_window(self, window: int) -> list[list[tuple[int, int]]]:
        """Return the batches of a window."""
        while len(self._draw_counts) <= window:
            last = len(self._draw_counts) - 1
            counts = np.bincount(self._draw_pools(last), minlength=len(self._pools))
            self._draw_counts = np.vstack([self._draw_counts, self._draw_counts[last] + counts])
        places, examples = self._draw_counts[window].copy(), []
        for pool in self._draw_pools(window):
            examples.append(self._get_example(int(pool), int(places[pool])))
            places[pool] += 1
        examples.sort(key=lambda one: pad_length(self._lengths[one[0]][one[1]]))
        batches = [examples[at : at + self._size] for at in range(0, len(examples), self._size)]
        order = np.random.default_rng([self._seed, 1, window]).permutation(len(batches))
        return [batches[i] for i in order]

    def _draw_pools(self, window: int) -> np.ndarray:
        """Return the pool index of each draw of a window."""
        start = window * WINDOW * self._size
        draws = np.arange(start, min(start + WINDOW * self._size, self._total))
        offset = np.random.default_rng([self._seed, 2]).random()
        return np.searchsorted(self._bounds, (draws * _GOLDEN + offset) % 1, side="right")

    def _get_example(self, pool: int, place: int) -> tuple[int, int]:
        """Return the example that the draw number `place` from `pool` gives, from 0."""
        many: list[tuple[int, int]] = self._pools[pool]
        epoch, place = divmod(place, len(many))
        if pool not in self._permutations or self._permutations[pool][0] != epoch:
            rng = np.random.default_rng([self._seed, 3, pool, epoch])
            self._permutations[pool] = (epoch, rng.permutation(len(many)))
        return many[int(self._permutations[pool][1][place])]


# Loading


class EmbeddingCache:
    """The most recently used embeddings of examples' media, up to `CACHE_BYTES`."""

    def __init__(self, vlm: SmolVLM) -> None:
        self._encoder = vlm.engine.encoder
        self._embeds_by_key: OrderedDict[str, list[mx.array]] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._embeds_by_key

    @property
    def nbytes(self) -> int:
        """The size of all embeddings in bytes."""
        return sum(one.nbytes for many in self._embeds_by_key.values() for one in many)

    def find(self, key: str) -> list[mx.array] | None:
        """Return the embeddings (n, I, D) of each medium under `key`, or None."""
        if key in self._embeds_by_key:
            self._embeds_by_key.move_to_end(key)
        return self._embeds_by_key.get(key)

    def encode(self, key: str, tiles: Sequence[np.ndarray]) -> list[mx.array]:
        """Encode media and store their embeddings.

        Args:
            key: Where to store them.
            tiles: The tiles (n, H, W, 3) of each medium.

        Returns:
            The embeddings (n, I, D) of each medium, computed in the same parts as for an answer.
        """
        embeds = [
            mx.concatenate(
                [
                    self._encoder(mx.array(many[at : at + TILE_BATCH]))
                    for at in range(0, len(many), TILE_BATCH)
                ]
            )
            for many in tiles
        ]
        mx.eval(embeds)
        self._embeds_by_key[key] = embeds
        while self.nbytes > CACHE_BYTES:
            self._embeds_by_key.popitem(last=False)
        return embeds


class BatchLoader:
    """Loads batches by number, and prepares the next one in a thread."""

    def __init__(
        self,
        vlm: SmolVLM,
        select_examples: SelectExamples,
        count: int,
        media_options: MediaOptions,
        cache: EmbeddingCache | None,
    ) -> None:
        """Start the thread; nothing is prepared yet.

        Args:
            vlm: The checkpoint that is trained.
            select_examples: Returns the examples of a batch, by its number.
            count: The number of batches.
            media_options: How pictures are tiled and videos sampled.
            cache: Stores embeddings; None if the encoder is trained: batches then hold pixels.
        """
        self._vlm, self._select_examples, self._count = vlm, select_examples, count
        self._media_options, self._cache = media_options, cache
        self._pool, self._tokens = ThreadPoolExecutor(1), 0
        self._next: tuple[int, Future[list[PreparedRow]]] | None = None

    def load_batch(self, number: int) -> Batch:
        """Return batch `number`, and start to prepare the one after it.

        Raises:
            DatasetError: A picture or video cannot be read.
        """
        if self._next is None or self._next[0] != number:
            self._next = (number, self._pool.submit(self._prepare, number))
        rows = self._next[1].result()
        self._next = None
        if number + 1 < self._count:
            self._next = (number + 1, self._pool.submit(self._prepare, number + 1))
        return self._collate(rows, number)

    def take_tokens(self) -> int:
        """Return how many tokens, without padding, were loaded since the last call."""
        tokens, self._tokens = self._tokens, 0
        return tokens

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown(cancel_futures=True)

    def _prepare(self, number: int) -> list[PreparedRow]:
        """Return the rows of a batch, with the tiles of media that are not cached."""
        return [self._prepare_row(example) for example in self._select_examples(number)]

    def _prepare_row(self, example: Example) -> PreparedRow:
        # Embeddings are stored in the messages' order, in which pictures and videos may alternate.
        items = [item["type"] for message in example.messages for item in message["content"]]
        order = [kind for kind in items if kind in MEDIA]
        key = repr((example.images, example.videos, order))
        builder = self._vlm.engine.prompt_builder
        if self._cache is not None and key in self._cache:
            media = measure_media(self._vlm, example, self._media_options)
            return PreparedRow(build_row(builder, example, media), example, key, None)
        media = open_media(self._vlm, example, self._media_options)
        row = build_row(builder, example, media)
        return PreparedRow(row, example, key, self._cut_tiles(example, media))

    def _cut_tiles(self, example: Example, media: tuple[Medium, ...]) -> list[np.ndarray]:
        """Return the tiles (n, H, W, 3) of each of `media`."""
        config = self._vlm.config
        try:
            return [np.stack([tile for _, tile in medium.make_tiles(config)]) for medium in media]
        except SmolVLMError as error:
            raise DatasetError(f"{example.where}: {error}") from None

    def _collate(self, rows: Sequence[PreparedRow], number: int) -> Batch:
        """Pad `rows` to one length and return them as batch `number`."""
        length = max(pad_length(one.row.ids.size) for one in rows)
        input_ids = np.zeros((len(rows), length), np.int32)
        is_target = np.zeros((len(rows), length), bool)
        for i, one in enumerate(rows):
            input_ids[i, : one.row.ids.size] = one.row.ids
            is_target[i, : one.row.ids.size] = one.row.is_target
        self._tokens += sum(one.row.ids.size for one in rows)
        flat = np.flatnonzero(is_target)
        pixels: list[np.ndarray] = []
        embeds: list[mx.array] = []
        for one in rows:
            if self._cache is None:
                pixels += one.tiles or []
            else:
                embeds += self._find_embeds(one, self._cache)
        return Batch(
            input_ids=input_ids,
            places=(flat - 1).astype(np.int32),
            targets=input_ids.reshape(-1)[flat],
            pixel_values=np.concatenate(pixels) if pixels else None,
            image_embeds=mx.concatenate(embeds) if embeds else None,
            seed=number,
        )

    def _find_embeds(self, row: PreparedRow, cache: EmbeddingCache) -> list[mx.array]:
        """Return the embeddings (n, I, D) of each medium of `row`, encoding them if needed."""
        embeds = cache.find(row.key)
        if embeds is not None:
            return embeds
        if row.tiles is None:  # cached when the row was prepared, and dropped since
            media = open_media(self._vlm, row.example, self._media_options)
            row.tiles = self._cut_tiles(row.example, media)
        return cache.encode(row.key, row.tiles) if row.tiles else []
