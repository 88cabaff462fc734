"""`mlx-smolvlm train` as users run it: killed, interrupted, resumed, and what it made in use."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import tiny_config
from tests.helpers import command
from tests.helpers import tuning_cases as cases

# Steps take their time, so that there is a moment between any two of them.
SLOW = """
import time
from mlx_smolvlm.train.loop import Loop
advance = Loop.advance
def slowly(loop):
    time.sleep(0.05)
    return advance(loop)
Loop.advance = slowly
from mlx_smolvlm.cli.app import main
main()
"""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a dataset in data."""
    cases.make_dataset(tmp_path / "data")
    return tmp_path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The finished command."""
    return command.run_text(*arguments, timeout_s=100)


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command with slow steps, running."""
    words = [sys.executable, "-c", SLOW, *arguments]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(log: Path, steps: int) -> None:
    """Return when `steps` steps are in the log."""
    deadline = time.monotonic() + 60
    while not log.exists() or log.read_text().count("\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_at_any_step_it_ends_with_the_same_weights(tiny_folder: Path, work: Path) -> None:
    config = cases.write_config(work, tiny_folder, steps=20, save_every=3, lora__dropout=0.1)
    whole = run("train", config, "--out", work / "whole")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout == f"{work / 'whole' / 'adapter'}\n"
    out = work / "killed"
    for low, high in ((1, 8), (9, 16)):
        process = start("train", config, "--out", out)
        wait_for_steps(out / "log.jsonl", random.randint(low, high))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = run("train", config, "--out", out)
    assert last.returncode == 0, last.stderr
    assert "going on after step" in last.stderr
    for name in ("adapter/adapters.safetensors", "adapter/adapter_config.json"):
        assert (out / name).read_bytes() == (work / "whole" / name).read_bytes()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 21))


def test_ctrl_c_saves_and_the_same_command_goes_on(tiny_folder: Path, work: Path) -> None:
    config = cases.write_config(work, tiny_folder, steps=30, save_every=1000, out="mine")
    process = start("train", config)
    wait_for_steps(work / "mine" / "log.jsonl", 3)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert "Traceback" not in error
    assert "the same command goes on from there" in error
    log = (work / "mine" / "log.jsonl").read_text().splitlines()
    done = len(log)
    assert 3 <= done < 30
    last = run("train", config)
    assert last.returncode == 0
    assert f"going on after step {done}\n" in last.stderr
    assert (work / "mine" / "log.jsonl").read_text().splitlines()[:done] == log
    again = run("train", config)
    assert (again.returncode, again.stdout) == (0, last.stdout)
    assert "this training has finished, with step 30; to train again," in again.stderr
    assert "going on" not in again.stderr


def test_the_demo_is_named_as_it_is_typed(work: Path) -> None:
    config = cases.write_config(work, "demo", steps=1, evaluate_every=1, detail="low")
    first, *_ = run("train", config).stderr.splitlines()
    assert re.match(r"training [\w, ]+ of demo \(lora, ", first), first
    assert replace(tiny_config(), source="demo_recipe, fine-tuned").name == "demo, fine-tuned"
    assert tiny_config().name == "tests/tiny"


def test_errors_are_one_line(tiny_folder: Path, work: Path) -> None:
    config = cases.write_config(work, tiny_folder, steps=2)
    (work / "bad.toml").write_text("stepps = 3\n")
    line = {"image": "none.png", "question": "?", "answer": "!"}
    for arguments, words in (
        ((work / "bad.toml",), "the key 'stepps' is not known"),
        ((work / "none.toml",), "cannot be read"),
        ((config, "--out", work / "data"), "which is not a training's file"),
        ((cases.write_config(work, work / "none"),), "none"),
    ):
        result = run("train", *arguments)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert words in result.stderr
    (work / "data" / "train.jsonl").write_text(json.dumps(line))
    result = run("train", cases.write_config(work, tiny_folder))
    assert "train.jsonl:1: there is no file 'none.png'" in result.stderr


def test_what_was_trained_is_put_to_use(tiny_folder: Path, work: Path) -> None:
    config = cases.write_config(work, tiny_folder, steps=40, optimizer__rate=0.02)
    result = run("train", config, "--fuse")
    assert result.returncode == 0, result.stderr
    fused = work / "train-trained" / "fused"
    assert result.stdout == f"{fused}\n"
    assert "step 40 of 40: loss" in result.stderr
    asked = ("chat", "Red?", "--max-tokens", "4", "--json")
    adapter = ("--adapter", work / "train-trained" / "adapter")
    plain = json.loads(run(*asked, "-m", tiny_folder).stdout)["text"]
    with_adapter = json.loads(run(*asked, "-m", tiny_folder, *adapter).stdout)["text"]
    assert with_adapter == json.loads(run(*asked, "-m", fused).stdout)["text"] != plain
    chosen = ("choose", "Red?", "-c", "A red.", "-c", "A blue.", "--json")
    before = json.loads(run(*chosen, "-m", tiny_folder).stdout)["logprobs"]
    after = json.loads(run(*chosen, "-m", tiny_folder, *adapter).stdout)["logprobs"]
    assert after[0] > before[0] + 5
    wrong = run(*asked, "-m", "demo", *adapter)
    assert wrong.returncode == 1
    assert "other weights" in wrong.stderr
    assert wrong.stderr.count("\n") == 1
