"""`mlx-smolvlm eval` as users and scripts run it."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from mlx_smolvlm import load
from mlx_smolvlm.checkpoint.lora import (
    AdapterConfig,
    attach_adapter,
    compute_signature,
    get_adapter_arrays,
    list_adaptable,
    save_adapter,
)
from tests.helpers import command

# Ends itself with a signal when it is to write for the sixth time, half of that written or nothing.
STOPPING = """
import os, sys
from mlx_smolvlm.train.evaluate import report
write, signal_, half = os.write, int(sys.argv.pop(1)), sys.argv.pop(1) == "half"
count = 0
def stopping(fd, data):
    global count
    count += 1
    if count == 6:
        if half:
            write(fd, data[: len(data) // 2])
        os.kill(os.getpid(), signal_)
    return write(fd, data)
report.os.write = stopping
from mlx_smolvlm.cli.app import main
main()
"""
SHARE = {"type": "number", "minimum": 0, "maximum": 1}
SCORE = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "task": {"type": "string"},
        "metric": {"type": "string"},
        "n": {"type": "integer", "minimum": 1},
        "right": {"type": "number", "minimum": 0},
        "share": SHARE,
        "interval": {"type": "array", "items": SHARE, "minItems": 2, "maxItems": 2},
        "bad": {"type": "integer", "minimum": 0},
        "cut": {"type": "integer", "minimum": 0},
    },
}
SCORE["required"] = list(SCORE["properties"])  # type: ignore[call-overload]
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "model": {
            "type": "object",
            "required": ["name", "source", "adapter", "digest", "bits"],
        },
        "data": {"type": "object", "required": ["files", "digest", "tasks", "limit"]},
        "settings": {"type": "object", "required": ["detail", "max_tokens", "metric", "dtype"]},
        "versions": {"type": "object", "required": ["mlx-smolvlm", "mlx"]},
        "tasks": {"type": "array", "items": SCORE, "minItems": 1},
        "overall": SCORE,
        "total": {"type": "integer"},
    },
}
SCHEMA["required"] = list(SCHEMA["properties"])  # type: ignore[call-overload]


def run(
    *arguments: str | Path, cwd: Path, program: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The finished command, or a `program` that ends as it does."""
    if program is None:
        return command.run_text("eval", *arguments, cwd=cwd)
    words = [*program, "eval", *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with test.jsonl: eight lines of two tasks, one of which is sure to be right."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    lines: list[dict[str, Any]] = [
        {"image": "a.png", "question": f"What {number}?", "answer": "yes", "task": "free"}
        for number in range(7)
    ]
    sure = {"question": "Which?", "answers": ["x", "y"], "choices": ["x", "y"], "task": "a|b"}
    text = "".join(json.dumps(line) + "\n" for line in [*lines, sure])
    (tmp_path / "test.jsonl").write_text(text)
    return tmp_path


def test_a_table_and_what_was_wrong(tiny_folder: Path, folder: Path) -> None:
    result = run(tiny_folder, ".", "--max-tokens", "5", "--show-errors", "2", cwd=folder)
    assert result.returncode == 0
    rows = [line.split("  ") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == ["task", "a|b", "free", "all"]
    assert "1 of 1" in result.stdout
    assert "0 of 7" in result.stdout
    assert "0.0 to 35.4 %" in result.stdout  # Wilson's: 1.96**2 / (7 + 1.96**2)
    assert "1 of 8" in result.stdout
    results = folder / f"eval-{tiny_folder.name}-{folder.name}.jsonl"
    first, *others = result.stderr.splitlines()
    assert first == f"results: {results.name}"
    assert len(results.read_text().splitlines()) == 9
    assert sum(line.startswith("  question: What ") for line in others) == 2
    assert "test.jsonl:1 (free, exact) a.png" in others
    assert "  expected: yes" in others
    assert sum(line.startswith("  got: ") for line in others) == 2


def test_json_and_markdown_for_a_model_card(tiny_folder: Path, folder: Path) -> None:
    arguments = (tiny_folder, "test.jsonl", "--max-tokens", "5", "--limit", "3", "--results", "r")
    result = run(*arguments, "--json", cwd=folder)
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1
    told = json.loads(result.stdout)
    jsonschema.validate(told, SCHEMA)
    assert [(one["task"], one["n"], one["right"]) for one in told["tasks"]] == [
        ("a|b", 1, 1),
        ("free", 3, 0),
    ]
    assert told["overall"]["share"] == 0.25
    assert (told["total"], told["data"]["limit"]) == (4, 3)
    head, line, *rows, empty, what = run(*arguments, "--markdown", cwd=folder).stdout.splitlines()
    assert head == "| task | metric | right | share | 95 % interval |"
    assert line == "| --- | --- | --- | --- | --- |"
    assert rows[0].startswith(r"| a\|b | choices | 1 of 1 | 100.0 % | 20.7 to 100.0 % |")
    assert (len(rows), empty) == (3, "")
    assert f"checkpoint {told['model']['digest'][:12]}" in what
    assert "the first 3 of each task" in what


@pytest.mark.parametrize("half", ["half", "none"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on(
    tiny_folder: Path, folder: Path, number: signal.Signals, half: str
) -> None:
    arguments = (tiny_folder, "test.jsonl", "--max-tokens", "5", "--results")
    whole = run(*arguments, "whole", cwd=folder)
    program = [sys.executable, "-c", STOPPING, str(int(number)), half]
    stopped = run(*arguments, "parts", cwd=folder, program=program)
    assert stopped.stdout == ""
    if number == signal.SIGKILL:
        assert stopped.returncode == -signal.SIGKILL
    else:
        assert stopped.returncode == 130
        assert "stopped after 4 of 8 lines; the same command goes on" in stopped.stderr
    assert (folder / "parts").read_bytes().count(b"\n") == 5
    again = run(*arguments, "parts", cwd=folder)
    assert (again.returncode, again.stdout) == (0, whole.stdout)
    assert (folder / "parts").read_bytes() == (folder / "whole").read_bytes()


def test_bad_lines(tiny_folder: Path, folder: Path) -> None:
    (folder / "a.png").write_bytes(b"no picture")
    arguments = (tiny_folder, "test.jsonl", "--max-tokens", "5")
    result = run(*arguments, cwd=folder)
    assert (result.returncode, result.stdout) == (1, "")
    assert "error: test.jsonl:1: " in result.stderr
    assert "--skip-bad" in result.stderr
    result = run(*arguments, "--skip-bad", "--show-errors", "1", cwd=folder)
    assert result.returncode == 0
    assert "1 of 8" in result.stdout
    assert "warning: 7 lines could not be asked and count as wrong" in result.stderr
    assert "  error:    " in result.stderr


def test_the_data_is_read_before_the_model(folder: Path) -> None:
    with (folder / "test.jsonl").open("a") as file:
        file.write('{"question": "?"}\n')
    result = run("/none", "test.jsonl", cwd=folder)
    assert (result.returncode, result.stdout) == (1, "")
    assert "test.jsonl:9: " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("DATA", "Missing")),
        (("d", "--metric", "bleu"), ("--metric", "'bleu'", "anls")),
        (("d", "--limit", "0"), ("--limit", "1 or more")),
        (("d", "--max-tokens", "0"), ("--max-tokens", "1 or more")),
        (("d", "--detail", "x"), ("--detail", "'x'")),
        (
            ("d", "--bits", "5"),
            ("--bits", "Error: Invalid value for '--bits': '5' is not one of '4', '8', '16'."),
        ),
        (("d", "--show-errors", "-1"), ("--show-errors",)),
        (("d", "--json", "--markdown"), ("--json", "--markdown")),
    ],
)
def test_wrong_option(tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    # Neither model nor data exist: options are looked at first.
    result = run("/none", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    for word in words:
        assert word in result.stderr


def test_results_are_kept_until_restart(tiny_folder: Path, folder: Path) -> None:
    arguments = (tiny_folder, "test.jsonl", "--max-tokens", "5", "--results", "r")
    first = run(*arguments, cwd=folder).stdout
    file = folder / "r"
    file.write_text(file.read_text().replace('"score": 0.0', '"score": 1.0'))
    assert "7 of 7" in run(*arguments, cwd=folder).stdout
    assert run(*arguments, "--restart", cwd=folder).stdout == first


def test_an_adapter_counts_as_another_model(tiny_folder: Path, folder: Path) -> None:
    vlm = load(tiny_folder)
    modules = list_adaptable(vlm.model, ("text",))
    numbers = tuple(compute_signature(vlm.model))
    config = AdapterConfig(vlm.config.source, numbers, 2, 50.0, 0.0, modules)
    attach_adapter(vlm.model, config)
    for name, array in get_adapter_arrays(vlm.model, config).items():
        vlm.model.load_weights([(name, array + 1.0)], strict=False)
    save_adapter(vlm.model, folder / "mine", config)
    arguments = (tiny_folder, "test.jsonl", "--max-tokens", "5")
    assert run(*arguments, cwd=folder).returncode == 0
    adapted = (*arguments, "--adapter", "mine")
    told = json.loads(run(*adapted, "--json", cwd=folder).stdout)
    assert told["model"]["adapter"] == "mine"
    names = [f"eval-{tiny_folder.name}-{name}.jsonl" for name in ("test", "mine-test")]
    plain, other = (
        [json.loads(line)["answer"] for line in (folder / name).read_text().splitlines()[1:]]
        for name in names
    )
    assert plain != other
    refused = run(*adapted, "--results", names[0], cwd=folder)
    assert refused.returncode == 1
    assert "results of another checkpoint" in refused.stderr
