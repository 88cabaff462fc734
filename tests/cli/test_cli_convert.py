"""`convert` and `models`, as processes on small Hugging Face folders."""

import contextlib
import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers import command, hf_folder
from tests.helpers.command import COMMAND


def run(*arguments: str | Path, cwd: Path, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """The finished command, with a cache in `cwd`."""
    changes = {"MLX_SMOLVLM_CACHE": str(cwd / "cache"), "HF_HOME": str(cwd / "hf")}
    return command.run_text(*arguments, cwd=cwd, env=changes, prelude=prelude)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder: Path = hf_folder.make(tmp_path / "Some-VLM")
    return folder


def test_convert_names_the_folder_and_says_so(source: Path, tmp_path: Path) -> None:
    arguments = ("convert", source, "--bits", "4", "--group-size", "32")
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1  # no bar: stderr is no terminal
    assert lines[0].startswith("wrote Some-VLM-mlx-4bit: 4 bits in the decoder, ")
    config = json.loads((tmp_path / "Some-VLM-mlx-4bit" / "config.json").read_text())
    assert config["quantization"]["text"]["bits"] == 4
    assert config["quantization"]["text"]["group_size"] == 32
    assert config["quantization"]["vision"]["bits"] == 8

    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert again.stderr.count("\n") == 1
    assert "already holds a checkpoint; use --force to replace it" in again.stderr
    assert run(*arguments, "--force", cwd=tmp_path).returncode == 0


def test_chat_says_that_it_converts(source: Path, tmp_path: Path) -> None:
    # This folder's template has no place for a question, which only shows after converting.
    result = run("chat", "Hi", "-m", source, cwd=tmp_path)
    first, second = result.stderr.splitlines()
    assert first == f"converting {source}, once"
    assert second.startswith("error: the chat template")
    assert result.returncode == 1
    assert run("chat", "Hi", "-m", source, cwd=tmp_path).stderr.splitlines() == [second]


LITTLE_MEMORY = """
import mlx_smolvlm.generate.memory_plan as plan
plan.measure_machine = lambda: 2**27
"""


def test_chat_converts_to_fewer_bits_where_memory_is_short_and_says_why(tmp_path: Path) -> None:
    source = hf_folder.make_askable(tmp_path / "Some-VLM")
    arguments = ("chat", "Hi", "-m", source, "--max-tokens", "2")
    first, again, floats = (
        run(*arguments, *more, cwd=tmp_path, prelude=LITTLE_MEMORY)
        for more in ((), (), ("--bits", "16"))
    )
    assert [result.returncode for result in (first, again, floats)] == [0, 0, 0]
    warning, announcement = first.stderr.splitlines()
    assert warning.startswith("warning: Some-VLM is converted to 4 bits, since an answer at 16 ")
    assert warning.endswith("of this machine's 0.1 GB; bits=16 (--bits 16) keeps full precision")
    assert announcement == f"converting {source}, once"
    assert again.stderr == ""
    assert again.stdout == first.stdout
    assert floats.stderr.splitlines() == [announcement]


def test_the_demo_and_any_float_checkpoint_of_ours_is_a_source(tmp_path: Path) -> None:
    first = run("convert", "demo", "--bits", "8", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stderr.startswith("wrote demo-mlx-8bit: 8 bits in the decoder, ")
    again = run("convert", "demo-mlx-8bit", "worse", "--bits", "4", cwd=tmp_path)
    assert again.returncode == 1
    assert "already a quantized mlx-smolvlm checkpoint" in again.stderr
    assert not (tmp_path / "worse").exists()


def test_convert_shows_a_bar_on_a_terminal(source: Path, tmp_path: Path) -> None:
    outer, inner = pty.openpty()
    result = subprocess.run(
        [*COMMAND, "convert", source, "out"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=inner,
        timeout=60,
        cwd=tmp_path,
    )
    os.close(inner)
    shown = os.read(outer, 65536).decode()
    os.close(outer)
    assert (result.returncode, result.stdout) == (0, b"")
    bar, wrote = shown[: shown.index("wrote")], shown[shown.index("wrote") :]
    assert "[" + "#" * 24 + "]" in bar
    assert bar.endswith("\r\x1b[K")  # removed again
    assert wrote.startswith("wrote out: float32, ")


def test_convert_passes_every_precision(source: Path, tmp_path: Path) -> None:
    options = ("--bits", "8", "--vision-bits", "16", "--connector-bits", "4")
    more = ("--embeddings-bits", "6", "--group-size", "32", "--dtype", "float16")
    result = run("convert", source, "out", *options, *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    parts = config["quantization"]
    bits = {p: parts[p] and parts[p]["bits"] for p in ("text", "vision", "connector", "embeddings")}
    assert bits == {"text": 8, "vision": None, "connector": 4, "embeddings": 6}
    assert config["dtype"] == "float16"


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("Some-VLM", "--bits", "7"), 2, "7 bits"),
        (("Some-VLM", "--mode", "int4"), 2, "int4"),
        (("Some-VLM", "--group-size", "48"), 2, "48"),
        (("Some-VLM", "--dtype", "double"), 2, "double"),
        (("no-such-folder",), 1, "no-such-folder"),
        (
            ("smolvlm-256m",),
            1,
            "SmolVLM-256M-Instruct: it is not in the local cache, and offline was asked for",
        ),
        (("Some-VLM", "file"), 1, "file"),
    ],
)
def test_convert_refuses(
    arguments: tuple[str, ...], status: int, word: str, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = run("convert", *arguments, "--offline", cwd=tmp_path)
    assert result.returncode == status, result.stderr
    assert word in result.stderr
    assert "Traceback" not in result.stderr
    assert (status == 2) or result.stderr.count("\n") == 1
    assert not (tmp_path / "Some-VLM-mlx").exists()


SMALL_MAC = """
import mlx_smolvlm.generate.memory_plan as plan
plan.find_machine = lambda: plan.Machine("mlx-gpu", 2, 8 * 2**30)
"""


def test_models_says_what_each_takes_and_what_fits(tmp_path: Path) -> None:
    result = run("models", cwd=tmp_path, prelude=SMALL_MAC)
    assert (result.returncode, result.stderr) == (0, "")
    heading, demo, *rows = result.stdout.splitlines()
    assert heading.split("  ")[0] == "model"
    assert re.match(r"demo +bundled +0\.01 GB +0\.\d\d GB +16 bits  drawn shapes, ", demo)
    assert [re.split("  +", row) for row in rows if row.startswith("smolvlm2-")] == [
        ["smolvlm2-256m", "1.0 GB", "1.0, 0.29, 0.24 GB", "0.84, 0.60, 0.55 GB", "16 bits",
         "photographs, short clips"],
        ["smolvlm2-500m", "2.0 GB", "2.0, 0.58, 0.42 GB", "1.3, 0.87, 0.71 GB", "16 bits",
         "photographs, print, clips"],
        ["smolvlm2-2.2b", "9.0 GB", "9.0, 2.5, 1.7 GB", "5.1, 3.0, 2.2 GB", "8 bits",
         "photographs, documents, videos"],
    ]  # fmt: skip
    assert rows[-3].startswith("Estimated. ")
    assert "at most half of\nthe 8.6 GB of this machine, " in result.stdout
    values = json.loads(run("models", "--json", cwd=tmp_path, prelude=SMALL_MAC).stdout)
    assert values["machine"] == {"backend": "mlx-gpu", "item_bytes": 2, "memory": 8 * 2**30}
    by_alias = {one["alias"]: one for one in values["models"]}
    assert [alias for alias in by_alias if alias != "demo"] == list(values["aliases"])
    large = by_alias["smolvlm2-2.2b"]
    assert (large["model"], large["fits_bits"]) == (values["aliases"]["smolvlm2-2.2b"], 8)
    assert large["download_bytes"] == 4 * 2_246_784_880
    assert list(large["answer_bytes"]) == list(large["disk_bytes"]) == ["16", "8", "4"]


def test_models(source: Path, tmp_path: Path) -> None:
    empty = run("models", cwd=tmp_path)
    assert empty.returncode == 0
    assert "converted" not in empty.stdout.partition("Estimated.")[0]
    assert "in " + str(tmp_path) not in empty.stdout

    cached = tmp_path / "cache" / "owner--name" / "abc-source-v1"
    assert run("convert", source, cached, "--bits", "16", cwd=tmp_path).returncode == 0
    values = json.loads(run("models", "--json", cwd=tmp_path).stdout)
    assert values["aliases"]["smoldocling"] == "docling-project/SmolDocling-256M-preview"
    (model,) = values["converted"]
    assert (model["path"], model["bits"]) == (str(cached), 16)
    assert model["nbytes"] == sum(file.stat().st_size for file in cached.iterdir())
    assert model["source"] == "Some-VLM"
    shown = run("models", cwd=tmp_path).stdout
    assert f"in {tmp_path / 'cache'}\n" in shown
    assert "owner/name/abc-source-v1  32    32      32         32 " in shown


def on_terminal(answer: bytes, *arguments: str | Path, cwd: Path) -> tuple[int, str]:
    """Exit status and output of the command on a terminal where `answer` is typed."""
    outer, inner = pty.openpty()
    changes = {"MLX_SMOLVLM_CACHE": str(cwd / "cache"), "HF_HOME": str(cwd / "hf")}
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        cwd=cwd,
        env={**os.environ, **changes},
    )
    os.close(inner)
    os.write(outer, answer)
    shown = b""
    with contextlib.suppress(OSError):  # Linux says EIO at the end
        while data := os.read(outer, 65536):
            shown += data
    os.close(outer)
    return process.wait(timeout=60), shown.decode()


def test_models_rm_asks_and_removes(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cached = cache / "owner--name" / "abc-source-v1"
    left = cache / "owner--name" / ".abc.1234.partial"
    assert run("convert", source, cached, cwd=tmp_path).returncode == 0
    left.mkdir()

    refused = run("models", "rm", "owner/name", cwd=tmp_path)
    assert (refused.returncode, cached.exists()) == (2, True)
    assert "--yes" in refused.stderr
    for answer in (b"n\n", b"\n", b"yesterday\n"):
        status, shown = on_terminal(answer, "models", "rm", "owner/name", cwd=tmp_path)
        assert (status, cached.exists(), left.exists()) == (1, True, True)
        assert "owner/name/.abc.1234.partial" in shown
        assert "remove 2 checkpoints, 0.8 MB? [y/N]" in shown
        assert "nothing removed" in shown

    unknown = run("models", "rm", "owner/name", "owner/other", "--yes", cwd=tmp_path)
    assert (unknown.returncode, cached.exists()) == (1, True)  # all or none
    assert unknown.stderr.startswith("error: there is no checkpoint 'owner/other' in the cache")
    for name in (str(source), str(cache), "../cache", "demo"):
        assert run("models", "rm", name, "-y", cwd=tmp_path).returncode == 1

    status, _ = on_terminal(b"y\n", "models", "rm", str(left), cwd=tmp_path)
    assert (status, cached.exists(), left.exists()) == (0, True, False)
    removed = run("models", "rm", "owner/name", "--yes", cwd=tmp_path)
    assert (removed.returncode, removed.stdout) == (0, "")
    assert removed.stderr == "removed owner/name/abc-source-v1: 0.8 MB\n"
    assert list(cache.iterdir()) == []
    assert source.exists()
