"""Every file that is written: synced, then renamed into place, under a name nobody can guess."""

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from PIL import Image

from mlx_smolvlm import CacheOptions, Progress, Sampling, SmolVLM, load
from mlx_smolvlm.checkpoint.load import load_model, read_config
from mlx_smolvlm.checkpoint.lora import save_adapter
from mlx_smolvlm.cli import compare as cli_compare
from mlx_smolvlm.cli.media import FrameWriter
from mlx_smolvlm.cli.terminal import editor
from mlx_smolvlm.convert.compare import measure
from mlx_smolvlm.convert.compare.measure import CompareOptions, compare
from mlx_smolvlm.convert.compare.report import Comparison
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.files import write_file
from mlx_smolvlm.media.video import Frame
from mlx_smolvlm.reuse.disk import OWN_FOLDER
from mlx_smolvlm.train.finetune import lock_folder, rewind
from mlx_smolvlm.train.loop import Loop, LoopOptions, Schedule
from mlx_smolvlm.train.parameters import start_adapter, write_model
from mlx_smolvlm.train.settings import LoraSettings

SHORT = Sampling(max_tokens=2)
Writer = Callable[[Path, Path], list[str]]


@pytest.fixture(scope="module")
def found(tiny_folder: Path) -> Comparison:
    pictures = (("one", Image.new("RGB", (32, 32))),)
    options = CompareOptions(texts=("A text.",), pictures=pictures, max_tokens=1)
    return compare(tiny_folder, tiny_folder, options)


def write_cache(model: Path, out: Path) -> list[str]:
    """Keys and values of a prompt, the digest of the checkpoint, the tag."""
    vlm = load(model, cache=CacheOptions(folder=out))
    vlm.ask("What can be seen here, and where is it?", sampling=SHORT)
    names = os.listdir(out / OWN_FOLDER)
    assert len(names) == 3
    return [f"{OWN_FOLDER}/{name}" for name in names]


def write_conversation(model: Path, out: Path) -> list[str]:
    """A saved conversation."""
    chat = load(model).chat(sampling=SHORT)
    chat.ask("What?")
    chat.save(out / "chat")
    return ["chat"]


def write_adapter(model: Path, out: Path) -> list[str]:
    """What `train` makes by LoRA."""
    vlm = load(model)
    config = start_adapter(vlm.model, ("text",), LoraSettings(rank=2), "a test")
    save_adapter(vlm.model, out, config)
    return ["adapter_config.json", "adapters.safetensors"]


def write_state(model: Path, out: Path) -> list[str]:
    """The state and the log of a training."""
    adam = optim.AdamW(0.1)
    loop = Loop(nn.Linear(2, 1), lambda *_: None, adam, lambda _: None, LoopOptions(Schedule(1, 1)))  # type: ignore[arg-type,return-value]
    loop.save(out / "state.safetensors", {})
    rewind(out / "log.jsonl", 0)
    return ["state.safetensors", "log.jsonl"]


def write_frames(model: Path, out: Path) -> list[str]:
    """The frames that the model sees."""
    writer = FrameWriter(out, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    frame = Frame(0, 0.0, Image.new("RGB", (8, 8)))
    writer.write(Progress(1, 0, 1, frame, np.zeros((8, 8, 3)), "clip"))
    return ["frames.jsonl", "frame-0001-00m00s.png"]


def write_history(model: Path, out: Path) -> list[str]:
    """Typed lines, once they are too many."""
    (out / "history").write_bytes(b"\n# 1\n+line\n" * 200_000)
    editor._shorten_history(out / "history")
    return ["history"]


def write_checkpoint(model: Path, out: Path) -> list[str]:
    """A converted or trained checkpoint."""
    vlm = load(model)
    write_model(vlm.model, model, dataclasses.replace(vlm.config, source="x"), out / "model")
    return [f"model/{path.name}" for path in (out / "model").iterdir()]


def write_comparison(model: Path, out: Path) -> list[str]:
    """`compare --json FILE --plot FILE`."""
    given: dict[str, Any] = {
        "inputs": cli_compare.ComparisonInputs(),
        "questions": (),
        "max_tokens": 1,
    }
    given |= {"reference": "a", "other": "b", "detail": "low", "offline": True}
    paths = {"json": out / "found.json", "plot": out / "found.png"}
    cli_compare.print_comparison(cli_compare.CompareRequest(**given, **paths))
    return ["found.json", "found.png"]


def write_verification(model: Path, out: Path) -> list[str]:
    """`convert --verify`."""
    shutil.copytree(model, out, dirs_exist_ok=True)
    measure.verify_conversion(model, out)
    return ["verify.json", "verify.png"]


WRITERS = [
    write_cache,
    write_conversation,
    write_adapter,
    write_state,
    write_frames,
    write_history,
    write_checkpoint,
    write_comparison,
    write_verification,
]


class Disk:
    """What is synced and renamed, by inode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: set[int] = set()
        self.placed: set[int] = set()
        self.names: list[str] = []
        self.folders: set[int] = set()  # in which something was renamed, and which are not synced
        self._fsync, self._replace, self._rename = os.fsync, os.replace, os.rename
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "replace", lambda a, b: self.move(self._replace, a, b))
        monkeypatch.setattr(os, "rename", lambda a, b: self.move(self._rename, a, b))

    def fsync(self, descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        self.synced.add(inode)
        self.folders.discard(inode)
        self._fsync(descriptor)

    def move(self, how: Callable[[Any, Any], None], source: Path, target: Path) -> None:
        source, target = Path(source), Path(target)
        inside = list(source.iterdir()) if source.is_dir() else []
        inodes = {path.stat().st_ino for path in (source, *inside)}
        if not re.fullmatch(r"part-\d+\.safetensors", source.name):  # within a hidden folder
            assert inodes <= self.synced, f"{source.name} is renamed before it is on the disk"
            self.names.append(source.name)
            self.folders.add(target.parent.stat().st_ino)
        how(source, target)
        self.placed |= inodes


@pytest.fixture
def out(tmp_path: Path, found: Comparison, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write into; nothing is measured."""
    monkeypatch.setattr("mlx_smolvlm.convert.compare.measure.compare", lambda *_, **__: found)
    monkeypatch.setattr(measure, "compare_checkpoints", lambda *_: found)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("write", WRITERS)
def test_files_are_synced_and_then_renamed(
    write: Writer, tiny_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    names = write(tiny_folder, out)
    for name in names:
        assert (out / name).stat().st_ino in disk.placed, f"{name} is not renamed into place"
    assert not disk.folders, "a folder in which something was renamed is not synced"
    for name in disk.names:
        assert re.fullmatch(r"\.([0-9a-f]{16}\.part(\.\w+)?|model\.[0-9a-f]{8}\.partial)", name)
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize(
    "write", [write_cache, write_adapter, write_state, write_frames, write_verification]
)
def test_a_link_under_a_name_of_ours_is_not_followed(
    write: Writer, tiny_folder: Path, out: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    own = out / OWN_FOLDER
    for name in write(tiny_folder, out):
        if name.endswith("CACHEDIR.TAG"):  # its content decides what the folder is
            continue
        (out / name).unlink()
        (out / name).symlink_to(mine)
    write(tiny_folder, out)
    assert mine.read_text() == "mine"
    links = [path for path in out.rglob("*") if path.is_symlink() and path.parent != own]
    assert not links


def test_a_link_that_the_user_names_stays(tiny_folder: Path, out: Path) -> None:
    (out / "chat").symlink_to("real")
    write_conversation(tiny_folder, out)
    assert (out / "chat").is_symlink()
    load(tiny_folder).chat().load(out / "real")


@pytest.mark.parametrize("name", ["/dev/null", "pipe"])
def test_a_conversation_replaces_no_device(
    tiny: SmolVLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(os, "replace", None)  # it must not come to that
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        tiny.chat().save(tmp_path / name)


def test_comparisons_go_into_devices(tiny_folder: Path, out: Path) -> None:
    for name in ("found.json", "found.png"):
        (out / name).symlink_to("/dev/null")
    write_comparison(tiny_folder, out)
    assert all((out / name).is_symlink() for name in ("found.json", "found.png"))
    assert not Path("/dev/null").is_file()


def test_results_go_into_regular_files(tmp_path: Path) -> None:
    from mlx_smolvlm.errors import DatasetError
    from mlx_smolvlm.train.evaluate.report import ResultsFile

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(DatasetError, match=r"Not a regular file|Is a directory"):
            ResultsFile(path, {}, restart=False)


def test_a_training_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "adapter"):
        folder.mkdir(exist_ok=True)
        (folder / f".{'ab' * 8}.part.safetensors").write_text("half")
        (folder / ".mine").write_text("mine")
    os.close(lock_folder(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".mine", "adapter"]
    assert os.listdir(tmp_path / "adapter") == [".mine"]


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_smolvlm.checkpoint.headers import save_tensors

    def fail(*_: object) -> None:
        raise RuntimeError("[write] Unable to write\n4 bytes")

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(OSError, match="Unable to write 4 bytes"):
        save_tensors(tmp_path / "a", {}, {})
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_arrays_that_do_not_fit_name_the_reason_and_the_file(
    tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    from mlx_smolvlm.checkpoint.headers import save_tensors

    (tmp_path / "a").write_text("old")
    file_limit(100_000)
    with pytest.raises(OSError, match="File too large") as caught:
        save_tensors(tmp_path / "a", {"one": mx.zeros((50_000,))}, {})
    assert caught.value.filename == str(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_texts_that_do_not_fit_name_the_file(
    tmp_path: Path, file_limit: Callable[[int], None]
) -> None:
    file_limit(1000)
    with pytest.raises(OSError, match="File too large") as caught:
        write_file(tmp_path / "a", "x" * 2000)
    assert caught.value.filename == str(tmp_path / "a")


def test_a_trained_model_that_does_not_fit_is_one_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("[write] Unable to write 4 bytes")

    model, config = load_model(tiny_folder), read_config(tiny_folder)
    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*Unable to write 4 bytes"):
        write_model(model, tiny_folder, config, tmp_path / "model")
    assert os.listdir(tmp_path) == []
