"""Compares two checkpoints, or a conversion with its source.

The checkpoints are loaded one after the other. While the second is loaded, the output head and
the vision encoder of the first stay in memory, and its last hidden states for the texts.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_smolvlm.convert.compare.differences import (
    compare_passages,
    find_matrix_paths,
    find_surprises,
    measure_decoder_layers,
    measure_matrices,
    measure_pictures,
    pair_answers,
)
from mlx_smolvlm.convert.compare.observe import Workload, observe
from mlx_smolvlm.convert.compare.plot import render_plot
from mlx_smolvlm.convert.compare.report import (
    Comparison,
    Side,
    TaskDifference,
    format_card_section,
    summarize_tokens,
)
from mlx_smolvlm.convert.compare.samples import (
    PLAIN_QUESTION,
    QUESTIONS,
    TEXTS,
    PictureQuestion,
    draw_pictures,
)
from mlx_smolvlm.convert.hub import ResolveOptions, resolve
from mlx_smolvlm.convert.names import list_entries
from mlx_smolvlm.convert.open_model import CheckpointReader, FolderReader, SourceReader
from mlx_smolvlm.convert.run import Progress
from mlx_smolvlm.convert.source import Source, open_source
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import remove_leftovers, write_file
from mlx_smolvlm.media.encode import Medium
from mlx_smolvlm.media.tiles import Detail
from mlx_smolvlm.prompt.messages import ImageSource, read_request
from mlx_smolvlm.records import read_json, read_record
from mlx_smolvlm.smolvlm import SmolVLM

if TYPE_CHECKING:
    from mlx_smolvlm.train.evaluate.cases import Dataset
    from mlx_smolvlm.train.evaluate.report import Result


VERIFY_FILE = "verify.json"
VERIFY_PLOT = "verify.png"
ASKED_PICTURES = 8  # how many pictures get a question


@dataclass(frozen=True)
class CompareOptions:
    """The texts, pictures, questions and datasets that two checkpoints are compared on.

    Attributes:
        texts: Texts whose tokens are predicted; None takes the texts of this package.
        pictures: Pairs of a name and a picture, as `SmolVLM.ask` takes one; None takes the
            pictures of this package.
        questions: Questions about the first pictures: one a picture, repeated in turn.
        text_tokens: The maximum number of tokens of all texts together.
        max_tokens: The maximum length of an answer, in tokens.
        detail: How pictures are cut into tiles, see `SmolVLM.ask`. Pictures of datasets are
            always cut by "high".
        data: Datasets that both checkpoints answer, as `mlx-smolvlm eval` takes them.
        data_limit: How many lines of each task of the datasets to use; None uses all.

    Raises:
        ValueError: A number is not a whole number of 1 or above, or `texts`, `questions` or
            `data` is a string.
    """

    texts: tuple[str, ...] | None = None
    pictures: tuple[tuple[str, ImageSource], ...] | None = None
    questions: tuple[str, ...] = QUESTIONS
    text_tokens: int = 8192
    max_tokens: int = 48
    detail: Detail = "low"
    data: tuple[Path, ...] = ()
    data_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("text_tokens", "max_tokens", "data_limit"):
            value = getattr(self, name)
            if value is None and name == "data_limit":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of 1 or above")
        for name in ("texts", "questions", "data"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} is {value!r}; it must be a tuple, such as ({value!r},)")

    @property
    def named_pictures(self) -> list[tuple[str, ImageSource]]:
        """Pairs of a name and a picture."""
        return list(draw_pictures().items()) if self.pictures is None else list(self.pictures)

    def make_workload(self) -> Workload:
        """Return the texts to predict and the questions to answer."""
        pictures = self.named_pictures[:ASKED_PICTURES] if self.questions else []
        count = len(self.questions)
        questions = [
            PictureQuestion(self.questions[number % count], picture, name)
            for number, (name, picture) in enumerate(pictures)
        ]
        texts = TEXTS if self.texts is None else self.texts
        questions.append(PictureQuestion(PLAIN_QUESTION))
        return Workload(texts, self.text_tokens, tuple(questions), self.max_tokens, self.detail)


def read_data(paths: Sequence[Path], limit: int | None) -> Dataset | None:
    """Read the first `limit` lines of each task of the datasets at `paths`; None without paths.

    Raises:
        DatasetError: A file or a line cannot be used.
    """
    if not paths:
        return None
    from mlx_smolvlm.train.evaluate.cases import EvaluationOptions, read_cases

    return read_cases(list(paths), EvaluationOptions(limit=limit))


def judge(vlm: SmolVLM, data: Dataset | None, step: Callable[[str], None]) -> list[Result]:
    """Answer every line of `data` with `vlm`, and score the answers.

    `step` is called before each line with its name.

    Raises:
        MediaError: A picture or video cannot be read; it names the line.
        PromptError: A line is longer than the context; it names the line.
    """
    if data is None:
        return []
    from mlx_smolvlm.train.evaluate.cases import EvaluationOptions
    from mlx_smolvlm.train.evaluate.run import answer_case

    results = []
    for number, case in enumerate(data.cases, 1):
        step(f"line {number}")
        results.append(answer_case(vlm, case, EvaluationOptions()))
    return results


def score_tasks(a: Sequence[Result], b: Sequence[Result]) -> tuple[TaskDifference, ...]:
    """Average the scores of both by task and metric, from results of the same lines."""
    pairs: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for one, other in zip(a, b, strict=True):
        pairs.setdefault((one.task, one.metric), []).append((one, other))
    return tuple(
        TaskDifference(
            task=task,
            metric=metric,
            examples=len(both),
            reference=sum(one.score for one, _ in both) / len(both),
            other=sum(other.score for _, other in both) / len(both),
            same_answers=sum(one.answer == other.answer for one, other in both),
        )
        for (task, metric), both in sorted(pairs.items())
    )


def compare(
    reference: str | Path,
    other: str | Path,
    options: CompareOptions | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare the checkpoint `other` with `reference`.

    Args:
        reference: A folder, a hub id, an alias, or "demo", as `load` takes it.
        other: Likewise. It must have the same tokenizer.
        options: What to compare on; None takes the defaults.
        offline: Never use the network.
        progress: Called with the steps done, the steps in all, and the step that begins.

    Raises:
        CheckpointError: A checkpoint cannot be found, converted or read, or their tokenizers
            differ.
        DatasetError: A dataset cannot be used.
        MediaError: A picture cannot be opened.
    """
    how = ResolveOptions(offline=offline)
    sides = [FolderReader(resolve(one, how), str(one)) for one in (reference, other)]
    return compare_checkpoints(sides[0], sides[1], options or CompareOptions(), progress)


def compare_checkpoints(
    reference: CheckpointReader,
    other: CheckpointReader,
    options: CompareOptions,
    progress: Progress | None = None,
) -> Comparison:
    """Compare `other` with `reference`; the rest is as in `compare`."""
    check_tokenizers(reference, other)
    data = read_data(options.data, options.data_limit)
    work, lines = options.make_workload(), 0 if data is None else len(data.cases)
    steps = 2 * (work.steps + lines) + 1 + len(find_matrix_paths(reference, other))
    step = _StepCounter(progress, steps)
    vlm = reference.load()
    a, scores = observe(vlm, work, step), judge(vlm, data, step)
    del vlm
    _free_memory()
    vlm = other.load()
    b = observe(vlm, work, step, a.answers)
    tasks = score_tasks(scores, judge(vlm, data, step))
    predictions, texts = compare_passages(a, b), a.num_texts
    surprises = find_surprises(a, predictions, vlm.engine.prompt_builder.tokenizer.decode)
    answers = pair_answers(work.questions, a, b)
    step("pictures")
    features, layers = measure_pictures(a, b, _open_pictures(vlm, options))
    layers = (*measure_decoder_layers(a, b), *layers)
    del vlm, a, b
    _free_memory()
    return Comparison(
        reference=_make_side(reference),
        other=_make_side(other),
        texts=summarize_tokens(predictions[:texts]),
        answers_forced=summarize_tokens(predictions[texts:]),
        features=features,
        layers=layers,
        matrices=measure_matrices(reference, other, step),
        answers=answers,
        surprises=surprises,
        tasks=tasks,
        peak_memory_gb=step.peak_memory_gb,
    )


def _open_pictures(vlm: SmolVLM, options: CompareOptions) -> tuple[Medium, ...]:
    """Open the pictures of `options`, ready to be cut into tiles."""
    pictures = [picture for _, picture in options.named_pictures]
    return vlm.engine.open_media(read_request("", pictures, (), None), options.detail)


def check_tokenizers(reference: CheckpointReader, other: CheckpointReader) -> None:
    """Check that two checkpoints have the same tokens.

    Raises:
        CheckpointError: They do not; the message names both.
    """
    sizes = [one.config.text.vocab_size for one in (reference, other)]
    if sizes[0] != sizes[1] or reference.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise CheckpointError(
            f"{reference.name} and {other.name} have different tokenizers, so their predictions "
            "cannot be compared"
        )


class _StepCounter:
    """Counts steps, and calls `progress` before each.

    Every answer resets MLX's peak memory, so the peak is read before each step.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._peak = 0
        mx.reset_peak_memory()

    @property
    def peak_memory_gb(self) -> float:
        """The peak memory of MLX until now, in 10**9 bytes."""
        self._peak = max(self._peak, mx.get_peak_memory())
        return self._peak / 1e9

    def __call__(self, name: str) -> None:
        self._peak = max(self._peak, mx.get_peak_memory())
        if self._progress is not None:
            self._progress(self._done, self._total, name)
        self._done += 1


def _free_memory() -> None:
    """Free the memory of a model that is no longer referenced."""
    gc.collect()
    mx.clear_cache()


def _make_side(reader: CheckpointReader) -> Side:
    """Return the name and the size of a checkpoint."""
    count = sum(
        math.prod(shape) + (shape[0] if entry.bias else 0)
        for entry in list_entries(reader.config)
        for shape in entry.shapes
    )
    return Side(reader.name, reader.nbytes, 8 * reader.nbytes / count)


def verify_conversion(
    source: str | Path | Source,
    folder: Path,
    options: CompareOptions | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare the converted `folder` with its source, and write the result into `folder`.

    The files are `VERIFY_FILE` and `VERIFY_PLOT`. The source is read in memory; no converted
    copy of it is written.

    Args:
        source: The source, as `convert_checkpoint` takes it; packed weights are unpacked.
        folder: The converted checkpoint, in this package's format.
        options: What to compare on; None takes the defaults.
        offline: Look up a hub id in the local cache only.
        progress: Called with the steps done, the steps in all, and the step that begins.

    Raises:
        CheckpointError: One of the two cannot be read, or `folder` has another tokenizer.
        MediaError: A picture cannot be opened.
    """
    source = open_source(source, offline)
    reference = SourceReader(source)
    name = folder.resolve().name  # the full path would be published
    options = options or CompareOptions()
    comparison = compare_checkpoints(reference, FolderReader(folder, name), options, progress)
    source.check_unchanged()
    remove_leftovers(folder)
    write_file(folder / VERIFY_PLOT, render_plot(comparison), follow_links=False)
    text = json.dumps(comparison.to_dict(), indent=2) + "\n"
    write_file(folder / VERIFY_FILE, text, follow_links=False)
    return comparison


def read_verification(folder: Path) -> Comparison | None:
    """Read the comparison that `verify_conversion` wrote into `folder`; None if there is none.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = folder / VERIFY_FILE
    if not path.is_file():
        return None
    values = read_json(path)
    values.pop("kl_edges_nats", None)  # `Comparison.to_dict` adds them for people who plot
    try:
        return read_record(Comparison, values)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; verify the checkpoint again") from None


def format_verification(folder: Path) -> str | None:
    """Return the section of a model card on what `folder` lost; None if it was not verified.

    Raises:
        CheckpointError: The file of the comparison is damaged.
    """
    comparison = read_verification(folder)
    if comparison is None:
        return None
    plot = VERIFY_PLOT if (folder / VERIFY_PLOT).is_file() else None
    try:
        return format_card_section(comparison, plot)
    except (ArithmeticError, ValueError):  # such as a perplexity of 0, or a matrix of no model
        path = folder / VERIFY_FILE
        raise CheckpointError(f"{path} is damaged; verify the checkpoint again") from None
