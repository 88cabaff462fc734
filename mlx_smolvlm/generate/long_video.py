"""Answers questions about long videos: one answer for each part, then one for the whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_smolvlm.errors import ContextError, SmolVLMWarning
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
    """An answer about a part of a video.

    Attributes:
        start_s: Start of the part, in seconds.
        end_s: End of the part, in seconds.
        stream: The stream of the answer.
        is_whole: Whether this is the answer about the whole video, made from those about its
            parts.
    """

    start_s: float
    end_s: float
    stream: AnswerStream
    is_whole: bool = False

    @property
    def label(self) -> str:
        """The time range, MM:SS-MM:SS."""
        return _label(self.start_s, self.end_s)


PartAnswer = tuple[float, float, str]  # start and end in seconds, and the answer


def answer_by_part(
    engine: Engine,
    prompt: str,
    clips: Iterator[ClipPart],
    system: str | None,
    sampling: Sampling,
) -> Iterator[Part]:
    """Yield an answer for each of `clips`, then one for the whole video if there are several.

    The demo cannot sum up answers: with it, a warning takes the place of the last one.
    """
    answers: list[PartAnswer] = []
    messages = read_request(prompt, (), [None], system).messages
    for start, end, clip in clips:
        stream = AnswerStream(engine, engine.make_prompt(messages, [Footage(clip, clip)]), sampling)
        yield Part(start, end, stream)
        answers.append((start, end, stream.finish().text))
    if len(answers) > 1:
        if engine.config.is_demo:
            _warn_of_no_summary()
            return
        whole = _answer_whole(engine, prompt, answers, system, sampling)
        yield Part(answers[0][0], answers[-1][1], whole, is_whole=True)


def _warn_of_no_summary() -> None:
    warnings.warn(
        "the demo cannot sum up the answers about the parts, so it gives none for the whole "
        "video; larger models do, such as smolvlm2-256m",
        SmolVLMWarning,
        stacklevel=4,
    )


def _answer_whole(
    engine: Engine, prompt: str, answers: list[PartAnswer], system: str | None, sampling: Sampling
) -> AnswerStream:
    """Return the answer for the whole video, given `answers` about its parts.

    If `answers` do not fit into a prompt, those of each half are first reduced to one answer.
    """
    lines = "\n".join(f"{_label(start, end)}: {text}" for start, end, text in answers)
    question = (
        "The parts of a video, one after the other, were asked about. The answers:\n\n"
        f"{lines}\n\nFrom these, answer for the whole video: {prompt}"
    )
    context = engine.context_size
    try:
        prompt_of_parts = engine.make_prompt(read_request(question, (), (), system).messages, [])
    except ContextError:
        if len(answers) < 3:
            raise
    else:
        left = context - prompt_of_parts.input_ids.size
        if len(answers) < 3 or left >= min(sampling.max_tokens, context // ANSWER_SHARE):
            return AnswerStream(engine, prompt_of_parts, sampling)
    middle = len(answers) // 2
    halves: list[PartAnswer] = []
    for half in (answers[:middle], answers[middle:]):
        text = _answer_whole(engine, prompt, half, system, sampling).finish().text
        halves.append((half[0][0], half[-1][1], text))
    return _answer_whole(engine, prompt, halves, system, sampling)


def _label(start_s: float, end_s: float) -> str:
    return f"{format_timestamp(start_s)}-{format_timestamp(end_s)}"
