"""Atomic writes, bounded reads, home directories."""

import os
import stat
from pathlib import Path

import pytest

from mlx_smolvlm import files


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
