"""Batches of questions about clips; a batch depends on its seed and options alone.

Clips of one batch have equally many sampled frames, so that all begin with equally many
tokens: the text and the frames of a clip go through the decoder once, and the questions
about it after them, each on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from demo_recipe.batches import denormalize, find_pointers
from demo_recipe.clip_questions import ask_clip, select_makers
from demo_recipe.clips import VIDEO, Clip, render_sampled_frames, sampled_indices
from demo_recipe.grounding import make_word_table
from demo_recipe.labels import make_patch_labels
from demo_recipe.motion import make_frame_labels, make_token_labels, make_word_labels
from demo_recipe.prefix import Pointers
from demo_recipe.rows import QuestionRow, make_row, pad_rows
from demo_recipe.sample_clips import SAMPLED, sample_clip
from demo_recipe.tokenizer import find_token_id
from demo_recipe.topics import make_shape_glyphs
from mlx_smolvlm.config import VisionConfig
from mlx_smolvlm.media.tiles import Grid, tile_frame
from mlx_smolvlm.media.timeline import format_duration, format_timestamp
from mlx_smolvlm.prompt.builder import PromptBuilder, spell_number

_SHORT_ROWS, _LONG_ROWS = 5, 2  # questions on a clip
_SAMPLED_WEIGHTS = (0.1, 0.15, 0.19, 0.17, 0.14, 0.13, 0.12)
_LONG_SHARE = 0.2  # of batches with descriptions and second questions; short ones are cheap


@dataclass(frozen=True)
class ClipBatch:
    """Questions about clips; C clips of F frames, R questions on each.

    Attributes:
        prefix_ids: int32 (C, L), each clip's tokens up to the end of its last frame.
        pixels: uint8 (C * F, H, W, 3), before they are normalized.
        labels: int32 (C * F, P, columns) of the patches, see `labels.make_patch_labels`.
        extents: float32 (C * F, P, 4) likewise.
        image_places: int32 (C * F * I,), flat places of the placeholders in `prefix_ids`.
        token_labels: int32 (C * F * I, 5), see `motion.token_labels`.
        closings: int32 (C * F,), flat places in `prefix_ids` of the token that ends a frame.
        frame_labels: int32 (C * F, 10), see `motion.frame_labels`.
        row_ids: int32 (C * R, M), the questions with their answers, padded with 0.
        places: Flat places (T,) in `row_ids` whose next token is to be predicted.
        targets: Those tokens, int32 (T,).
        weights: What each counts, float32 (T,), at sum 1.
        words: int32 (S, 4), flat place in `row_ids` of a question's word and its labels, see
            `motion.make_word_labels`; -1 for nothing to tell.
        pointers: Where tokens should look, by layer.
    """

    prefix_ids: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray
    extents: np.ndarray
    image_places: np.ndarray
    token_labels: np.ndarray
    closings: np.ndarray
    frame_labels: np.ndarray
    row_ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    words: np.ndarray
    pointers: dict[int, Pointers]


def make_clip_batch(
    seed: int,
    builder: PromptBuilder,
    frames: int,
    longest: int = SAMPLED[-1],
    missing: bool = False,
) -> ClipBatch:
    """Questions about clips of about `frames` sampled frames in all; follows from its arguments.

    Args:
        longest: Sampled frames of a clip at most.
        missing: Whether words for what is not there should look somewhere, too.
    """
    rng = np.random.default_rng(seed)
    weights = np.array(_SAMPLED_WEIGHTS) * (np.array(SAMPLED) <= longest)
    sampled = int(rng.choice(SAMPLED, p=weights / weights.sum()))
    clips = [sample_clip(rng, sampled) for _ in range(max(2, frames // sampled))]
    prefixes = np.array([make_clip_prefix(builder, clip) for clip in clips], np.int32)
    pixels = [
        tile_frame(frame, VIDEO.longest_edge, builder.config)
        for clip in clips
        for frame in render_sampled_frames(clip, rng)
    ]
    is_long = rng.random() < _LONG_SHARE
    rows: list[QuestionRow] = []
    words: list[list[tuple[int, int, int, int]]] = []
    table, side = make_word_table(builder.tokenizer), math.isqrt(builder.config.image_seq_len)
    for clip in clips:
        for _ in range(_LONG_ROWS if is_long else _SHORT_ROWS):
            count = 1 + int(is_long and rng.random() < 0.3)
            turns = ask_clip(clip, rng, count, select_makers(clip, is_long))
            rows.append(make_row(builder, turns, "\n\n"))
            told = make_word_labels(clip, rows[-1].ids, table)
            words.append([label for label in told if not rows[-1].weights[label[0]]])
    row_ids, shares = pad_rows(rows)
    flat = np.flatnonzero(shares)
    length = row_ids.shape[1]
    found = [(i * length + at, *what) for i, row in enumerate(words) for at, *what in row]
    labels = [_make_patch_labels(clip, builder.config.vision) for clip in clips]
    grids, prefix = [Grid(0, 0)] * sampled, prefixes[0].tolist()
    return ClipBatch(
        prefix_ids=prefixes,
        pixels=denormalize(np.concatenate(pixels), builder.config),
        labels=np.concatenate([told for told, _ in labels]),
        extents=np.concatenate([extents for _, extents in labels]),
        image_places=np.flatnonzero(prefixes == builder.config.image_token_id).astype(np.int32),
        token_labels=np.concatenate([make_token_labels(clip, side) for clip in clips]).reshape(
            -1, 5
        ),
        closings=_find_closings(prefixes, builder.config.image_token_id),
        frame_labels=np.concatenate([make_frame_labels(clip) for clip in clips]),
        row_ids=row_ids,
        places=(flat - 1).astype(np.int32),
        targets=row_ids.reshape(-1)[flat],
        weights=shares.reshape(-1)[flat] / shares.sum(),
        pointers=find_pointers(rows, grids, prefix, builder.config, missing),
        words=np.array(found or [(0, -1, -1, -1)], np.int32),
    )


def _make_patch_labels(clip: Clip, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Labels and extents of the sampled frames' patches; ranks and totals are not to be told."""
    told = []
    for index in sampled_indices(clip.frames, clip.fps):
        scene = clip.scene(index)
        glyphs = [replace(glyph, rank=-1, total=-1) for glyph in make_shape_glyphs(scene)]
        told.append(make_patch_labels(glyphs, scene.background, Grid(0, 0), config.patch_grid))
    return np.concatenate([one for one, _ in told]), np.concatenate([one for _, one in told])


def _find_closings(prefixes: np.ndarray, image_token_id: int) -> np.ndarray:
    """Return the flat indices of the tokens that follow a frame's last placeholder."""
    is_image = prefixes == image_token_id
    is_last = is_image[:, :-1] & ~is_image[:, 1:]
    rows, places = np.nonzero(is_last)
    closings: np.ndarray = (rows * prefixes.shape[1] + places + 1).astype(np.int32)
    return closings


def make_clip_prefix(builder: PromptBuilder, clip: Clip) -> list[int]:
    """Return the token ids of a conversation about `clip` up to the end of its last frame.

    With `rows.make_row` it is what `PromptBuilder.build` makes of the same messages, which a
    test holds.
    """
    indices = sampled_indices(clip.frames, clip.fps)
    before = (
        f"User: You are provided the following series of {spell_number(len(indices))} frames "
        f"from a {format_duration(clip.duration_s)} [H:MM:SS] video.\n"
    )
    ids = [find_token_id(builder.tokenizer, "<|im_start|>")]
    for index in indices:
        text = f"{before}\nFrame from {format_timestamp(index / clip.fps)}:"
        ids += builder.tokenizer.encode(text, add_special_tokens=False).ids
        ids += builder.encode_grid(Grid(0, 0))
        before = ""
    return ids
