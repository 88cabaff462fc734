"""Long videos: an answer for each part, then one over the parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_smolvlm.errors import ContextError
from mlx_smolvlm.generate.engine import ANSWER_SHARE, Engine
from mlx_smolvlm.generate.sampling import Sampling
from mlx_smolvlm.generate.stream import AnswerStream
from mlx_smolvlm.media.encode import Footage
from mlx_smolvlm.media.timeline import format_timestamp
from mlx_smolvlm.prompt.messages import read_request

if TYPE_CHECKING:
    from mlx_smolvlm.media.video import ClipPart


@dataclass(frozen=True)
class Part:
    """A part of a video, in seconds, and the stream of its answer.

    `is_whole` marks the answer over the parts.
    """

    start_s: float
    end_s: float
    stream: AnswerStream
    is_whole: bool = False

    @property
    def label(self) -> str:
        """Its time range, MM:SS-MM:SS."""
        return _label(self.start_s, self.end_s)


PartAnswer = tuple[float, float, str]  # start and end in seconds, and the answer


def answer_by_part(
    engine: Engine,
    prompt: str,
    clips: Iterator[ClipPart],
    system: str | None,
    sampling: Sampling,
) -> Iterator[Part]:
    """An answer for each of `clips`, then one over the answers if there are several."""
    told: list[PartAnswer] = []
    messages = read_request(prompt, (), [None], system).messages
    for start, end, clip in clips:
        part = Part(
            start,
            end,
            AnswerStream(engine, engine.make_prompt(messages, [Footage(clip, clip)]), sampling),
        )
        yield part
        told.append((start, end, part.stream.finish().text))
    if len(told) > 1:
        yield Part(
            told[0][0], told[-1][1], _answer_whole(engine, prompt, told, system, sampling), True
        )


def _answer_whole(
    engine: Engine, prompt: str, told: list[PartAnswer], system: str | None, sampling: Sampling
) -> AnswerStream:
    """The answer over the answers in `told`; over those of each half if they do not fit."""
    lines = "\n".join(f"{_label(start, end)}: {text}" for start, end, text in told)
    question = (
        "The parts of a video, one after the other, were asked about. The answers:\n\n"
        f"{lines}\n\nFrom these, answer for the whole video: {prompt}"
    )
    context = engine.context_size
    try:
        joined = engine.make_prompt(read_request(question, (), (), system).messages, [])
    except ContextError:
        if len(told) < 3:
            raise
    else:
        left = context - joined.input_ids.size
        if len(told) < 3 or left >= min(sampling.max_tokens, context // ANSWER_SHARE):
            return AnswerStream(engine, joined, sampling)
    middle = len(told) // 2
    halves = [
        (
            half[0][0],
            half[-1][1],
            _answer_whole(engine, prompt, half, system, sampling).finish().text,
        )
        for half in (told[:middle], told[middle:])
    ]
    return _answer_whole(engine, prompt, halves, system, sampling)


def _label(start_s: float, end_s: float) -> str:
    return f"{format_timestamp(start_s)}-{format_timestamp(end_s)}"
