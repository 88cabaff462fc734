"""Asks a checkpoint the lines of datasets, and scores its answers by task.

evaluate(vlm, ["data/test.jsonl"], EvaluationOptions(metric="anls")).overall.share
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_smolvlm import Reply, Sampling, SmolVLM, __version__
from mlx_smolvlm.config import PARTS
from mlx_smolvlm.errors import DatasetError, MediaError, PromptError
from mlx_smolvlm.train.evaluate.cases import Case, Dataset, EvaluationOptions, read_cases
from mlx_smolvlm.train.evaluate.metrics import score
from mlx_smolvlm.train.evaluate.report import Report, Result, ResultsFile, score_tasks

__all__ = ["Evaluation", "EvaluationOptions", "Report", "Result", "evaluate", "read_cases"]


def evaluate(
    vlm: SmolVLM,
    paths: Sequence[str | Path],
    options: EvaluationOptions = EvaluationOptions(),  # noqa: B008 (frozen)
    results: Path | None = None,
) -> Report:
    """Evaluate a checkpoint on datasets.

    Args:
        vlm: A loaded checkpoint.
        paths: JSONL files, or folders with a test.jsonl or a valid.jsonl.
        options: Which lines to ask, and how.
        results: A file to write each result to. If it has results of the same evaluation, only
            the missing lines are asked. None writes no file.

    Raises:
        DatasetError: A file or a line cannot be used, or `results` is not a results file of this
            evaluation.
        MediaError: A picture or video cannot be read; it names the line.
        PromptError: A line is longer than the context; it names the line.
    """
    evaluation = Evaluation(vlm, read_cases(paths, options), options)
    for _ in evaluation.run(results):
        pass
    return evaluation.report()


class Evaluation:
    """An evaluation that can be run line by line, stopped and resumed."""

    def __init__(self, vlm: SmolVLM, dataset: Dataset, options: EvaluationOptions) -> None:
        self._vlm, self._dataset, self._options = vlm, dataset, options
        self._results: dict[tuple[str, int], Result] = {}

    @property
    def total(self) -> int:
        """The number of lines to ask."""
        return len(self._dataset.cases)

    @property
    def results(self) -> list[Result]:
        """The results so far, in the order of the dataset."""
        keys = [case.key for case in self._dataset.cases]
        return [self._results[key] for key in keys if key in self._results]

    def run(self, path: Path | None = None, restart: bool = False) -> Iterator[Result]:
        """Ask the lines that have no result, and yield each result after it has been written.

        Args:
            path: The results file, created if it does not exist; None keeps results in memory.
            restart: Delete the results in the file first.

        Raises:
            DatasetError: The file is not a results file of this evaluation.
            MediaError: A picture or video cannot be read; it names the line.
            PromptError: A line is longer than the context; it names the line.
        """
        file = None if path is None else ResultsFile(path, self._header(), restart)
        try:
            if file is not None:
                self._results = dict(file.results)
            for case in self._dataset.cases:
                if case.key in self._results:
                    continue
                result = answer_case(self._vlm, case, self._options)
                if file is not None:
                    file.append(result)
                self._results[case.key] = result
                yield result
        finally:
            if file is not None:
                file.close()

    def report(self) -> Report:
        """Return the scores of the results so far.

        Raises:
            DatasetError: There are no results yet.
        """
        if not self.results:
            raise DatasetError("no line has been asked yet; run the evaluation first")
        tasks, overall = score_tasks(self.results)
        header = self._header()
        selection = {"tasks": list(self._options.tasks), "limit": self._options.limit}
        return Report(
            model=header["model"],
            data={**header["data"], **selection},
            settings=header["settings"],
            versions=header["versions"],
            tasks=tasks,
            overall=overall,
            total=self.total,
        )

    def _header(self) -> dict[str, Any]:
        """Return what the answers depend on: the first line of a results file."""
        vlm, options = self._vlm, self._options
        parts = {part: getattr(vlm.config.quantization, part) for part in PARTS}
        return {
            "model": {
                "name": vlm.path.name,
                "source": vlm.config.source,
                "adapter": vlm.adapter.name if vlm.adapter else None,
                "digest": vlm.engine.checkpoint_digest,
                "bits": {name: part.bits if part else None for name, part in parts.items()},
            },
            "data": {"files": list(self._dataset.files), "digest": self._dataset.digest},
            "settings": {
                "metric": options.metric,
                "detail": options.detail,
                "max_tokens": options.max_tokens,
                "kv_bits": vlm.cache_options.kv_bits,
                "max_kv_tokens": vlm.cache_options.max_kv_tokens,
                "dtype": _get_dtype(vlm),
                "device": mx.default_device().type.name,
            },
            "versions": {"mlx-smolvlm": __version__, "mlx": version("mlx")},
        }


def _get_dtype(vlm: SmolVLM) -> str:
    """Return the name of the type that the model computes in."""
    weights = dict(tree_flatten(vlm.model.parameters()))
    return str(weights["text_model.norm.weight"].dtype).removeprefix("mlx.core.")


def answer_case(vlm: SmolVLM, case: Case, options: EvaluationOptions) -> Result:
    """Ask the line of `case` and score the answer.

    Raises:
        MediaError: A picture or video cannot be read, and `options.skip_bad` is off.
        PromptError: The line is longer than the context, and `options.skip_bad` is off.
    """
    example = case.example
    try:
        if case.metric == "choices":
            choice = vlm.choose(
                example.prompt,
                example.choices,
                images=example.images,
                videos=example.videos,
                detail=options.detail,
            )
            return _make_result(case, choice.best)
        reply = vlm.ask(
            example.prompt,
            images=example.images,
            videos=example.videos,
            sampling=Sampling(max_tokens=options.max_tokens),
            detail=options.detail,
        )
    except (MediaError, PromptError) as error:
        if options.skip_bad:
            return _make_result(case, error=str(error))
        kind = MediaError if isinstance(error, MediaError) else PromptError
        raise kind(
            f"{example.where}: {error}; fix or remove the line, or use --skip-bad to count it as "
            "wrong"
        ) from error
    return _make_result(case, reply.text, reply)


def _make_result(
    case: Case, answer: str = "", reply: Reply | None = None, error: str | None = None
) -> Result:
    """Return the result of `case`, without times and absolute paths, which differ by machine."""
    example = case.example
    question = next(one for one in reversed(example.prompt) if one["role"] == "user")
    media = (*example.images, *example.videos)
    folder = example.file.parent
    return Result(
        file=case.file,
        line=example.line,
        task=case.task,
        metric=case.metric,
        question="".join(item["text"] for item in question["content"] if item["type"] == "text"),
        media=tuple(Path(os.path.relpath(path, folder)).as_posix() for path in media),
        expected=example.answers,
        answer=answer,
        score=0.0 if error is not None else score(case.metric, answer, example.answers),
        finish_reason=reply.finish_reason if reply else None,
        prompt_tokens=reply.prompt_tokens if reply else 0,
        generation_tokens=reply.generation_tokens if reply else 0,
        error=error,
    )
