"""A conversion that fails or dies at any point leaves nothing that loads and is not whole.

Every call that changes the disk is a point. At each of them, in turn, the disk refuses; or
the folder is copied as it is there, which is what a process killed at that moment leaves.
"""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_smolvlm.checkpoint import writer
from mlx_smolvlm.checkpoint.load import load_model, read_config
from mlx_smolvlm.checkpoint.provenance import check_sums
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import hf_folder as hf

POINTS = (
    *((Path, name) for name in ("mkdir", "rename", "write_text")),
    *((writer.HashedFile, name) for name in ("write", "hexdigest")),
    (writer.FolderWriter, "open"),
    (os, "fsync"),
    (shutil, "rmtree"),  # last: it is called to ignore errors, so it only can be died at
)


class Points:
    """Counts the points that a conversion passes, and calls `act` at each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passed = 0
        self.act: Callable[[], None] = lambda: None
        self.at = ""
        for owner, name in POINTS:
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, function: Callable) -> Callable:
        def call(*args, **kwargs):
            self.passed += 1
            self.at = function.__name__
            self.act()
            return function(*args, **kwargs)

        return call


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A checkpoint whose conversion has three files of weights."""
    monkeypatch.setattr(writer, "SHARD_BYTES", 150_000)
    return hf.make(tmp_path / "s")


@pytest.fixture
def points(source, monkeypatch) -> Points:
    return Points(monkeypatch)


def assert_whole(folder: Path) -> None:
    load_model(folder)
    problems = list(check_sums(folder))
    assert len(problems) >= 5
    assert all(problem is None for _, problem in problems), problems


@pytest.mark.parametrize("replacing", [False, True])
def test_a_full_disk_at_any_point_leaves_what_was_there(tmp_path, source, points, replacing):
    dest = tmp_path / "made" / "out"
    if replacing:
        convert_checkpoint(source, dest, ConvertOptions(bits=8))
    refused, last = 0, 200
    for n in range(1, last):
        points.passed = 0

        def act(n: int = n) -> None:
            if points.passed == n and points.at != "rmtree":
                raise OSError(errno.ENOSPC, "No space left on device")

        points.act = act
        said = None
        try:
            convert_checkpoint(source, dest, force=replacing)
        except CheckpointError as error:
            said = str(error)
        if said is not None:
            assert "No space left on device; make room" in said
            refused += 1
            names = os.listdir(dest.parent) if dest.parent.exists() else []
            assert names == (["out"] if replacing else [])
            assert not replacing or read_config(dest).quantization.text.bits == 8
        else:
            points.act = lambda: None
            assert_whole(dest)
            assert read_config(dest).quantization.text is None
            if points.passed < n:
                break
            shutil.rmtree(dest)  # it failed to tidy up, or to sync the parent
            if replacing:
                convert_checkpoint(source, dest, ConvertOptions(bits=8))
    assert points.passed < n < last
    assert refused > 50


@pytest.mark.parametrize("replacing", [False, True])
def test_death_at_any_point_leaves_nothing_half(tmp_path, source, points, replacing):
    work = tmp_path / "work"
    work.mkdir()
    dest = work / "out"
    if replacing:
        convert_checkpoint(source, dest, ConvertOptions(bits=8))
    left: list[Path] = []
    seen = []

    def act() -> None:
        state = {path: path.stat().st_size for path in work.rglob("*")}
        if state not in seen:  # else a death here leaves what one before it leaves
            seen.append(state)
            left.append(tmp_path / f"left-{len(left)}")
            shutil.copytree(work, left[-1])

    points.passed, points.act = 0, act
    convert_checkpoint(source, dest, force=replacing)
    points.act = lambda: None
    assert points.passed > 50
    assert len(left) > 15
    hidden = 0
    for folder in left:
        out = folder / "out"
        hidden += len(list(folder.glob(".out.*.partial")))
        if out.exists():
            assert_whole(out)
        convert_checkpoint(source, out, force=True)
        assert_whole(out)
        assert os.listdir(folder) == ["out"]
        shutil.rmtree(folder)
    assert hidden > 15


def test_the_sums_are_written_last(source, points, tmp_path):
    seen = []

    def act() -> None:
        for partial in tmp_path.glob(".out.*.partial"):
            seen.append({path.name for path in partial.iterdir()})

    points.act = act
    convert_checkpoint(source, tmp_path / "out")
    final = {path.name for path in (tmp_path / "out").iterdir()}
    for names in seen:
        if "SHA256SUMS" in names:
            assert names == final
    assert final in seen


LIMITED = """
    import resource, sys
    from mlx_smolvlm.convert.run import convert_checkpoint
    from mlx_smolvlm.errors import CheckpointError
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        convert_checkpoint(sys.argv[1], sys.argv[2])
    except CheckpointError as error:
        print(error)
"""


def test_a_refusal_of_the_kernel_is_named(tmp_path):
    source = hf.make(tmp_path / "s")
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), source, tmp_path / "out"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said.stdout == f"{tmp_path / 'out'} cannot be written: File too large\n", said.stderr
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_may_not_be_written_to_is_named(tmp_path, monkeypatch, number):
    source = hf.make(tmp_path / "s")

    def refuse(path, *_args, **_kwargs):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"choose a destination that you may write to"):
        convert_checkpoint(source, tmp_path / "out")


# A source that changes


def rewrite_weights(source: Path) -> None:
    hf.write_weights(source, {k: v + 1 for k, v in hf.weights(hf.settings()).items()})


def cut_weights(source: Path) -> None:
    os.truncate(source / "model.safetensors", 5000)


def reshape_weights(source: Path) -> None:
    """Another checkpoint's file, put in place of the one that was opened."""
    tensors = {name: mx.zeros((3,)) for name in hf.shapes(hf.settings())}
    (source / "new").mkdir()
    hf.write_weights(source / "new", tensors)
    (source / "new" / "model.safetensors").replace(source / "model.safetensors")
    (source / "new").rmdir()


CHANGES = {
    "weights": rewrite_weights,
    "cut": cut_weights,
    "other": reshape_weights,
    "gone": lambda source: (source / "model.safetensors").unlink(),
    "tokenizer": lambda source: (source / "tokenizer.json").write_text('{"added_tokens": []}'),
    "no tokenizer": lambda source: (source / "tokenizer.json").unlink(),
    "setting": lambda source: hf.write_json(source / "config.json", hf.settings()),
    "one more": lambda source: hf.write_json(source / "processor_config.json", {}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moment", ["before the first weight", "after some", "after the last"])
def test_a_source_that_changes_is_refused(tmp_path, monkeypatch, change, moment):
    source, dest = hf.make(tmp_path / "s"), tmp_path / "out"
    done_before = []

    def progress(done: int, total: int, _name: str) -> None:
        if moment == "after some" and not done_before and done > total / 2:
            CHANGES[change](source)
            done_before.append(done)
        if moment == "after the last" and done == total:
            CHANGES[change](source)

    if moment == "before the first weight":
        from mlx_smolvlm.convert import run

        check = run._check_space
        monkeypatch.setattr(run, "_check_space", lambda *a: (check(*a), CHANGES[change](source)))
    may_fail_first = change in ("cut", "gone", "no tokenizer")
    reasons = r"changed while it was read" + r"|cannot be|is missing" * may_fail_first
    with pytest.raises(CheckpointError, match=reasons):
        convert_checkpoint(source, dest, progress=progress)
    assert sorted(os.listdir(tmp_path)) == ["s"]


def test_a_source_that_only_gains_other_files_is_not(tmp_path):
    source = hf.make(tmp_path / "s")
    (source / "a.bin").symlink_to("nowhere")
    (source / "lost.json").symlink_to("nowhere")

    def progress(*_: object) -> None:
        (source / "notes.txt").write_text("x")

    assert_whole(convert_checkpoint(source, tmp_path / "out", progress=progress))


# Links


def test_a_linked_destination_is_filled_where_it_points(tmp_path):
    source, link = hf.make(tmp_path / "s"), tmp_path / "link"
    (tmp_path / "disk" / "real").mkdir(parents=True)
    link.symlink_to(tmp_path / "disk" / "real", target_is_directory=True)
    convert_checkpoint(source, link)
    assert link.is_symlink()
    assert_whole(tmp_path / "disk" / "real")
    convert_checkpoint(source, link, ConvertOptions(bits=4), force=True)
    assert read_config(tmp_path / "disk" / "real").quantization.text.bits == 4
    assert os.listdir(tmp_path / "disk") == ["real"]


def test_a_link_to_nowhere_is_no_destination(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_a_leftover_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / ".out.1234.partial").symlink_to(tmp_path / "mine", target_is_directory=True)
    convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
