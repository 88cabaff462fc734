"""Two checkpoints of one tokenizer compared: predictions, pictures, answers, matrices.

They are loaded one after the other. Beside the one at hand, the reference's output head and
vision encoder are in memory, and the last hidden states of the texts.
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
    TaskScore,
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


ASKED_PICTURES = 8  # how many pictures a question is asked about


@dataclass(frozen=True)
class CompareOptions:
    """What two checkpoints are tried on.

    Attributes:
        texts: Whose tokens are predicted; None takes those of this package.
        pictures: Pairs of a name and a picture, as `SmolVLM.ask` takes one; None takes those
            of this package.
        questions: Asked about the first pictures, one each, in turn.
        text_tokens: The most tokens of texts that are read, in all.
        max_tokens: The longest answer, in tokens.
        detail: How pictures are cut into tiles, see `SmolVLM.ask`; datasets' are by "high".
        data: Datasets whose questions both answer, as `mlx-smolvlm eval` takes them.
        data_limit: Of each of their tasks, the first so many lines; None takes all.

    Raises:
        ValueError: A number that is below 1.
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
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}; it must be 1 or above")

    @property
    def named_pictures(self) -> list[tuple[str, ImageSource]]:
        """Names and pictures."""
        return list(draw_pictures().items()) if self.pictures is None else list(self.pictures)

    def work(self) -> Workload:
        """Texts and questions."""
        pictures = self.named_pictures[:ASKED_PICTURES] if self.questions else []
        count = len(self.questions)
        asked = [
            PictureQuestion(self.questions[number % count], picture, name)
            for number, (name, picture) in enumerate(pictures)
        ]
        texts = TEXTS if self.texts is None else self.texts
        questions = (*asked, PictureQuestion(PLAIN_QUESTION))
        return Workload(texts, self.text_tokens, questions, self.max_tokens, self.detail)


def read_data(paths: Sequence[Path], limit: int | None) -> Dataset | None:
    """The lines of the datasets at `paths`, of each task the first `limit`; None without paths.

    Raises:
        DatasetError: A file or a line cannot be used.
    """
    if not paths:
        return None
    from mlx_smolvlm.train.evaluate.cases import EvaluationOptions, read_cases

    return read_cases(list(paths), EvaluationOptions(limit=limit))


def judge(vlm: SmolVLM, data: Dataset | None, step: Callable[[str], None]) -> list[Result]:
    """The answers of `vlm` to every line of `data`, judged; `step` is called for each.

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


def score_tasks(a: Sequence[Result], b: Sequence[Result]) -> tuple[TaskScore, ...]:
    """Scores of both by task and metric, from results of the same lines."""
    pairs: dict[tuple[str, str], list[tuple[Result, Result]]] = {}
    for one, other in zip(a, b, strict=True):
        pairs.setdefault((one.task, one.metric), []).append((one, other))
    return tuple(
        TaskScore(
            task=task,
            metric=metric,
            examples=len(found),
            reference=sum(one.score for one, _ in found) / len(found),
            other=sum(other.score for _, other in found) / len(found),
            same_answers=sum(one.answer == other.answer for one, other in found),
        )
        for (task, metric), found in sorted(pairs.items())
    )


def compare(
    reference: str | Path,
    other: str | Path,
    options: CompareOptions | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """How far the checkpoint `other` lies from `reference`.

    Args:
        reference: As `load` takes it: a folder, a hub id, an alias, or "demo".
        other: Likewise, with the same tokenizer.
        options: Texts, pictures and questions.
        offline: Never use the network.
        progress: Called with the steps done, the steps in all, and the step that begins.

    Raises:
        CheckpointError: One cannot be found, converted or read, or their tokenizers differ.
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
    """How far `other` lies from `reference`; arguments and errors as in `compare`."""
    check_tokenizers(reference, other)
    data = read_data(options.data, options.data_limit)
    work, lines = options.work(), 0 if data is None else len(data.cases)
    steps = 2 * (work.steps + lines) + 1 + len(find_matrix_paths(reference, other))
    tally = _StepCounter(progress, steps)
    vlm = reference.load()
    a, scores = observe(vlm, work, tally), judge(vlm, data, tally)
    del vlm
    _free_memory()
    vlm = other.load()
    b = observe(vlm, work, tally, a.answers)
    tasks = score_tasks(scores, judge(vlm, data, tally))
    found, texts = compare_passages(a, b), a.num_texts
    strange = find_surprises(a, found, vlm.engine.prompt_builder.tokenizer.decode)
    answers = pair_answers(work.asked, a, b)
    tally("pictures")
    features, layers = measure_pictures(a, b, _open_pictures(vlm, options))
    layers = (*measure_decoder_layers(a, b), *layers)
    del vlm, a, b
    _free_memory()
    return Comparison(
        reference=_make_side(reference),
        other=_make_side(other),
        texts=summarize_tokens(found[:texts]),
        answers_forced=summarize_tokens(found[texts:]),
        features=features,
        layers=layers,
        matrices=measure_matrices(reference, other, tally),
        answers=answers,
        surprises=strange,
        tasks=tasks,
        peak_memory_gb=tally.peak_memory_gb,
    )


def _open_pictures(vlm: SmolVLM, options: CompareOptions) -> tuple[Medium, ...]:
    """The pictures of `options`, ready to be cut into tiles."""
    pictures = [picture for _, picture in options.named_pictures]
    return vlm.engine.open_media(read_request("", pictures, (), None), options.detail)


def check_tokenizers(reference: CheckpointReader, other: CheckpointReader) -> None:
    """Refuse checkpoints whose tokens are not the same.

    Raises:
        CheckpointError: It names both.
    """
    sizes = [one.config.text.vocab_size for one in (reference, other)]
    if sizes[0] != sizes[1] or reference.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise CheckpointError(
            f"{reference.name} and {other.name} have different tokenizers, so their predictions "
            "cannot be compared"
        )


class _StepCounter:
    """Counts steps, and tells `progress` of each as it begins.

    Every answer starts MLX's count of the most memory anew, so it is looked at before each step.
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._peak = 0
        mx.reset_peak_memory()

    @property
    def peak_memory_gb(self) -> float:
        """The most that MLX held until now, in 10**9 bytes."""
        self._peak = max(self._peak, mx.get_peak_memory())
        return self._peak / 1e9

    def __call__(self, name: str) -> None:
        self._peak = max(self._peak, mx.get_peak_memory())
        if self._progress is not None:
            self._progress(self._done, self._total, name)
        self._done += 1


def _free_memory() -> None:
    """Let go of a model that nothing needs any more."""
    gc.collect()
    mx.clear_cache()


def _make_side(opened: CheckpointReader) -> Side:
    """Name and size."""
    count = sum(
        math.prod(shape) + (shape[0] if entry.bias else 0)
        for entry in list_entries(opened.config)
        for shape in entry.shapes
    )
    return Side(opened.name, opened.nbytes, 8 * opened.nbytes / count)


VERIFY_FILE = "verify.json"
VERIFY_PLOT = "verify.png"


def verify_conversion(
    source: str | Path | Source,
    folder: Path,
    options: CompareOptions | None = None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """How far the converted `folder` lies from the weights of `source`, which become no file.

    `VERIFY_FILE` and `VERIFY_PLOT` are written into `folder`.

    Args:
        source: What was converted, as `convert_checkpoint` takes it; packed weights are unpacked.
        folder: The result, in this package's format.
        options: Texts, pictures and questions.
        offline: Take a hub id from the local cache alone.
        progress: Called with the steps done, the steps in all, and the step that begins.

    Raises:
        CheckpointError: One cannot be read, or `folder` was made from something else.
        MediaError: A picture cannot be opened.
    """
    source = open_source(source, offline)
    reference = SourceReader(source)
    name = folder.resolve().name  # what is published should not tell where it was made
    options = options or CompareOptions()
    found = compare_checkpoints(reference, FolderReader(folder, name), options, progress)
    source.check_unchanged()
    remove_leftovers(folder)
    write_file(folder / VERIFY_PLOT, render_plot(found), follow_links=False)
    text = json.dumps(found.to_dict(), indent=2) + "\n"
    write_file(folder / VERIFY_FILE, text, follow_links=False)
    return found


def read_verification(folder: Path) -> Comparison | None:
    """What `verify_conversion` found of `folder`; None if it was never asked.

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
    """The section of a model card about what `folder` lost; None if it was never measured.

    Raises:
        CheckpointError: As `read_verification`.
    """
    found = read_verification(folder)
    if found is None:
        return None
    plot = VERIFY_PLOT if (folder / VERIFY_PLOT).is_file() else None
    try:
        return format_card_section(found, plot)
    except (ArithmeticError, ValueError):  # such as a perplexity of 0, or a matrix of no model
        path = folder / VERIFY_FILE
        raise CheckpointError(f"{path} is damaged; verify the checkpoint again") from None
