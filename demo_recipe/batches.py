"""Training batches of pictures; a batch depends on its seed and options alone.

Shape letters as in `mlx_smolvlm/model/model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from demo_recipe.items import LabeledPicture
from demo_recipe.labels import make_patch_labels, make_token_mask
from demo_recipe.prefix import ANSWERED_LAYER, ASKED_LAYER, Pointers
from demo_recipe.rows import Pointed, QuestionRow, make_row, pad_rows
from demo_recipe.tokenizer import find_token_id
from demo_recipe.topics import (
    LATE_TOPICS,
    NO_FOCUS,
    PICTURE_TOPICS,
    TOPICS,
    Focus,
    ask,
    ask_several,
    draw,
    make_talk,
)
from mlx_smolvlm.config import Config
from mlx_smolvlm.media.tiles import Detail, Grid, tile_picture
from mlx_smolvlm.prompt.builder import PromptBuilder


@dataclass(frozen=True)
class EncoderBatch:
    """Tiles with labels.

    Attributes:
        pixels: uint8 (N, H, W, 3), before they are normalized.
        labels: int32 (N, P, columns) of their patches, see `labels.make_patch_labels`.
        extents: float32 (N, P, 4) likewise.
    """

    pixels: np.ndarray
    labels: np.ndarray
    extents: np.ndarray


@dataclass(frozen=True)
class PictureBatch:
    """Questions about pictures; C beginnings of equal length, R questions on each.

    Attributes:
        prefix_ids: int32 (C, L), up to the last picture.
        shown: The tiles of all pictures in order, with their labels; None without pictures.
        row_ids: int32 (C * R, M), the questions with their answers, padded with 0.
        places: Flat places (T,) in `row_ids` whose next token is to be predicted.
        targets: Those tokens, int32 (T,).
        weights: What each counts, float32 (T,), at sum 1.
        pointers: Where tokens should look, by layer.
        named: int32 (S, 5), flat place in `row_ids` of a word that names one thing, and the
            bins of `PLACE_BINS` that its centre's column and row, width and height fall into.
    """

    prefix_ids: np.ndarray
    shown: EncoderBatch | None
    row_ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    pointers: dict[int, Pointers]
    named: np.ndarray


@dataclass(frozen=True)
class QuestionOptions:
    """Which questions are asked, and what is trained beside the answers.

    Attributes:
        missing: Whether words for what is not there should look somewhere, too.
        focus: Families of questions on one picture that are asked about more often.
        places: Whether words that name something are told its place and size.
    """

    missing: bool = False
    focus: Focus = NO_FOCUS
    places: bool = False


PLAIN = QuestionOptions()


@dataclass(frozen=True)
class Mix:
    """The composition of a batch.

    Attributes:
        topics: Which kinds of pictures; none is a batch of text alone.
        conversations: C.
        rows: R, questions on each.
        pictures: In each conversation.
        detail: How pictures are cut.
    """

    topics: tuple[str, ...]
    conversations: int
    rows: int
    pictures: int = 1
    detail: Detail = "low"


PLACE_BINS = 12
_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Be concise.",
    "Answer the question.",
)
# Of the topics where the encoder learns alone: print takes it longest.
ENCODER_SHARES = {"shapes": 0.28, "words": 0.32, "charts": 0.12, "objects": 0.13, "pages": 0.15}
# Of the tiles beside conversations: what the encoder alone did not learn well enough.
PRINT_SHARES = {"shapes": 0.05, "words": 0.65, "charts": 0.05, "objects": 0.05, "pages": 0.2}
# The same where print in other fonts and charts of other programs are learned.
LATE_SHARES = {"plots": 0.35, "prints": 0.45, "words": 0.1, "pages": 0.1}
_SHORT = tuple(name for name, topic in TOPICS.items() if not topic.long)
_COARSE = tuple(name for name in _SHORT if not TOPICS[name].tiled)
MIXES: tuple[tuple[Mix, float], ...] = (
    (Mix(_COARSE, 14, 5), 0.34),
    (Mix(_SHORT, 7, 5, detail="high"), 0.36),
    (Mix(_COARSE, 6, 4, pictures=2), 0.08),
    (Mix(_SHORT, 3, 4, pictures=2, detail="high"), 0.05),
    (Mix(("pages",), 5, 2, detail="high"), 0.13),
    (Mix((), 1, 16), 0.04),
)
LATE_MIXES: tuple[tuple[Mix, float], ...] = (
    *((mix, 0.35 * share) for mix, share in MIXES),
    (Mix((*_SHORT, *LATE_TOPICS), 7, 5, detail="high"), 0.4),
    (Mix((*_COARSE, "unknown"), 14, 5), 0.12),
    (Mix(("plots",), 7, 6, detail="high"), 0.13),
)
# With more of what the stage before has lost: print and pages.
SETTLED_MIXES: tuple[tuple[Mix, float], ...] = (
    *((mix, 0.35 * share) for mix, share in MIXES),
    (Mix((*_SHORT, "plots", "unknown"), 7, 5, detail="high"), 0.32),
    (Mix((*_COARSE, "unknown"), 14, 5), 0.1),
    (Mix(("plots",), 7, 6, detail="high"), 0.08),
    (Mix(("words",), 7, 5, detail="high"), 0.07),
    (Mix(("pages",), 5, 2, detail="high"), 0.08),
)
SETTLED_SHARES = {"plots": 0.2, "words": 0.4, "pages": 0.4}


def sample_size(rng: np.random.Generator, grid: str) -> tuple[int, int]:
    """Width and height in pixels of a picture that is cut as `grid` says: square, wide or tall."""
    if grid == "square":
        aspect = 1.0 if rng.random() < 0.4 else math.exp(rng.random() * math.log(1.9))
    else:
        aspect = 2.05 + 0.5 * rng.random()
    short_side = 96 * math.exp(rng.random() ** 1.5 * math.log(640 / 96 / aspect))
    sides = (round(short_side * aspect), round(short_side))
    if grid == "tall" or (grid == "square" and rng.random() < 0.4):
        return sides[1], sides[0]
    return sides


def sample_grid(rng: np.random.Generator, topics: tuple[str, ...]) -> str:
    """How the pictures of a batch are cut; pages stand upright and are square enough."""
    if "pages" in topics:
        return "square"
    return str(rng.choice(("square", "wide", "tall"), p=(0.86, 0.09, 0.05)))


def make_encoder_batch(
    seed: int, config: Config, size: int = 48, shares: Mapping[str, float] = ENCODER_SHARES
) -> EncoderBatch:
    """Draw `size` tiles with labels; the same arguments give the same tiles.

    A picture is used as its global tile or as its crops; few of the empty crops are kept.

    Args:
        shares: Of the topics, at sum 1.
    """
    rng = np.random.default_rng(seed)
    found: list[tuple[np.ndarray, ...]] = []
    while len(found) < size:
        topic = str(rng.choice(list(shares), p=list(shares.values())))
        drawn = draw(rng, topic, sample_size(rng, sample_grid(rng, (topic,))))
        whole = rng.random() < 0.5 and not PICTURE_TOPICS[topic].tiled
        shown, _ = label_tiles(drawn, config, "low" if whole else "high")
        for number, labels in enumerate(shown.labels):
            last = number == len(shown.labels) - 1
            if (labels[..., 0] > 0).any() or (last and whole) or rng.random() < 0.05:
                found.append((shown.pixels[number], labels, shown.extents[number]))
    return EncoderBatch(*(np.stack(part) for part in zip(*found[:size], strict=True)))


def label_tiles(drawn: LabeledPicture, config: Config, detail: Detail) -> tuple[EncoderBatch, Grid]:
    """Return the tiles of a picture with their labels, and its grid."""
    cut = tile_picture(drawn.picture, config, detail)
    told = make_patch_labels(drawn.glyphs, drawn.background, cut.grid, config.vision.patch_grid)
    return EncoderBatch(denormalize(cut.pixel_values, config), *told), cut.grid


def denormalize(pixel_values: np.ndarray, config: Config) -> np.ndarray:
    """`pixel_values` as uint8, as they were before `image.tiles` normalized them."""
    values = pixel_values * (255 * np.array(config.image.std, np.float32))
    values += 255 * np.array(config.image.mean, np.float32) + np.float32(0.5)
    whole: np.ndarray = values.astype(np.uint8)
    return whole


def pick_mix(rng: np.random.Generator, mixes: tuple[tuple[Mix, float], ...] = ()) -> Mix:
    """Draw one of `mixes`, or of `MIXES` if it is empty, by their shares."""
    mixes = mixes or MIXES
    return mixes[int(rng.choice(len(mixes), p=[share for _, share in mixes]))][0]


def make_picture_batch(
    seed: int,
    builder: PromptBuilder,
    mix: Mix,
    asked: QuestionOptions = PLAIN,
    scale: int = 1,
) -> PictureBatch:
    """Draw a batch composed as `mix` says; the same arguments give the same batch.

    Args:
        scale: A factor of the number of conversations in `mix`.
    """
    rng = np.random.default_rng(seed)
    if not mix.topics:
        rows = [make_row(builder, make_talk(rng), "User: ") for _ in range(scale * mix.rows)]
        prefix = np.array([[find_token_id(builder.tokenizer, "<|im_start|>")]], np.int32)
        return _make_picture_batch(prefix, None, rows, {}, asked)
    kind = sample_grid(rng, mix.topics)
    system = str(rng.choice(_SYSTEMS)) if rng.random() < 0.04 else None
    shown: list[EncoderBatch] = []
    rows, prefixes = [], []
    grids: list[Grid] = []
    for _ in range(scale * mix.conversations):
        pictures = _draw_pictures(rng, mix, kind)
        grids = []
        for drawn in pictures:
            told, grid = label_tiles(drawn, builder.config, mix.detail)
            shown.append(told)
            grids.append(grid)
        prefixes.append(make_picture_prefix(builder, grids, system))
        for _ in range(mix.rows):
            if mix.pictures > 1:
                turns = [ask_several(pictures, rng)]
            else:
                turns = ask(pictures[0], rng, 1 + int(rng.random() < 0.18), asked.focus)
            rows.append(make_row(builder, turns, ""))
    joined = (np.concatenate(part) for part in zip(*map(_get_arrays, shown), strict=True))
    pointers = find_pointers(rows, grids, prefixes[0], builder.config, asked.missing)
    return _make_picture_batch(
        np.array(prefixes, np.int32), EncoderBatch(*joined), rows, pointers, asked
    )


def _draw_pictures(rng: np.random.Generator, mix: Mix, kind: str) -> list[LabeledPicture]:
    """Draw the pictures of a conversation."""
    weights = np.array([max(PICTURE_TOPICS[name].weight, 1e-6) for name in mix.topics])
    names = rng.choice(mix.topics, size=mix.pictures, p=weights / weights.sum())
    return [draw(rng, str(name), sample_size(rng, kind)) for name in names]


def make_picture_prefix(
    builder: PromptBuilder, grids: list[Grid], system: str | None = None
) -> list[int]:
    """Return the token ids of a conversation up to the end of its pictures."""
    encode = partial(builder.tokenizer.encode, add_special_tokens=False)
    ids = [find_token_id(builder.tokenizer, "<|im_start|>")]
    if system is not None:
        ids += [*encode(f"System: {system}").ids, builder.config.eos_token_ids[0]]
    ids += encode("User:" if system is None else "\nUser:").ids
    for grid in grids:
        ids += builder.encode_grid(grid)
    return ids


def _get_arrays(shown: EncoderBatch) -> tuple[np.ndarray, ...]:
    return shown.pixels, shown.labels, shown.extents


def find_pointers(
    rows: list[QuestionRow],
    grids: list[Grid],
    prefix: list[int],
    config: Config,
    missing: bool = False,
) -> dict[int, Pointers]:
    """Return where the tokens of `rows` should attend, by layer.

    Args:
        missing: Whether words for what is not there should look at the first token of the
            beginning, so that they find something else than words for what is there do.
    """
    length = max(len(row.ids) for row in rows)
    spots = np.flatnonzero(np.array(prefix) == config.image_token_id)
    side = math.isqrt(config.image_seq_len)
    starts = np.cumsum([0, *((grid.num_tiles if grid.rows else 1) * side * side for grid in grids)])

    def gather(found: Iterable[tuple[int, list[Pointed]]]) -> Pointers | None:
        places, masks = [], []
        for number, row in found:
            for place, boxes in row:
                mask = np.zeros(len(spots), bool)
                for box in boxes:
                    own = slice(starts[box.picture], starts[box.picture + 1])
                    mask[own] |= make_token_mask(box.extent, grids[box.picture], side)
                target = np.zeros(len(prefix), bool)
                target[spots] = mask
                target[0] = not boxes  # of what is nowhere
                places.append(number * length + place)
                masks.append(target)
        return Pointers(np.array(places, np.int32), np.stack(masks)) if places else None

    nowhere: list[list[Pointed]] = [
        [(place, ()) for place in row.missing_places if missing] for row in rows
    ]
    layers = {
        ASKED_LAYER: gather(
            [*enumerate(row.question_pointers for row in rows), *enumerate(nowhere)]
        ),
        ANSWERED_LAYER: gather(enumerate(row.answer_pointers for row in rows)),
    }
    return {layer: found for layer, found in layers.items() if found is not None}


def _make_picture_batch(
    prefix_ids: np.ndarray,
    shown: EncoderBatch | None,
    rows: list[QuestionRow],
    pointers: dict[int, Pointers],
    asked: QuestionOptions,
) -> PictureBatch:
    row_ids, weights = pad_rows(rows)
    flat = np.flatnonzero(weights)
    return PictureBatch(
        prefix_ids=prefix_ids,
        shown=shown,
        row_ids=row_ids,
        places=(flat - 1).astype(np.int32),
        targets=row_ids.reshape(-1)[flat],
        weights=weights.reshape(-1)[flat] / weights.sum(),
        pointers=pointers,
        named=find_named_places(rows if asked.places else [], row_ids.shape[1]),
    )


def find_named_places(rows: list[QuestionRow], length: int) -> np.ndarray:
    """Return `PictureBatch.named` for `rows` padded to `length`."""
    found = []
    for number, row in enumerate(rows):
        for place, boxes in row.question_pointers:
            if len(boxes) == 1:
                left, top, right, bottom = boxes[0].extent
                shares = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
                bins = (min(PLACE_BINS - 1, max(0, int(PLACE_BINS * share))) for share in shares)
                found.append((number * length + place, *bins))
    return np.array(found, np.int32).reshape(-1, 5)
