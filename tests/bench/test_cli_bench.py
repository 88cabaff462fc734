"""The command `bench`: its options, and where its results go."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mlx_smolvlm import tuning
from mlx_smolvlm.bench import tune
from mlx_smolvlm.bench.measure import BenchOptions, Result
from mlx_smolvlm.bench.models import BenchModel
from mlx_smolvlm.bench.programs import Launch
from mlx_smolvlm.cli.app import main
from mlx_smolvlm.cli.bench_request import BenchRequest
from mlx_smolvlm.convert.hub import resolve

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `bench` in this process: the status, stdout and stderr."""
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlx-smolvlm", "bench", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    return run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `run_bench` was called with; it measures nothing."""
    calls: list[Any] = []

    def run_bench(
        launches: list[Launch], config: object, options: BenchOptions, progress: object
    ) -> list[Result]:
        calls.extend([launches, options])
        results = [Result(one.name, one.name.startswith("mlx-smolvlm")) for one in launches]
        for number, result in enumerate(results):
            result.add("prefill", "tokens/s", 100.0 / (number + 1))
        return results

    monkeypatch.setattr("mlx_smolvlm.bench.measure.run_bench", run_bench)
    return calls


def test_options_arrive_and_results_go_where_they_should(
    run: Run, seen: list[Any], tmp_path: Path
) -> None:
    status, out, err = run(
        *("demo", "--bits", "16,8", "--tiles", "1,3", "--prompt-tokens", "20", "--repeat", "2"),
        *("--max-tokens", "5", "--work", str(tmp_path / "work"), "--memory-limit", "1GB"),
        *("--json", str(tmp_path / "a.json"), "--png", str(tmp_path / "a.png")),
    )
    assert (status, err) == (0, "")
    launches, options = seen
    assert [one.name for one in launches] == ["mlx-smolvlm 16 bits", "mlx-smolvlm 8 bits"]
    for launch, name in zip(launches, ("demo-16", "demo-8"), strict=True):
        assert launch.command[-2].startswith(f"{tmp_path}/work/{name}-")
        assert launch.command[-1] == "1000000000"
    assert options == BenchOptions((1, 3), 20, 5, 2)
    assert "100 tokens/s" in out
    assert "2.00" in out
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["options"]["tiles"] == [1, 3]
    with Image.open(tmp_path / "a.png", formats=["PNG"]) as picture:
        assert picture.width == 1100


def test_sizes_stand_side_by_side(
    run: Run, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_random_model(size: str, bits: object, work: object, progress: object) -> BenchModel:
        return BenchModel(size, {"16 bits": resolve("demo")}, None)

    monkeypatch.setattr("mlx_smolvlm.bench.models.make_random_model", make_random_model)
    status, out, _ = run("--random", "256m,500m")
    assert status == 0
    names = [one.name for one in (*seen[0], *seen[2])]
    assert names == ["mlx-smolvlm 256m 16 bits", "mlx-smolvlm 500m 16 bits"]
    assert all(name in out for name in names)


def test_json_on_stdout_stands_alone(run: Run, seen: list[Any]) -> None:
    status, out, _ = run("--json", "-")
    assert status == 0
    assert json.loads(out)["model"] == "demo"
    assert seen[1].tiles == (1, 5)  # a tile, and a photo's


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--bits", "5"], 2, "5 is none of 4, 8 and 16"),
        (["--tiles", "x"], 2, "'x' is not numbers with commas between them"),
        (["--repeat", "0"], 2, "repeat is 0"),
        (["--prompt-tokens", "99999"], 2, "exceeds the context of 2,048"),
        (["--against", "ollama"], 2, "'ollama' is none of mlx-vlm"),
        (["demo", "--random", "256m"], 2, "exclude each other"),
        (["--random", "1b"], 2, "'1b' is none of 256m, 500m, 2.2b"),
        (["--random", "256m,500m", "--against", "mlx-vlm"], 2, "one size at a time"),
        (["--json", "/no/such/a.json"], 2, "there is no folder /no/such"),
        (["--against", "mlx-vlm"], 1, "demo is not a checkpoint in Hugging Face's format"),
        (["--random", ","], 2, "',' has no value"),
        (["--tiles", " ,"], 2, "' ,' has no value"),
        (["--png", "/"], 2, "/ is a folder; give a file"),
        (["--json", ""], 2, "is a folder; give a file"),
    ],
)
def test_wrong_options(
    run: Run, seen: list[Any], arguments: list[str], status: int, message: str
) -> None:
    ended, out, err = run(*arguments)
    assert (ended, out) == (status, "")
    assert message in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeat", "1"], "repeat is 1"),
        (["--json", "-"], "--json: it has no effect with --tune"),
        (["--png", "a.png"], "--png: it has no effect with --tune"),
        (["--tiles", "1"], "--tiles: it has no effect with --tune"),
        (["--prompt-tokens", "9"], "--prompt-tokens: it has no effect with --tune"),
        (["--max-tokens", "9"], "--max-tokens: it has no effect with --tune"),
        (["--peer-python", "python"], "--peer-python: it has no effect with --tune"),
        (["--against", "mlx-vlm"], "--against: it has no effect with --tune"),
        (["--memory-limit", "1GB"], "--memory-limit: it has no effect with --tune"),
        (["--random", "256m,500m"], "--random: --tune measures one model"),
        (["--bits", "4,8"], "--bits: --tune measures one model"),
    ],
)
def test_tuning_refuses_options_before_a_model_is_made(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(BenchRequest, "open_models", open_no_models)
    status, out, err = run("--tune", *arguments)
    assert (status, out) == (2, "")
    assert message in " ".join(err.split())


def test_tuning_refuses_a_users_variable_before_a_model_is_made(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BenchRequest, "open_models", open_no_models)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    status, _, err = run("--tune")
    assert (status, "OPENBLAS_NUM_THREADS is set" in err) == (1, True)


def open_no_models(*arguments: object) -> list[BenchModel]:
    raise AssertionError("a model is made")


def test_tuning_saves_what_wins_and_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in tuning.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tune, "list_settings", lambda on_gpu: [{}, {"OPENBLAS_NUM_THREADS": "1"}])
    monkeypatch.setattr(tune, "make_measure", lambda folder: lambda setting: 2.0 - len(setting))
    status, out, err = run("--tune")
    assert status == 0
    assert "* OPENBLAS_NUM_THREADS=1" in out
    assert "saved OPENBLAS_NUM_THREADS=1" in err
    assert (tmp_path / "cache" / "tuning.json").is_file()
    monkeypatch.setattr(tune, "make_measure", lambda folder: lambda setting: 2.0)
    monkeypatch.setattr("mlx_smolvlm.tuning.apply_settings", lambda: None)
    status, out, err = run("--tune")
    assert "nothing is saved" in err
    assert not (tmp_path / "cache" / "tuning.json").exists()
