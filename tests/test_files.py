"""Atomic writes, bounded reads, home directories."""

import os
import stat
from pathlib import Path

import pytest

from mlx_smolvlm import CheckpointError, files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_file(path, "old")
    path.chmod(0o600)
    with pytest.raises(UnicodeEncodeError), files.replace_file(path) as part:
        part.write_text("ne\ud800")
    assert path.read_text() == "old"
    files.write_file(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["a.json"]


def test_it_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), real_sync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (calls.append("rename"), real_replace(*a)))
    files.write_file(tmp_path / "a", "text")
    assert calls == ["sync", "rename", "sync"]  # the file, the rename, the folder


def test_the_name_of_the_temporary_file_cannot_be_guessed(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with files.replace_file(tmp_path / "a") as part:
            names.add(part.name)
    assert len(names) == 3
    assert not any(str(os.getpid()) in name for name in names)


def test_a_link_at_the_temporary_name_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)  # guessed after all
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".{'0' * 16}.part").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        files.write_file(tmp_path / "a", "text")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "a").exists()


def test_a_device_or_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match=r"regular file|directory"):
            files.write_file(target, "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "link").symlink_to("/dev/null")
    with pytest.raises(OSError, match="Not a regular file"):
        files.write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_a_file_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("source", ["/dev/zero", "pipe", "."])
def test_only_regular_files_are_read(tmp_path: Path, source: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"regular file|directory"):
        files.read_file(tmp_path / source, 100)


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert files.read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(OSError, match="Larger than 4 bytes"):
        files.read_file(tmp_path / "a", 4)


def test_an_unknown_home_is_an_os_error() -> None:
    assert files.expand_path("~/x") == Path.home() / "x"
    with pytest.raises(FileNotFoundError, match="No home directory"):
        files.expand_path("~no-such-user/x")


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_what_no_file_can_be_called_is_an_os_error(path: str) -> None:
    with pytest.raises(OSError, match="No file can have this name"):
        files.expand_path(path)
    with pytest.raises(CheckpointError, match="No file can have this name; give another path"):
        files.expand_path(path, CheckpointError)


def test_a_link_that_leads_out_of_an_own_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in ("link", "dangling"):
        (tmp_path / name).symlink_to("mine" if name == "link" else "none")
        files.write_file(tmp_path / name, "new", follow_links=False)
        assert not (tmp_path / name).is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "none").exists()


def test_the_permissions_of_a_new_file(tmp_path: Path) -> None:
    files.write_file(tmp_path / "a", "text", mode=0o600)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    files.write_file(tmp_path / "a", "text")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_what_a_killed_writer_leaves_goes_once_it_is_old(tmp_path: Path) -> None:
    writer = files.replace_file(tmp_path / "a", ".safetensors")
    part = writer.__enter__()  # and then it is killed
    for name in (".part", ".x.part", f".{'x' * 16}.part", f"{part.name}.mine.x", part.name[1:]):
        (tmp_path / name).write_text("of the user")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / f".{'ab' * 8}.part").symlink_to(tmp_path / "none")
    os.utime(tmp_path / f".{'ab' * 8}.part", (1, 1), follow_symlinks=False)
    before = sorted(os.listdir(tmp_path))
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before  # its writer may live
    os.utime(part, (1, 1))
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [name for name in before if name != part.name]
    files.remove_leftovers(tmp_path / "none")


def test_output_goes_into_devices_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_output(tmp_path / "pipe", "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    files.write_output("/dev/null", b"text")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    files.write_output(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    with pytest.raises(IsADirectoryError):
        files.write_output(tmp_path, "text")


def test_the_file_behind_stdout_is_not_renamed_over(tmp_path: Path) -> None:
    out, before = tmp_path / "out", os.dup(1)
    try:
        with out.open("ab") as file:
            os.dup2(file.fileno(), 1)
        os.write(1, b"answer\n")
        files.write_output("/dev/stdout", "json\n")
        os.write(1, b"more\n")
        with pytest.raises(OSError, match="Open as a standard stream"):
            files.write_file("/dev/stdout", "text")
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert out.read_text() == "answer\njson\nmore\n"
    assert os.listdir(tmp_path) == ["out"]


def test_only_regular_files_are_appended_to(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=r"."):
            files.append_file(tmp_path / name, "text")
    for _ in range(2):
        files.append_file(tmp_path / "log", "line\n")
    assert (tmp_path / "log").read_text() == "line\nline\n"
    assert (tmp_path / "mine").read_text() == "mine"
