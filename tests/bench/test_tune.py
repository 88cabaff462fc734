"""`bench --tune`: what is chosen, and that it is applied to later commands alone."""

import json
import os
from pathlib import Path

import pytest

from mlx_smolvlm import tuning
from mlx_smolvlm.bench import tune
from mlx_smolvlm.bench.programs import Launch
from mlx_smolvlm.cli.doctor_checks import check_environment
from mlx_smolvlm.errors import SmolVLMError

TWO = {"MLX_MAX_OPS_PER_BUFFER": "50"}
THREE = {"MLX_MAX_OPS_PER_BUFFER": "100"}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "cache"))
    for name in tuning.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tuning, "applied", {})
    monkeypatch.setattr(tune, "applied", tuning.applied)
    return tmp_path / "cache"


def compare(*columns: list[float]) -> tune.Outcome:
    """Compare settings whose repeats take `columns` seconds; the default is the first."""
    settings = [{}, TWO, THREE][: len(columns)]
    left = [iter(column) for column in columns]
    calls: list[tune.Setting] = []

    def measure(setting: tune.Setting) -> float:
        calls.append(setting)
        return next(left[settings.index(dict(setting))])

    outcome = tune.compare_settings(settings, measure, len(columns[0]))
    assert calls == settings * len(columns[0])  # in turns
    return outcome


def test_a_setting_must_win_by_more_than_the_spread() -> None:
    assert compare([2.0, 2.1], [1.0, 1.1], [1.5, 1.5]).best == TWO
    assert compare([2.0, 2.1], [1.96, 1.97]).best == {}  # the default varies by more
    assert compare([2.0, 2.0], [1.0, 2.9]).best == {}  # one lucky repeat
    assert compare([2.0, 2.0], [2.0, 2.0]).best == {}
    with pytest.raises(ValueError, match="repeat is 1"):
        tune.compare_settings([{}], lambda setting: 1.0, 1)


def test_the_winner_is_saved_and_applied(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = compare([2.0, 2.1], [1.0, 1.1])
    path = tune.save_outcome(outcome)
    assert path == cache_folder / "tuning.json"
    assert json.loads(path.read_text())["seconds"] == {
        "default": 2.05,
        "MLX_MAX_OPS_PER_BUFFER=50": 1.05,
    }
    assert "* MLX_MAX_OPS_PER_BUFFER=50" in tune.format_outcome(outcome)
    monkeypatch.setattr(os, "environ", {**os.environ})
    tuning.apply_settings()
    assert os.environ["MLX_MAX_OPS_PER_BUFFER"] == "50"
    assert tuning.applied == TWO
    tune.check_variables(os.environ)  # set by us, so tuning may go on
    assert tune.save_outcome(compare([1.0, 1.0], [1.0, 1.0])) is None
    assert not path.exists()


def test_the_users_variables_win(monkeypatch: pytest.MonkeyPatch) -> None:
    tune.save_outcome(compare([2.0, 2.1], [1.0, 1.1]))
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "7")
    tuning.apply_settings()
    assert os.environ["MLX_MAX_OPS_PER_BUFFER"] == "7"
    assert tuning.applied == {}
    with pytest.raises(SmolVLMError, match="MLX_MAX_OPS_PER_BUFFER is set"):
        tune.check_variables(os.environ)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"host": 1}',
        '{"host": "another", "variables": {"MLX_MAX_OPS_PER_BUFFER": "50"}}',
        '{"host": HOST, "variables": {"LD_PRELOAD": "50", "MLX_MAX_OPS_PER_BUFFER": "$(rm)"}}',
        '{"host": HOST, "variables": ["MLX_MAX_OPS_PER_BUFFER"]}',
        '{"host": HOST, "variables": {"OPENBLAS_NUM_THREADS": "99999999999999999999999999"}}',
        '{"host": HOST, "variables": {"OPENBLAS_NUM_THREADS": "NINES"}}'.replace(
            "NINES", "9" * 5000
        ),
        '{"host": HOST, "variables": {"OPENBLAS_NUM_THREADS": "0"}}',
        '{"host": HOST, "variables": {"OPENBLAS_NUM_THREADS": "\u0662"}}',  # a digit, in Arabic
        "[" * 9000,
        pytest.param(" " * 10_000 + "{}", id="large"),
    ],
)
def test_a_file_that_is_damaged_or_of_another_machine_changes_nothing(
    cache_folder: Path, text: str
) -> None:
    cache_folder.mkdir()
    host = json.dumps(tuning.describe_host())
    (cache_folder / "tuning.json").write_text(text.replace("HOST", host))
    before = dict(os.environ)
    tuning.apply_settings()
    assert dict(os.environ) == before


def test_a_file_of_another_user_or_a_pipe_changes_nothing(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tune.save_outcome(compare([2.0, 2.1], [1.0, 1.1]))
    assert path is not None
    before = dict(os.environ)
    with monkeypatch.context() as patch:
        patch.setattr("mlx_smolvlm.files.check_owner", refuse_owner)
        tuning.apply_settings()
    assert dict(os.environ) == before
    path.unlink()
    os.mkfifo(path)
    tuning.apply_settings()  # would wait for a writer
    assert dict(os.environ) == before


def refuse_owner(status: os.stat_result, path: object) -> None:
    raise PermissionError(1, "Owned by another user", str(path))


def test_the_threads_of_openblas_are_set_though_it_is_loaded(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_folder.mkdir()
    text = tuning.format_settings({"OPENBLAS_NUM_THREADS": "1"}, {})
    (cache_folder / "tuning.json").write_text(text)
    counts: list[int] = []
    monkeypatch.setattr("mlx_smolvlm.runtime.set_openblas_threads", counts.append)
    monkeypatch.setattr(os, "environ", {**os.environ})
    tuning.apply_settings()
    assert counts == [1]


def test_settings_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "count_cores", lambda: 6)
    threads = [setting.get("OPENBLAS_NUM_THREADS") for setting in tune.list_settings(False)]
    assert threads == [None, "1", "2", "4", "6"]
    first, *others = tune.list_settings(True)
    assert first == {}
    assert all(set(one) == set(tuning.VARIABLES[:2]) for one in others)


def test_a_setting_reaches_the_process_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_smolvlm.convert.hub import resolve

    launches: list[Launch] = []

    class FakeProgram:
        def __init__(self, launch: Launch) -> None:
            launches.append(launch)

        def __enter__(self) -> "FakeProgram":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def ask(self, **request: object) -> dict[str, float]:
            return {"seconds": 1.0, "prefill_s": 0.5, "decode_s": 0.25}

    monkeypatch.setattr(tune, "Program", FakeProgram)
    tuning.applied["OPENBLAS_NUM_THREADS"] = "2"
    assert tune.make_measure(resolve("demo"))(TWO) == 1.75
    assert launches[0].env == {"OPENBLAS_NUM_THREADS": None, **TWO}


def test_doctor_says_which_variables_were_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "50")
    monkeypatch.setenv("MLX_MAX_MB_PER_BUFFER", "40")
    tuning.applied["MLX_MAX_OPS_PER_BUFFER"] = "50"
    (text,) = (one.text for one in check_environment() if one.name == "environment")
    assert "MLX_MAX_OPS_PER_BUFFER=50 (by bench --tune)" in text
    assert "MLX_MAX_MB_PER_BUFFER=40" in text
    assert "MLX_MAX_MB_PER_BUFFER=40 (by" not in text
