"""Whose files and folders are trusted, seen as the user 1000 of a machine with others."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from prompt_toolkit.history import FileHistory, InMemoryHistory

from mlx_smolvlm.cli.terminal.editor import open_history
from mlx_smolvlm.files import check_owner, make_private_folder, read_file

ME, OTHER, ROOT = 1000, 1001, 0


@pytest.mark.parametrize(
    ("inner", "outer", "is_trusted"),
    [
        ((ME, 0o700), (ME, 0o755), True),
        ((ME, 0o775), (ME, 0o777), True),  # as this user made it
        ((ME, 0o700), (ROOT, 0o1777), True),  # /tmp
        ((ROOT, 0o755), (ROOT, 0o755), True),
        ((ROOT, 0o775), (ROOT, 0o755), False),
        ((ROOT, 0o757), (ROOT, 0o755), False),
        ((OTHER, 0o700), (ROOT, 0o1777), False),
        ((OTHER, 0o755), (ME, 0o755), False),
        ((ME, 0o700), (OTHER, 0o755), True),  # only root can have given it to this user
        ((ME, 0o700), (OTHER, 0o775), False),
        ((ME, 0o700), (OTHER, 0o1777), False),
    ],
)
def test_folders(
    inner: tuple[int, int],
    outer: tuple[int, int],
    is_trusted: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "outer" / "inner"
    folder.mkdir(parents=True)
    owners = {folder: inner, folder.parent: outer}
    stat = Path.stat

    def fake(path: Path, **options: bool) -> object:
        if path not in owners:
            return stat(path, **options)
        uid, mode = owners[path]
        return SimpleNamespace(st_uid=uid, st_mode=0o40000 | mode)

    monkeypatch.setattr(Path, "stat", fake)
    monkeypatch.setattr(os, "geteuid", lambda: ME)
    if is_trusted:
        make_private_folder(folder)
    else:
        with pytest.raises(PermissionError, match="uid"):
            make_private_folder(folder)


def test_the_open_file_is_checked(tmp_path: Path, give_away: Callable[[Path], None]) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    assert read_file(path, 10, own_only=True) == b"text"
    give_away(path)
    with pytest.raises(PermissionError, match="Owned by another user, uid"):
        read_file(path, 10, own_only=True)
    assert read_file(path, 10) == b"text"
    check_owner(SimpleNamespace(st_uid=ROOT), path)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["history", "."])
def test_a_history_of_another_user_is_not_used(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    give_away: Callable[[Path], None],
) -> None:
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLX_SMOLVLM_HISTORY", raising=False)
    assert isinstance(open_history(), FileHistory)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    give_away(tmp_path / "cache" / name)
    assert isinstance(open_history(), InMemoryHistory)
