"""Batches of questions about clips, each drawn from a seed alone.

Clips of one batch have equally many sampled frames, so that all begin with equally many
tokens: the text and the frames of a clip go through the decoder once, and the questions
about it after them, each on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
from num2words import num2words

from mlx_smolvlm.image import Grid, tiles
from mlx_smolvlm.prompt import PromptBuilder
from mlx_smolvlm.train.clip_questions import ask_clip, makers_of
from mlx_smolvlm.train.clips import Clip, sampled_indices, shown_frames
from mlx_smolvlm.train.grounding import word_table
from mlx_smolvlm.train.motion import frame_labels, word_motions
from mlx_smolvlm.train.questions import Turn
from mlx_smolvlm.train.sample_clips import SAMPLED, sample_clip
from mlx_smolvlm.train.tokenizer import token_id

_SHORT_ROWS, _LONG_ROWS = 5, 2  # questions on a clip
_SAMPLED_WEIGHTS = (0.1, 0.15, 0.19, 0.17, 0.14, 0.13, 0.12)
_LONG_SHARE = 0.2  # of batches with descriptions and second questions; short ones are cheap

Row = tuple[list[int], list[float]]


@dataclass(frozen=True)
class ClipBatch:
    """Questions about clips; C clips of F frames, R questions on each.

    Attributes:
        prefix_ids: int32 (C, L), each clip's tokens up to the end of its last frame.
        pixel_values: float32 (C * F, H, W, 3).
        closings: int32 (C * F,), flat places in `prefix_ids` of the token that ends a frame.
        frame_labels: int32 (C * F, 7), see `motion.frame_labels`.
        row_ids: int32 (C * R, M), the questions with their answers, padded with 0.
        places: Flat places (T,) in `row_ids` whose next token is to be predicted.
        targets: Those tokens, int32 (T,).
        weights: What each counts, float32 (T,), at sum 1.
        words: int32 (S, 2), flat place in `row_ids` of a question's word and the motion of
            what it refers to; -1 for nothing to tell.
    """

    prefix_ids: np.ndarray
    pixel_values: np.ndarray
    closings: np.ndarray
    frame_labels: np.ndarray
    row_ids: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    words: np.ndarray


def clip_batch(seed: int, builder: PromptBuilder, frames: int) -> ClipBatch:
    """Questions about clips of about `frames` sampled frames in all; follows from its arguments."""
    rng = np.random.default_rng(seed)
    sampled = int(rng.choice(SAMPLED, p=_SAMPLED_WEIGHTS))
    clips = [sample_clip(rng, sampled) for _ in range(max(2, frames // sampled))]
    prefixes = np.array([clip_prefix(builder, clip) for clip in clips], np.int32)
    pixels = [
        tiles(frame, builder.config, "low").pixel_values
        for clip in clips
        for frame in shown_frames(clip, rng)
    ]
    is_long = rng.random() < _LONG_SHARE
    rows: list[Row] = []
    words: list[list[tuple[int, int]]] = []
    table = word_table(builder.tokenizer)
    for clip in clips:
        for _ in range(_LONG_ROWS if is_long else _SHORT_ROWS):
            count = 1 + int(is_long and rng.random() < 0.5)
            turns = ask_clip(clip, rng, count, makers_of(clip, is_long))
            rows.append(clip_row(builder, turns))
            words.append(
                [
                    (at, what)
                    for at, what in word_motions(clip, rows[-1][0], table)
                    if not rows[-1][1][at]
                ]
            )
    length = max(len(ids) for ids, _ in rows)
    row_ids = np.zeros((len(rows), length), np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for i, (ids, shares) in enumerate(rows):
        row_ids[i, : len(ids)], weights[i, : len(ids)] = ids, shares
    flat = np.flatnonzero(weights)
    found = [(i * length + at, what) for i, row in enumerate(words) for at, what in row]
    return ClipBatch(
        prefix_ids=prefixes,
        pixel_values=np.concatenate(pixels),
        closings=_closings(prefixes, builder.config.image_token_id),
        frame_labels=np.concatenate([frame_labels(clip) for clip in clips]),
        row_ids=row_ids,
        places=(flat - 1).astype(np.int32),
        targets=row_ids.reshape(-1)[flat],
        weights=weights.reshape(-1)[flat] / weights.sum(),
        words=np.array(found or [(0, -1)], np.int32),
    )


def _closings(prefixes: np.ndarray, image_token_id: int) -> np.ndarray:
    """Flat places of the tokens that follow a frame's last placeholder."""
    is_image = prefixes == image_token_id
    is_last = is_image[:, :-1] & ~is_image[:, 1:]
    rows, places = np.nonzero(is_last)
    closings: np.ndarray = (rows * prefixes.shape[1] + places + 1).astype(np.int32)
    return closings


def clip_prefix(builder: PromptBuilder, clip: Clip) -> list[int]:
    """Token ids of a conversation about `clip` up to the end of its last frame.

    With `clip_row` it is what `PromptBuilder.build` makes of the same messages, which a
    test holds.
    """
    indices = sampled_indices(clip.frames, clip.fps)
    lasts = timedelta(seconds=int(clip.duration_s))
    before = (
        f"User: You are provided the following series of {num2words(len(indices))} frames "
        f"from a {lasts} [H:MM:SS] video.\n"
    )
    ids = [token_id(builder.tokenizer, "<|im_start|>")]
    for index in indices:
        minutes, seconds = divmod(int(index / clip.fps), 60)
        ids += _encode(builder, f"{before}\nFrame from {minutes:02d}:{seconds:02d}:")
        ids += builder.image_ids(Grid(0, 0))
        before = ""
    return ids


def clip_row(builder: PromptBuilder, turns: list[Turn]) -> Row:
    """Token ids of `turns` after a clip, and the weight of each as a target (0: none)."""
    end, before = builder.config.eos_token_ids[0], "\n\n"
    ids: list[int] = []
    weights: list[float] = []
    for turn in turns:
        asked = [*_encode(builder, f"{before}{turn.question}"), end]
        asked += _encode(builder, "\nAssistant:")
        answer = [*_encode(builder, f" {turn.answer}"), end]
        ids += asked + answer
        weights += [0.0] * len(asked) + [len(answer) ** -0.75] * len(answer)
        before = "\nUser: "
    return ids, weights


def _encode(builder: PromptBuilder, text: str) -> list[int]:
    ids: list[int] = builder.tokenizer.encode(text, add_special_tokens=False).ids
    return ids
