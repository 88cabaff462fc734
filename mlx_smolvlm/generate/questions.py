"""`ask_batch`: questions that are answered together, each with its own pictures and options."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from mlx_smolvlm.errors import PromptError
from mlx_smolvlm.generate.batch import MAX_ROWS, AnswerBatch
from mlx_smolvlm.generate.batched_answer import BatchedAnswer
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.sampling import Sampling, SamplingOptions, choose_sampling
from mlx_smolvlm.generate.stream import Reply
from mlx_smolvlm.prompt.messages import ImageSource, Message, VideoSource, read_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_smolvlm.media.tiles import Detail


class QuestionOptions(SamplingOptions, total=False):
    """The arguments of `SmolVLM.ask`, as a dictionary; all but the prompt may be left out."""

    prompt: str | Sequence[Message]
    images: ImageSource | Iterable[ImageSource]
    videos: Iterable[VideoSource]
    system: str | None
    sampling: Sampling | None
    detail: Detail


Question: TypeAlias = str | tuple[str | list[Message], Any] | list[Message] | QuestionOptions
"""A text, (a text, its pictures), messages, or a dictionary of the arguments of `ask`."""


@dataclass(frozen=True)
class BatchOptions:
    """What the questions of a batch have in common.

    Attributes:
        sampling: How answers are generated whose questions have no options of their own.
        system: The system message of questions without one of their own.
        detail: The detail of questions without one of their own.
        max_rows: Largest number of answers to generate together.
    """

    sampling: Sampling
    system: str | None = None
    detail: Detail = "high"
    max_rows: int = MAX_ROWS


def read_question(
    engine: Engine, question: Question, options: BatchOptions
) -> tuple[Prompt, Sampling]:
    """Open the media of `question`, and return its prompt and how to answer it.

    Raises:
        PromptError: The question is none of the forms of `Question`, or as in `SmolVLM.ask`.
        TypeError: A dictionary has an unknown key.
        ValueError: An option is out of range.
        MediaError: A picture or video cannot be read.
    """
    own: dict[str, Any] = _read_form(question)
    prompt, images, videos = own.pop("prompt"), own.pop("images", ()), own.pop("videos", ())
    system, detail = own.pop("system", options.system), own.pop("detail", options.detail)
    sampling = choose_sampling(own.pop("sampling", None), own, options.sampling)  # type: ignore[arg-type]
    request = read_request(prompt, images, videos, system)
    media = engine.open_media(request, detail)
    return engine.make_prompt(request.messages, media), sampling


def _read_form(question: Question) -> dict[str, Any]:
    """Return `question` as a dictionary of the arguments of `ask`."""
    if isinstance(question, Mapping) and "prompt" in question:
        return dict(question)
    if isinstance(question, str | list):
        return {"prompt": question}
    if isinstance(question, tuple) and len(question) == 2:
        return {"prompt": question[0], "images": question[1]}
    raise PromptError(
        f"the question is {question!r:.100}; give a text, (a text, its pictures), a list of "
        "messages, or a dictionary of the arguments of ask, with a 'prompt'"
    )


def answer_questions(
    engine: Engine, questions: Iterable[Question], options: BatchOptions, return_errors: bool
) -> Generator[tuple[int, Reply | Exception], None, None]:
    """Yield the index of each question with its reply, or the error that ended it, as they end.

    Questions are taken from `questions`, and their media opened, only when there is room. Errors
    are raised, with the index as a note, unless `return_errors`.
    """
    with closing(_answer_all(engine, questions, options)) as results:
        for number, result in results:
            if isinstance(result, Exception) and not return_errors:
                result.add_note(f"in question {number} of the batch, counted from 0")
                raise result
            yield number, result


def _answer_all(
    engine: Engine, questions: Iterable[Question], options: BatchOptions
) -> Generator[tuple[int, Reply | Exception], None, None]:
    """Yield the index of each question with its reply or error."""
    batch = AnswerBatch(engine, max_rows=options.max_rows)
    numbers: dict[BatchedAnswer, int] = {}
    later: Iterator[tuple[int, Question]] = enumerate(questions)
    try:
        is_over = False
        while not is_over:
            while not batch.num_waiting and batch.num_answers < options.max_rows:
                number, question = next(later, (-1, ""))
                is_over = number < 0 and not batch.num_answers
                if number < 0:
                    break
                try:
                    prompt, sampling = read_question(engine, question, options)
                    numbers[batch.add(prompt, sampling)] = number
                except Exception as error:
                    yield number, error
                count = batch.num_answers
                batch.fill()  # at once, so that few pictures are open
                if batch.num_answers < count:  # an answer is over already; the step reports it
                    break
            for update in batch.step():
                if update.is_over:
                    answer = update.answer
                    yield numbers.pop(answer), answer.error or answer.reply
    finally:
        batch.close()
