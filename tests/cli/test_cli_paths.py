"""A home directory that nobody has, in every place that takes a path: one line, no traceback."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mlx_smolvlm.cli.app import main

ROOT = Path(__file__).parents[2]
NOBODY = "~no-such-user/x"
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process, in an empty folder; gives exit status and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` changes it

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mlx-smolvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        code = left.value.code
        return (code if isinstance(code, int) else 0), capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (1, "chat Hi -m ~"),
        (1, "chat Hi -m TINY --cache-dir ~"),
        (1, "chat Hi -m TINY --adapter ~"),
        (1, "chat Hi -m TINY -i ~"),
        (1, "chat Hi -m TINY -v ~"),
        (1, "chat Hi -m TINY -v GIF --frames ~"),
        (2, "chat Hi -m TINY --schema ~"),
        (1, "choose Hi -c a -c b -m ~"),
        (1, "convert ~"),
        (1, "convert ~ out"),
        (1, "convert TINY ~ --bits 4"),
        (1, "convert TINY ~ --bits 4 --gptq"),
        (1, "convert TINY out --recipe ~"),
        (1, "convert TINY out --bits 4 --group-size 32 --gptq --calibration ~"),
        (2, "convert TINY out --verify-texts ~"),
        (2, "convert TINY out --verify-pictures ~"),
        (1, "eval ~ DATA"),
        (1, "eval TINY ~"),
        (1, "eval TINY DATA --results ~"),
        (1, "train ~"),
        (1, "train TOML --out ~"),
        (1, "compare ~ TINY"),
        (1, "compare TINY ~"),
        (1, "compare TINY TINY --data ~"),
        (2, "compare TINY TINY --texts ~"),
        (2, "compare TINY TINY --pictures ~"),
        (2, "compare TINY TINY --json ~"),
        (2, "compare TINY TINY --plot ~"),
        (1, "doctor ~"),
        (1, "models rm ~"),
    ],
)
def test_an_unknown_home_is_one_line(
    run: Run, tiny_folder: Path, tmp_path: Path, status: int, arguments: str
) -> None:
    data, settings, gif = tmp_path / "d.jsonl", tmp_path / "t.toml", tmp_path / "a.gif"
    data.write_text('{"question": "What?", "answer": "It."}\n')
    settings.write_text(f'model = "{tiny_folder}"\nsteps = 1\n[[data]]\npath = "{data}"\n')
    Image.new("RGB", (8, 8)).save(gif, save_all=True, append_images=[Image.new("RGB", (8, 8), 9)])
    places = {"~": NOBODY, "TINY": tiny_folder, "DATA": data, "TOML": settings, "GIF": gif}
    before = sorted(os.listdir(tmp_path))
    found, error = run(*(places.get(word, word) for word in arguments.split()))
    lines = [line for line in error.splitlines() if line.lower().startswith("error")]
    assert (found, len(lines)) == (status, 1), error
    assert NOBODY in error
    assert "Traceback" not in error
    assert sorted({*os.listdir(tmp_path)} - {"cache"}) == before


def test_an_unknown_home_of_the_cache(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_SMOLVLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv("MLX_SMOLVLM_CACHE", raising=False)
        monkeypatch.setenv(name, NOBODY)
        status, error = run("models")
        assert (status, error.count("\n")) == (1, 1)
        assert "set MLX_SMOLVLM_CACHE to another folder" in error


@pytest.mark.parametrize("key", ["model", "out", "data", "valid"])
def test_an_unknown_home_in_the_settings_of_a_training(
    run: Run, tiny_folder: Path, tmp_path: Path, key: str
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "What?", "answer": "It."}\n')
    values = {"model": str(tiny_folder), "out": "out", "data": str(data), "valid": str(data)}
    values[key] = NOBODY
    rest = [f'{name} = "{values[name]}"' for name in ("model", "out", "valid")]
    lines = [*rest, "steps = 1", "[[data]]", f'path = "{values["data"]}"']
    (tmp_path / "t.toml").write_text("\n".join(lines))
    status, error = run("train", "t.toml")
    assert (status, error.count("\n")) == (1, 1), error
    assert NOBODY in error


def test_a_medium_of_an_unknown_home_in_a_dataset(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    row = f'{{"question": "What?", "answer": "It.", "image": "{NOBODY}"}}\n'
    (tmp_path / "d.jsonl").write_text(row)
    status, error = run("eval", tiny_folder, "d.jsonl")
    assert (status, error.count("\n")) == (1, 1)
    assert "d.jsonl:1: " in error
    assert NOBODY in error


def test_only_one_place_expands_home_directories() -> None:
    for folder in ("mlx_smolvlm", "bench", "convert", "cli", "train"):
        for path in (ROOT / folder).glob("*.py"):
            if path != ROOT / "mlx_smolvlm" / "files.py":
                assert "expanduser" not in path.read_text(encoding="utf-8"), path
