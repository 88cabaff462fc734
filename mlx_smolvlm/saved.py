"""A conversation on disk: what was said, the encoded media, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_smolvlm.config import Config
from mlx_smolvlm.conversation import Turn
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.image import Grid
from mlx_smolvlm.media import Footage, Medium, Picture
from mlx_smolvlm.reuse import Content, State
from mlx_smolvlm.store import content_in, content_values, is_plain, kept, read, restored, write

KIND = "conversation"


@dataclass(frozen=True)
class Saved:
    """What a conversation is made of."""

    system: str | None
    turns: list[Turn]
    state: State | None


@dataclass(frozen=True)
class Times:
    """When the frames of a saved video are shown, and how long it is."""

    timestamps_s: tuple[float, ...]
    duration_s: float


def save(saved: Saved, path: Path, checkpoint: str) -> None:
    """Write `saved`, whose media are encoded, to `path`, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    tensors: dict[str, mx.array] = {}
    turns = []
    for turn in saved.turns:
        media = []
        for medium in turn.media:
            assert medium.image_embeds is not None
            name = f"media.{len(tensors)}"
            tensors[name] = medium.image_embeds
            media.append({"tensor": name, "digest": medium.digest, **_values(medium)})
        turns.append({"question": turn.question, "answer": turn.answer, "media": media})
    values: dict[str, Any] = {"system": saved.system, "turns": turns, "content": None}
    state = saved.state
    if state is not None and state.held and is_plain(state.cache):
        tensors |= kept(state.cache, state.held)
        ids, spans = state.content.ids[: state.held], state.content.spans
        whole = tuple(span for span in spans if span.stop <= state.held)
        values["content"] = content_values(Content(ids, whole))
    if not tensors:
        tensors["empty"] = mx.zeros((1,))
    write(path, KIND, checkpoint, tensors, values)


def load(path: Path, checkpoint: str, config: Config) -> Saved:
    """What `save` wrote to `path`.

    Raises:
        CheckpointError: It is no such file, damaged, or of another checkpoint or version.
    """
    tensors, values = read(path, KIND, checkpoint)
    try:
        turns = [
            Turn(
                turn["question"],
                tuple(_medium(one, tensors, config) for one in turn["media"]),
                turn["answer"],
            )
            for turn in values["turns"]
        ]
        system, content = values["system"], values["content"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path} is damaged") from None
    state = None if content is None else State(content_in(content), restored(tensors, config))
    return Saved(system, turns, state)


def _values(medium: Medium) -> dict[str, Any]:
    """What the prompt says of `medium`, as JSON values."""
    if isinstance(medium, Picture):
        return {"kind": "picture", "grid": [medium.grid.rows, medium.grid.cols]}
    times = medium.times
    return {
        "kind": "video",
        "timestamps_s": list(times.timestamps_s),
        "duration_s": times.duration_s,
    }


def _medium(values: Mapping[str, Any], tensors: Mapping[str, mx.array], config: Config) -> Medium:
    """The medium that `_values` described, with its embeddings."""
    medium: Medium
    if values["kind"] == "picture":
        rows, cols = values["grid"]
        medium = Picture(None, Grid(int(rows), int(cols)), "high", str(values["digest"]))
    else:
        times = Times(tuple(map(float, values["timestamps_s"])), float(values["duration_s"]))
        medium = Footage(times, None, str(values["digest"]))
    embeds = tensors[values["tensor"]]
    shape = (medium.num_tiles, config.image_seq_len, config.text.hidden_size)
    if tuple(embeds.shape) != shape:
        raise ValueError
    medium.image_embeds = embeds
    return medium
