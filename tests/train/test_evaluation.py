"""Evaluations: what is asked and how it counts, and going on after a stop."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import av
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_smolvlm import CacheOptions, Sampling, SmolVLM, load
from mlx_smolvlm.errors import DatasetError, MediaError, PromptError
from mlx_smolvlm.train.evaluate.cases import EvaluationOptions, read_cases
from mlx_smolvlm.train.evaluate.report import Result, score_tasks, wilson_interval
from mlx_smolvlm.train.evaluate.run import Evaluation, evaluate

SHORT = EvaluationOptions(max_tokens=6)


def write_dataset(folder: Path, lines: list[dict[str, Any]], name: str = "test.jsonl") -> Path:
    """A dataset of `lines`, beside pictures 0.png and 1.png, and bad.png, which is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes(b"no picture")
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def asking(question: str, **more: Any) -> dict[str, Any]:
    return {"image": "0.png", "question": question, "answer": "yes", **more}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six lines of three tasks."""
    lines = [
        asking("What?", task="a"),
        asking("Which one?", task="b", choices=["yes", "no"]),
        asking("Where?", task="a"),
        {"question": "Who?", "answer": "42", "metric": "relaxed"},
        asking("How?", task="b", image="1.png"),
        asking("What?", task="a", image="1.png"),
    ]
    return write_dataset(tmp_path, lines)


def run(
    vlm: SmolVLM, data: Path, results: Path | None, options: EvaluationOptions = SHORT
) -> Evaluation:
    evaluation = Evaluation(vlm, read_cases([data], options), options)
    for _ in evaluation.run(results):
        pass
    return evaluation


def test_answers_are_those_of_a_cold_model(tiny_folder: Path, data: Path) -> None:
    results = run(load(tiny_folder), data, None).results
    for result in results:
        vlm = load(tiny_folder, cache=CacheOptions(memory_bytes=0))
        images = [data.parent / name for name in result.media]
        if result.metric == "choices":
            choice = vlm.choose(result.question, ["yes", "no"], images=images)
            assert (result.answer, result.finish_reason) == (choice.best, None)
            continue
        reply = vlm.ask(result.question, images=images, sampling=Sampling(max_tokens=6))
        assert result.answer == reply.text
        assert result.finish_reason == reply.finish_reason
        assert result.prompt_tokens == reply.prompt_tokens
        assert result.generation_tokens == reply.generation_tokens
    assert [result.line for result in results] == [1, 2, 3, 4, 5, 6]
    assert [result.task for result in results] == ["a", "b", "a", "test", "b", "a"]
    metrics = ["exact", "choices", "exact", "relaxed", "exact", "exact"]
    assert [result.metric for result in results] == metrics


def test_earlier_turns_and_media_stay_where_they_are(tiny_video: SmolVLM, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    with av.open(str(film), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in (0, 90, 180):
            pixels = np.full((48, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode())
    text = {"type": "text", "text": "And then?"}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "video"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "I see."}]},
        {"role": "user", "content": [{"type": "image"}, text]},
    ]
    told = [*turns, {"role": "assistant", "content": "Nothing."}]
    line = {"messages": told, "images": ["0.png"], "videos": ["film.mp4"], "system": "Brief."}
    path = write_dataset(tmp_path, [line])
    (result,) = run(tiny_video, path, None, EvaluationOptions(max_tokens=6, detail="low")).results
    reply = tiny_video.ask(
        turns,
        images=[tmp_path / "0.png"],
        videos=[film],
        system="Brief.",
        sampling=Sampling(max_tokens=6),
        detail="low",
    )
    assert (result.answer, result.prompt_tokens) == (reply.text, reply.prompt_tokens)
    assert (result.question, result.expected) == ("And then?", ("Nothing.",))
    assert result.media == ("0.png", "film.mp4")


def test_a_picture_of_several_lines_is_encoded_once(tiny_folder: Path, data: Path) -> None:
    vlm = load(tiny_folder)
    encoder, tiles = vlm.engine.encoder, []

    def counting(pixels: mx.array) -> mx.array:
        tiles.append(len(pixels))
        return encoder(pixels)

    vlm.engine.encoder = counting
    run(vlm, data, None)
    each = vlm.ask("?", images=[data.parent / "0.png"], sampling=Sampling(max_tokens=1)).image_tiles
    assert sum(tiles) == 2 * each


def test_what_the_model_says_is_right(tiny: SmolVLM, tmp_path: Path) -> None:
    picture = write_dataset(tmp_path, []).parent / "0.png"
    said = tiny.ask("What?", images=[picture], sampling=Sampling(max_tokens=6)).text
    lines = [asking("What?", answers=["other", said]), asking("What?")]
    report = evaluate(tiny, [write_dataset(tmp_path, lines)], SHORT)
    assert (report.overall.right, report.overall.n, report.total) == (1, 2, 2)


def test_tasks_and_limits(tiny: SmolVLM, data: Path) -> None:
    def lines(**options: Any) -> list[int]:
        return [
            case.example.line for case in read_cases([data], EvaluationOptions(**options)).cases
        ]

    assert lines() == [1, 2, 3, 4, 5, 6]
    assert lines(limit=1) == [1, 2, 4]
    assert lines(limit=2, tasks=("a", "test")) == [1, 3, 4]
    with pytest.raises(DatasetError, match="no task 'c'; there are a, b, test"):
        lines(tasks=("c",))


def test_the_option_s_metric_is_for_lines_that_name_none(data: Path) -> None:
    chosen = read_cases([data], EvaluationOptions(metric="anls")).cases
    assert [case.metric for case in chosen] == ["anls", "anls", "anls", "relaxed", "anls", "anls"]


def test_folders_and_names_of_files(tmp_path: Path) -> None:
    line = [{"question": "?", "answer": "!"}]
    for name in ("a/test.jsonl", "a/valid.jsonl", "a/train.jsonl", "b/valid.jsonl"):
        write_dataset((tmp_path / name).parent, line, Path(name).name)
    write_dataset(tmp_path / "c", line, "train.jsonl")
    options = EvaluationOptions()
    both = read_cases([tmp_path / "a", tmp_path / "b"], options)
    assert both.files == ("a/test.jsonl", "b/valid.jsonl")
    assert [case.task for case in both.cases] == ["test", "valid"]
    assert read_cases([tmp_path / "b"], options).files == ("valid.jsonl",)
    with pytest.raises(DatasetError, match=r"neither test.jsonl nor valid.jsonl"):
        read_cases([tmp_path / "c"], options)
    with pytest.raises(DatasetError, match="given twice"):
        read_cases([tmp_path / "a", tmp_path / "a" / "test.jsonl"], options)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"metric": "bleu"}, "unknown metric 'bleu'"),
        ({"metric": "choices"}, "it has no choices"),
        ({"choices": ["a", "b"]}, "'yes' is not one of its choices"),
        ({"metric": "letter"}, "'yes' does not begin with an option letter"),
    ],
)
def test_a_line_that_no_answer_satisfies(tmp_path: Path, line: dict[str, Any], reason: str) -> None:
    path = write_dataset(tmp_path, [asking("What?"), asking("What?", **line)])
    with pytest.raises(DatasetError, match=f"test.jsonl:2: .*{reason}"):
        read_cases([path], EvaluationOptions())


@pytest.mark.parametrize("values", [{"limit": 0}, {"max_tokens": 0}, {"metric": "f1"}])
def test_options_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(values))} is "):
        EvaluationOptions(**values)


def test_a_bad_picture(tiny: SmolVLM, tmp_path: Path) -> None:
    lines = [asking("What?"), asking("What?", image="bad.png"), asking("What? " * 999), asking("?")]
    lines.append(asking("Who?"))
    data = write_dataset(tmp_path, lines)
    with pytest.raises(MediaError, match=r"test.jsonl:2: .*bad.png.*--skip-bad"):
        run(tiny, data, tmp_path / "results")
    with pytest.raises(PromptError, match=r"test.jsonl:1: .*tokens"):
        run(tiny, write_dataset(tmp_path / "long", lines[2:]), None)
    options = dataclasses.replace(SHORT, skip_bad=True)
    evaluation = run(tiny, data, tmp_path / "results", options)
    scores = [(one.score, one.error is None) for one in evaluation.results]
    assert scores == [(0, True), (0, False), (0, False), (0, True), (0, True)]
    assert "bad.png" in str(evaluation.results[1].error)
    overall = evaluation.report().overall
    assert (overall.n, overall.bad) == (5, 2)
    assert overall.cut == sum(one.generation_tokens == 6 for one in evaluation.results) > 0


def test_it_goes_on_where_it_stopped(tiny: SmolVLM, data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = run(tiny, data, whole)
    stopped = Evaluation(tiny, read_cases([data], SHORT), SHORT).run(parts)
    assert [next(stopped).line, next(stopped).line] == [1, 2]
    stopped.close()
    second = Evaluation(tiny, read_cases([data], SHORT), SHORT)
    assert [result.line for result in second.run(parts)] == [3, 4, 5, 6]
    assert parts.read_bytes() == whole.read_bytes()
    assert second.report() == first.report()
    assert list(second.run(parts)) == []


@pytest.mark.parametrize("cut", [1, 2, 40, -1])
def test_a_torn_last_line_is_asked_again(
    tiny: SmolVLM, data: Path, tmp_path: Path, cut: int
) -> None:
    path = tmp_path / "results"
    run(tiny, data, path)
    written = path.read_bytes()
    last = written.rindex(b"\n", 0, -1) + 1
    path.write_bytes(written[:-cut] if cut > 0 else written[: last + 1])
    run(tiny, data, path)
    assert path.read_bytes() == written


def test_a_torn_header(tiny: SmolVLM, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "results"
    run(tiny, data, path)
    written = path.read_bytes()
    for length in (0, 1, 20, 100):
        path.write_bytes(written[:length])
        run(tiny, data, path)
        assert path.read_bytes() == written


def test_fewer_lines_first(tiny: SmolVLM, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "results"
    few = dataclasses.replace(SHORT, limit=1, tasks=("a",))
    assert run(tiny, data, path, few).report().overall.n == 1
    assert run(tiny, data, path).report().overall.n == 6
    again = run(tiny, data, path, few).report()
    assert (again.overall.n, again.total, again.data["limit"]) == (1, 1, 1)
    assert len(path.read_text().splitlines()) == 7


def test_something_else_is_not_gone_on_with(
    tiny: SmolVLM, tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "results"
    run(tiny, data, path)
    written = path.read_bytes()
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text() + "\n")
    with pytest.raises(DatasetError, match=r"results of another checkpoint; .*--restart"):
        run(load(other), data, path)
    with pytest.raises(DatasetError, match="results of max_tokens 6, not 7;"):
        run(tiny, data, path, EvaluationOptions(max_tokens=7))
    with pytest.raises(DatasetError, match="results of metric None, not anls;"):
        run(tiny, data, path, dataclasses.replace(SHORT, metric="anls"))
    with pytest.raises(DatasetError, match="results of detail high, not low;"):
        run(tiny, data, path, dataclasses.replace(SHORT, detail="low"))
    Image.new("RGB", (9, 9)).save(data.parent / "1.png")
    with pytest.raises(DatasetError, match="results of another dataset;"):
        run(tiny, data, path)
    assert path.read_bytes() == written
    again = Evaluation(tiny, read_cases([data], SHORT), SHORT)
    assert len(list(again.run(path, restart=True))) == 6
    assert len(path.read_text().splitlines()) == 7


def test_a_letter_changed_is_another_dataset(tiny: SmolVLM, data: Path, tmp_path: Path) -> None:
    run(tiny, data, tmp_path / "results")
    data.write_text(data.read_text().replace("Where", "There"))
    with pytest.raises(DatasetError, match="another dataset"):
        run(tiny, data, tmp_path / "results")


@pytest.mark.parametrize("restart", [False, True])
def test_a_file_of_another_kind_is_left_alone(tiny: SmolVLM, data: Path, restart: bool) -> None:
    before = data.read_bytes()
    evaluation = Evaluation(tiny, read_cases([data], SHORT), SHORT)
    with pytest.raises(DatasetError, match="is not a results file"):
        next(evaluation.run(data, restart))
    assert data.read_bytes() == before


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}", '{"score": "x"}', ""])
def test_a_damaged_line_is_named(tiny: SmolVLM, data: Path, tmp_path: Path, line: str) -> None:
    path = tmp_path / "results"
    run(tiny, data, path)
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DatasetError, match=r"results:3 is damaged; .*--restart"):
        run(tiny, data, path)


def test_one_run_at_a_time(tiny: SmolVLM, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "results"
    first = Evaluation(tiny, read_cases([data], SHORT), SHORT).run(path)
    next(first)
    with pytest.raises(DatasetError, match="another run is writing"):
        run(tiny, data, path)
    first.close()
    run(tiny, data, path)
    with pytest.raises(DatasetError, match=r"results file .*: No such file"):
        run(tiny, data, tmp_path / "none" / "results")


def results_of(*values: tuple[str, str, float]) -> list[Result]:
    """Results with these tasks, metrics and scores."""
    base = Result("f", 1, "", "", "", (), ("x",), "", 0.0, "stop", 1, 1, None)
    return [dataclasses.replace(base, task=t, metric=m, score=s) for t, m, s in values]


def test_scores_by_task_and_metric() -> None:
    tasks, overall = score_tasks(
        results_of(("b", "anls", 0.75), ("a", "exact", 1), ("b", "exact", 1), ("b", "anls", 0.5))
    )
    told = [(one.task, one.metric, one.n, one.right, one.share) for one in tasks]
    assert told == [("a", "exact", 1, 1, 1), ("b", "anls", 2, 1.25, 0.625), ("b", "exact", 1, 1, 1)]
    assert (overall.task, overall.metric, overall.n, overall.right) == ("all", "mixed", 4, 3.25)
    assert score_tasks(results_of(("a", "exact", 1), ("b", "exact", 0)))[1].metric == "exact"


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_wilson_intervals(right: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


def test_nothing_asked_yet(tiny: SmolVLM, data: Path) -> None:
    with pytest.raises(DatasetError, match="no line has been asked"):
        Evaluation(tiny, read_cases([data], SHORT), SHORT).report()


def test_results_are_on_disk_before_they_are_told(
    tiny: SmolVLM, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd)))
    path = tmp_path / "results"
    for count, _ in enumerate(Evaluation(tiny, read_cases([data], SHORT), SHORT).run(path), 2):
        assert len(synced) == count
        assert synced[-1] == path.stat().st_size
