"""Batches for the two kinds of training, each drawn from a seed alone.

Letters as in `mlx_smolvlm/model.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mlx_smolvlm.config import Config
from mlx_smolvlm.image import Detail, Grid, tiles
from mlx_smolvlm.prompt import PromptBuilder
from mlx_smolvlm.train.draw import COLOR_NAMES, SHAPES, Scene, render, sample_scene
from mlx_smolvlm.train.encoder import patch_labels
from mlx_smolvlm.train.grounding import referents, word_table
from mlx_smolvlm.train.questions import SHORT_MAKERS, Turn, ask, small_talk
from mlx_smolvlm.train.tokenizer import token_id

PICTURES_PER_ENCODER_BATCH = 48
_ROWS_PER_PICTURE = 4
_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Be concise.",
    "Answer the question.",
)


@dataclass(frozen=True)
class EncoderBatch:
    """Tiles with the labels of their patches: (N, H, W, 3) and int32 (N, P, 5)."""

    pixel_values: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Conversations about pictures.

    Attributes:
        input_ids: int32 (B, L), padded with 0.
        pixel_values: float32 (N, H, W, 3), the tiles of all pictures in order.
        tile_order: Which tiles the placeholders stand for, in their order.
        labels: int32 (B', P, 5) of the global tiles, which `global_tiles` (B',) names.
        places: Flat places (T,) in (B, L) whose next token is to be predicted.
        targets: Those tokens, int32 (T,).
        weights: What each counts, float32 (T,), at sum 1.
        words: Ids of the words for the kinds of shapes and for the colors, int32 (6 + 10,).
        referents: int32 (S, 5), flat place of a question's word and what it refers to.
    """

    input_ids: np.ndarray
    pixel_values: np.ndarray
    tile_order: np.ndarray
    labels: np.ndarray
    global_tiles: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    words: np.ndarray
    referents: np.ndarray


def encoder_batch(
    seed: int, config: Config, size: int = PICTURES_PER_ENCODER_BATCH
) -> EncoderBatch:
    """`size` tiles, a quarter of them crops, with labels; the same for the same `seed`."""
    rng = np.random.default_rng(seed)
    tile, pixels, labels = config.tile_size, [], []
    for _ in range(size):
        scene = sample_scene(rng)
        picture = render(scene)
        if rng.random() < 0.25:
            whole = np.asarray(
                picture.resize((2 * tile, 2 * tile), Image.Resampling.LANCZOS), np.float32
            )
            crops = whole.reshape(2, tile, 2, tile, 3).swapaxes(1, 2).reshape(4, tile, tile, 3)
            pick = int(rng.integers(4))
            pixels.append(crops[pick])
            labels.append(patch_labels(scene, config.vision, 2)[pick])
        else:
            pixels.append(
                np.asarray(picture.resize((tile, tile), Image.Resampling.LANCZOS), np.float32)
            )
            labels.append(patch_labels(scene, config.vision, 1)[0])
    return EncoderBatch((np.stack(pixels) / 127.5 - 1).astype(np.float32), np.stack(labels))


def batch(seed: int, builder: PromptBuilder, size: int, detail: Detail) -> Batch:
    """Conversations about `size` pictures; the same for the same arguments.

    Three batches of four hold single questions with short answers, four on each
    picture: what an answer needs must be looked up in the picture. The fourth has
    conversations of one to five turns, where it may also stand in an earlier answer.
    """
    rng = np.random.default_rng(seed)
    config = builder.config
    rows: list[tuple[list[int], list[float]]] = []
    scenes: list[Scene | None] = []  # of each row
    pixels: list[np.ndarray] = []
    labels, global_tiles, tile_order = [], [], []
    is_short = rng.random() < 0.75
    for _ in range(size):
        if rng.random() < 0.04:
            turns = [small_talk(rng) for _ in range(1 if is_short else int(rng.integers(1, 6)))]
            rows.append(_conversation(builder, turns, None, rng))
            scenes.append(None)
        scene = sample_scene(rng)
        cut = tiles(render(scene), config, detail)
        first = sum(len(part) for part in pixels)
        own = list(range(first, first + len(cut.pixel_values)))
        pixels.append(cut.pixel_values)
        global_tiles.append(own[-1])
        labels.append(patch_labels(scene, config.vision, 1)[0])
        if is_short:
            asked = [ask(scene, rng, 1, SHORT_MAKERS) for _ in range(_ROWS_PER_PICTURE)]
        else:
            asked = [ask(scene, rng, int(rng.integers(1, 6)))]
        for turns in asked:
            rows.append(_conversation(builder, turns, cut.grid, rng))
            scenes.append(scene)
            tile_order += own
    length = max(len(ids) for ids, _ in rows)
    input_ids, weights = (
        np.zeros((len(rows), length), np.int32),
        np.zeros((len(rows), length), np.float32),
    )
    table, found = word_table(builder.tokenizer), []
    for i, ((ids, shares), shown) in enumerate(zip(rows, scenes, strict=True)):
        input_ids[i, : len(ids)], weights[i, : len(ids)] = ids, shares
        if shown is not None:
            meant = referents(shown, ids, table)
            found += [(i * length + at, *what) for at, *what in meant if not shares[at]]
    flat = np.flatnonzero(weights)
    words = [token_id(builder.tokenizer, f"Ġ{word}") for word in (*SHAPES, *COLOR_NAMES)]
    return Batch(
        input_ids=input_ids,
        pixel_values=np.concatenate(pixels),
        labels=np.stack(labels),
        tile_order=np.array(tile_order, np.int32),
        global_tiles=np.array(global_tiles, np.int32),
        places=(flat - 1).astype(np.int32),
        targets=input_ids.reshape(-1)[flat],
        weights=weights.reshape(-1)[flat] / weights.sum(),
        words=np.array(words, np.int32),
        referents=np.array(found, np.int32).reshape(-1, 5),
    )


def _conversation(
    builder: PromptBuilder, turns: list[Turn], grid: Grid | None, rng: np.random.Generator
) -> tuple[list[int], list[float]]:
    """Token ids of `turns` about one picture, and the weight of each as a target (0: none).

    It is what `PromptBuilder.build` makes of the same messages, which a test holds.
    """
    end = builder.config.eos_token_ids[0]

    def encode(text: str) -> list[int]:
        ids: list[int] = builder.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    ids = [token_id(builder.tokenizer, "<|im_start|>")]
    before = ""
    if rng.random() < 0.03:
        ids += [*encode(f"System: {_SYSTEMS[int(rng.integers(len(_SYSTEMS)))]}"), end]
        before = "\n"
    weights = [0.0] * len(ids)
    for number, turn in enumerate(turns):
        if number == 0 and grid is not None:
            asked = [*encode(f"{before}User:"), *builder.image_ids(grid), *encode(turn.question)]
        else:
            asked = encode(f"{before}User: {turn.question}")
        asked += [end, *encode("\nAssistant:")]
        answer = [*encode(f" {turn.answer}"), end]
        ids += asked + answer
        weights += [0.0] * len(asked) + [len(answer) ** -0.75] * len(answer)
        before = "\n"
    return ids, weights
