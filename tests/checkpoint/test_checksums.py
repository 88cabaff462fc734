"""Each file that a conversion writes has its SHA-256 beside it, in the form of coreutils."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_smolvlm.checkpoint import writer
from mlx_smolvlm.checkpoint.load import load_model
from mlx_smolvlm.checkpoint.provenance import check_sums, format_sums, read_sums
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import hf_folder as hf


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A checkpoint in several files."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 150_000)
    return convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out", ConvertOptions(bits=8))


def test_every_file_is_listed_with_its_sum(folder):
    sums = read_sums(folder)
    assert set(sums) | {"SHA256SUMS"} == {path.name for path in folder.iterdir()}
    assert len([name for name in sums if name.endswith(".safetensors")]) > 1
    for name, value in sums.items():
        assert value == hashlib.sha256((folder / name).read_bytes()).hexdigest(), name
    assert all(problem is None for _, problem in check_sums(folder))
    assert [name for name, _ in check_sums(folder)] == sorted(sums)


def test_coreutils_agree(folder):
    program = ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "-a", "256"]

    def check() -> int:
        command = [*program, "-c", "SHA256SUMS"]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode

    assert check() == 0
    (folder / "config.json").write_text("{}")
    assert check() == 1


def test_nothing_is_read_again_to_be_hashed(tmp_path, monkeypatch):
    opened = []
    plain_open, system_open = Path.open, os.open

    def watched(path, mode="r", *args, **kwargs):
        if "w" not in mode and "x" not in mode:
            opened.append(path)
        return plain_open(path, mode, *args, **kwargs)

    def watched_by_the_system(path, flags, *args, **kwargs):
        if flags & os.O_NONBLOCK:  # files.open_file; what is only synced is opened without
            opened.append(Path(path))
        return system_open(path, flags, *args, **kwargs)

    source = hf.make(tmp_path / "s")
    monkeypatch.setattr(Path, "open", watched)
    monkeypatch.setattr(os, "open", watched_by_the_system)
    convert_checkpoint(source, tmp_path / "out")
    assert source / "tokenizer.json" in opened
    assert not [path for path in opened if not path.is_relative_to(source)]


def test_a_changed_byte_a_lost_file_and_a_stranger_are_named(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    data = bytearray(first.read_bytes())
    data[-1] ^= 1
    first.write_bytes(data)
    load_model(folder)  # the header is whole
    second.rename(folder / "stranger.safetensors")
    (folder / "notes.txt").write_text("a user's own")
    problems = {name: problem for name, problem in check_sums(folder) if problem}
    assert problems == {
        first.name: "differs from its sum in SHA256SUMS",
        second.name: "is missing",
        "stranger.safetensors": "is not listed in SHA256SUMS",
    }


def test_a_folder_without_sums_loads_and_states_none(folder):
    (folder / "SHA256SUMS").unlink()
    (folder / "origin.json").unlink()
    assert read_sums(folder) is None
    assert list(check_sums(folder)) == []
    load_model(folder)


@pytest.mark.parametrize(
    "text",
    [
        "nonsense\n",
        f"{'a' * 64}  ../config.json\n",
        f"{'a' * 64}  /etc/passwd\n",
        f"{'a' * 63}  config.json\n",
        f"{'a' * 64}  \n",
        "\xff",
    ],
)
def test_a_damaged_list_is_named(folder, text):
    (folder / "SHA256SUMS").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        read_sums(folder)


def test_sums_read_back():
    sums = {"b": "1" * 64, "a file": "2" * 64}
    assert format_sums(sums) == f"{'2' * 64}  a file\n{'1' * 64}  b\n"


def test_the_origin_is_written_down(tmp_path):
    source = hf.make(tmp_path / "s")
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nlicense_link: https://x.example/l\n"
        "language: [en, fr]\nbase_model:\n- owner/base\n---\n# s\n"
    )
    out = convert_checkpoint(source, tmp_path / "out")
    values = json.loads((out / "origin.json").read_text())
    assert values.pop("converter").startswith("mlx-smolvlm ")
    assert values == {
        "source": "s",
        "revision": None,
        "base_model": "owner/base",
        "license": "other",
        "license_name": "mine",
        "license_link": "https://x.example/l",
        "languages": ["en", "fr"],
    }


@pytest.mark.parametrize(
    "card",
    [
        "no front matter",
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: {a: 1}\nlanguage: 5\nbase_model: ../../etc\n---\n",
        '---\nlicense: "mit\\ntags: [x]"\n---\n',
        "---\nlicense: !!python/object/apply:os.system ['true']\n---\n",
        "---\nlicense: " + "x" * 2000 + "\n---\n",
        "\xff\xfe",
    ],
)
def test_a_card_that_cannot_be_used_says_nothing(tmp_path, card):
    source = hf.make(tmp_path / "s")
    (source / "README.md").write_bytes(card.encode("latin-1"))
    out = convert_checkpoint(source, tmp_path / "out")
    values = json.loads((out / "origin.json").read_text())
    assert (values["license"], values["base_model"], values["languages"]) == (None, None, [])
