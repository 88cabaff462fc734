"""`bench`: which programs run when, what is computed of their answers, and the reports."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlx_smolvlm.bench.machine import describe_machine
from mlx_smolvlm.bench.measure import (
    BenchOptions,
    Measure,
    Result,
    compare_outputs,
    compute_ratio,
    count_photo_tiles,
    find_view,
    run_bench,
)
from mlx_smolvlm.bench.programs import Launch, Program, launch_ours, launch_peer
from mlx_smolvlm.bench.report import Report, format_report, render_picture
from mlx_smolvlm.checkpoint.load import read_config
from mlx_smolvlm.config import Config
from mlx_smolvlm.convert.hub import resolve
from mlx_smolvlm.errors import SmolVLMError
from mlx_smolvlm.media.tiles import compute_grid
from mlx_smolvlm.runtime import find_openblas

FAKE = str(Path(__file__).with_name("fake_program.py"))


@pytest.fixture(scope="module")
def config() -> Config:
    return read_config(resolve("demo"))


def fake(name: str, log: Path, *words: str) -> Launch:
    return Launch(name, (sys.executable, FAKE, name, str(log), *words))


def test_programs_take_turns_and_ratios_say_how_many_times_faster(
    tmp_path: Path, config: Config
) -> None:
    log = tmp_path / "log"
    launches = [fake("mlx-smolvlm", log), fake("mlx-vlm", log)]
    options = BenchOptions((1, 5), prompt_tokens=64, max_tokens=16, repeat=2)
    steps: list[tuple[int, int]] = []
    ours, peer = run_bench(
        launches, config, options, lambda done, total, text: steps.append((done, total))
    )
    assert steps == [(number, 8) for number in range(8)]
    text = [line.split()[0] for line in log.read_text().splitlines() if line.endswith(" text")]
    assert text == ["mlx-smolvlm", "mlx-vlm"] * 3  # once to warm up
    assert ours.measures["vision per tile, 5 tiles"].values == [0.5, 0.5]
    assert peer.measures["vision per tile, 5 tiles"].median == 1
    assert ours.measures["prefill"].median == 64 / 2
    assert peer.measures["decoding"].median == 16 / 8
    assert ours.measures["peak memory of the process, 5 tiles"].median == 2
    start = ours.measures["process start to first token, 1 tile"]
    assert all(value > 0.5 for value in start.values)
    assert "import" not in peer.measures
    assert peer.version == "9.9"
    report = Report("fake", describe_machine(), options, [ours, peer])
    values = json.loads(json.dumps(report.to_dict()))
    assert values["ratios"]["mlx-vlm"] == {
        "vision per tile, 1 tile": 2,
        "vision per tile, 5 tiles": 2,
        "prefill": 2,
        "decoding": 2,
    }
    assert values["results"][0]["measures"][0]["name"] == "import"
    assert values["outputs"]["mlx-vlm"].startswith("16 of 17 token ids the same, features the same")
    page = format_report(report)
    (line,) = (one for one in page.splitlines() if one.lstrip().startswith("prefill"))
    assert line.split() == [
        "prefill",
        "32",
        "tokens/s",
        "(32-32)",
        "16",
        "tokens/s",
        "(16-16)",
        "2.00",
    ]
    assert values["machine"]["chip"] in page
    assert Image.open(io.BytesIO(render_picture(report)), formats=["PNG"]).width == 1100


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("broken", "ValueError: no such kernel"),
        ("dies", "ended with status 3"),
        ("quits", "ended with status 4"),
        ("lacks", "ModuleNotFoundError: .*; install it, or give .* --peer-python"),
    ],
)
def test_a_program_that_fails_is_named(tmp_path: Path, config: Config, word: str, why: str) -> None:
    launches = [fake("mlx-smolvlm", tmp_path / "log"), fake("mlx-vlm", tmp_path / "log", word)]
    with pytest.raises(SmolVLMError, match=f"mlx-vlm cannot be measured: .*{why}"):
        run_bench(launches, config, BenchOptions((1,), repeat=1))


def test_parts_alone(tmp_path: Path, config: Config) -> None:
    log = tmp_path / "log"
    options = BenchOptions((1,), repeat=1, parts_only=True)
    (result,) = run_bench([fake("mlx-smolvlm", log)], config, options)
    assert list(result.measures) == ["vision per tile, 1 tile", "prefill", "decoding"]
    assert "turns" not in log.read_text()


def test_pictures_have_the_tiles_that_are_asked_for(config: Config) -> None:
    for tiles in (1, 3, 5):
        view = find_view(config, tiles)
        assert compute_grid((view.width, view.height), config, view.detail).num_tiles == tiles
    with pytest.raises(SmolVLMError, match="no picture has 4 tiles with this model; possible: 1"):
        find_view(config, 4)
    assert count_photo_tiles(config) == 5


def test_medians_and_ratios() -> None:
    fast, slow = Measure("a", "s", None, [1, 2, 9]), Measure("a", "s", None, [6, 4, 4])
    assert (fast.median, slow.median) == (2, 4)
    assert compute_ratio(fast, slow) == 2
    rate, lower = Measure("b", "tokens/s", None, [30]), Measure("b", "tokens/s", None, [10])
    assert compute_ratio(rate, lower) == 3
    assert Measure("c", "s", 1).label == "c, 1 tile"


def test_other_outputs_are_noticed() -> None:
    ours = Result("ours", True, token_ids=[1, 2, 3], sample=[1.0, 0.5])
    other = Result("peer", False, token_ids=[1, 9, 3], sample=[1.0, 0.4])
    text = compare_outputs(ours, other)
    assert text == "2 of 3 token ids the same, features different (to 1e-01)"
    assert compare_outputs(ours, Result("mlx-lm", False, token_ids=[1, 2, 3])) == (
        "3 of 3 token ids the same"
    )


@pytest.mark.parametrize(
    "values", [{"tiles": ()}, {"repeat": 0}, {"max_tokens": 0}, {"tiles": (0,)}]
)
def test_options_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        BenchOptions(**values)  # type: ignore[arg-type]


def test_how_programs_are_started(tmp_path: Path) -> None:
    ours = launch_ours(tmp_path, {"A": "1"}, "mlx-smolvlm 4 bits")
    assert ours.command[1:] == ("-P", "-m", "mlx_smolvlm.bench.worker", str(tmp_path))
    assert launch_ours(tmp_path, memory_limit=7).command[-2:] == (str(tmp_path), "7")
    peer = launch_peer("mlx-vlm", tmp_path, sys.executable, same_blas=False)
    assert peer.command[0] == sys.executable
    assert (peer.env, peer.reads_pictures) == ({}, True)
    lm = launch_peer("mlx-lm", tmp_path, None, same_blas=True)
    blas = find_openblas()
    assert lm.env == ({} if blas is None else {"LD_PRELOAD": str(blas)})
    assert not lm.reads_pictures
    assert launch_peer("transformers", tmp_path, None, same_blas=True).env == {}
    with pytest.raises(SmolVLMError, match="--peer-python"):
        launch_peer("mlx-vlm", tmp_path, str(tmp_path / "nothing"), same_blas=True)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("usage: no Python\n", "'usage: no Python'"), ("[1]\n", "'[1]'"), ("\xff\n", "'\\ufffd'")],
)
def test_a_peer_that_is_no_python_is_named_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, shown: str
) -> None:
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    (tmp_path / "text").write_bytes(text.encode("latin-1"))
    launch = Launch("mlx-vlm", ("sh", "-c", 'cat "$0"; exec sleep 60', str(tmp_path / "text")))
    with pytest.raises(SmolVLMError, match="mlx-vlm cannot be measured: it printed ") as error:
        Program(launch)
    assert str(error.value).endswith(shown)
    assert started[0].returncode is not None


def test_a_peer_that_cannot_be_started_or_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_bytes(b"\x7fELF")
    script.chmod(0o700)
    launch = launch_peer("mlx-vlm", tmp_path, str(script), same_blas=False)
    with pytest.raises(SmolVLMError, match=r"mlx-vlm cannot be measured: .* cannot be started"):
        Program(launch)

    def stop(program: Program) -> None:
        ended.append(program._process)
        raise KeyboardInterrupt

    ended: list[subprocess.Popen[str]] = []
    monkeypatch.setattr(Program, "_read", stop)
    with pytest.raises(KeyboardInterrupt):
        Program(Launch("mlx-vlm", ("sleep", "60")))
    assert ended[0].returncode is not None
