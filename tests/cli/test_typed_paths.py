"""Paths that are typed, completed and find_dropped_paths."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_smolvlm.cli.terminal.paths import complete_path, find_dropped_paths, split_sources
from mlx_smolvlm.errors import MediaError

NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1)


def test_split_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b.png").touch()
    assert split_sources("a b.png") == ["a b.png"]  # as it stands
    assert split_sources(r" c\ d.png 'e f.png' ") == ["c d.png", "e f.png"]
    assert split_sources("it's.png") == ["it's.png"]
    assert split_sources("https://example.org/a b.png") == ["https://example.org/a b.png"]
    assert split_sources("file:///a%20b.png file://localhost/c.png") == ["/a b.png", "/c.png"]
    # not split as an address, of which an IPv6 host is an error and a fragment is cut off
    assert split_sources("file://[a.png file:///a#b.png") == ["file://[a.png", "/a#b.png"]
    assert split_sources("~nobody/x") == ["~nobody/x"]
    assert split_sources("x" * 5000) == ["x" * 5000]
    assert split_sources("  ") == []


def test_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a b.png", "clip.MP4", "notes.txt"):
        (tmp_path / name).touch()
    assert find_dropped_paths(f"'{tmp_path}/a b.png' clip.MP4") == [
        f"{tmp_path}/a b.png",
        "clip.MP4",
    ]
    assert find_dropped_paths(f"{tmp_path}/a b.png") == [f"{tmp_path}/a b.png"]
    assert find_dropped_paths("notes.txt") == ["notes.txt"]  # an error then says what it is
    for line in ("/not/there.jpg", "not-there.jpg", "clip.MP4 not-there.jpg", "./b.pgn"):
        with pytest.raises(MediaError, match="does not exist"):
            find_dropped_paths(line)
    for line in (
        "What is a b.png?",
        "clip.MP4 please",
        "",
        "x" * 9999,
    ):
        assert find_dropped_paths(line) == []


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder one").mkdir()
    for name in ("four's.png", "four.txt", ".hidden.png", "folder one/x.jpg"):
        (tmp_path / name).touch()

    def texts(argument: str, *suffixes: str) -> list[str]:
        found = complete_path(argument, suffixes)
        return [argument[: len(argument) + one.start_position] + one.text for one in found]

    assert texts("fo", ".png") == ["folder\\ one/", "four\\'s.png"]
    assert texts("fo") == ["folder\\ one/", "four\\'s.png", "four.txt"]
    assert texts("a.png folder\\ one/", ".png") == ["a.png folder\\ one/x.jpg"]  # none with .png
    assert texts("'fold") == ["'folder one/"]
    assert texts("'folder one/x") == ["'folder one/x.jpg'"]
    assert texts(".h") == [".hidden.png"]
    assert texts("nowhere/") == texts("zzz") == []


@given(name=NAMES.filter(lambda name: name not in (".", "..") and len(name.encode()) < 200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_completed_path_is_the_path(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("names")
    (folder / name).touch()
    for quote in ("", "'", '"'):
        (one,) = complete_path(f"{quote}{folder}/" + "." * name.startswith("."))
        assert split_sources(one.text) == [str(folder / name)]
