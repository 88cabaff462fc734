"""A conversation on disk: what was said, the encoded media, keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_smolvlm.config import Config
from mlx_smolvlm.content import Content, State
from mlx_smolvlm.errors import CheckpointError, PromptError
from mlx_smolvlm.media import Footage, Medium, Picture
from mlx_smolvlm.messages import NOUNS, Message
from mlx_smolvlm.store import content_in, content_values, is_plain, kept, read, restored, write
from mlx_smolvlm.template import checked

KIND = "conversation"


@dataclass(frozen=True)
class Turn:
    """A question as a message, its media in order, and the answer once it was given."""

    question: Message
    media: tuple[Medium, ...]
    answer: str | None = None

    @property
    def messages(self) -> list[Message]:
        """The question, and the answer if there is one."""
        if self.answer is None:
            return [self.question]
        said = {"type": "text", "text": self.answer}
        return [self.question, {"role": "assistant", "content": [said]}]


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
    write(path, KIND, checkpoint, tensors, values, follow_links=True)


def load(path: Path, checkpoint: str, config: Config) -> Saved:
    """What `save` wrote to `path`, or what could have been.

    Raises:
        CheckpointError: It is no such file, damaged, or of another checkpoint or version.
    """
    tensors, values = read(path, KIND, checkpoint)
    try:
        turns = [_turn(turn, tensors, config) for turn in values["turns"]]
        system, content = values["system"], values["content"]
        if system is not None:
            system = _text("system", system)
    except (KeyError, TypeError, ValueError, OverflowError, PromptError):
        raise CheckpointError(f"{path} is damaged") from None
    if content is None:
        return Saved(system, turns, None)
    return Saved(system, turns, State(content_in(content, config), restored(tensors, config)))


def _turn(values: Mapping[str, Any], tensors: Mapping[str, mx.array], config: Config) -> Turn:
    """The turn that `values` describe.

    Raises:
        PromptError: A message is malformed.
        KeyError, TypeError, ValueError, OverflowError: A value is missing or of another kind.
    """
    question = checked(values["question"], 1)
    media = tuple(_medium(one, tensors, config) for one in values["media"])
    items = [item["type"] for item in question["content"] if item["type"] in NOUNS]
    kinds = ["image" if isinstance(one, Picture) else "video" for one in media]
    if question["role"] != "user" or items != kinds:
        raise ValueError
    answer = values["answer"]
    return Turn(question, media, None if answer is None else _text("assistant", answer))


def _text(role: str, value: Any) -> str:
    """`value` as the text of a message of `role`; errors as `_turn`."""
    if not isinstance(value, str):
        raise TypeError
    message: Message = checked({"role": role, "content": value}, 1)
    return str(message["content"][0]["text"])


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
    """The medium that `_values` described, with its embeddings; errors as `_turn`."""
    from mlx_smolvlm.image import Grid

    medium: Medium
    if values["kind"] == "picture":
        rows, cols = values["grid"]
        if (type(rows), type(cols)) != (int, int):
            raise TypeError
        medium = Picture(None, Grid(rows, cols), "high", str(values["digest"]))
    else:
        times = Times(tuple(map(float, values["timestamps_s"])), float(values["duration_s"]))
        if not all(map(math.isfinite, times.timestamps_s)) or not 0 <= times.duration_s < math.inf:
            raise ValueError
        medium = Footage(times, None, str(values["digest"]))
    embeds = tensors[values["tensor"]]
    shape = (medium.num_tiles, config.image_seq_len, config.text.hidden_size)
    if tuple(embeds.shape) != shape or embeds.size == 0:
        raise ValueError
    if not mx.issubdtype(embeds.dtype, mx.floating):
        raise TypeError
    medium.image_embeds = embeds
    return medium
