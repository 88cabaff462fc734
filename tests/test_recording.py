"""The recording in the README shows what the program says today."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", ROOT / "docs" / "record.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["record"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def read_lines(recorder: ModuleType, drawing: str) -> list[str]:
    """The lines at the end, without sizes, which depend on the machine."""
    return [re.sub(r"\d[\d.]* GB", "GB", line) for line in recorder.read_lines(drawing)]


def test_the_recording_is_of_this_program(
    recorder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # which the recorder does too
    drawing = recorder.draw(recorder.record())
    lines = read_lines(recorder, drawing)
    assert lines[0] == "$ mlx-smolvlm chat"
    for typed in recorder.TYPED:
        assert f"> {typed}" in lines
    recorded = recorder.OUT.read_text(encoding="utf-8")
    assert lines == read_lines(recorder, recorded), "run: python docs/record.py"
    assert "A blue square, a black star and a yellow diamond." in lines


def test_the_recording_needs_nothing_else_and_says_what_it_is(recorder: ModuleType) -> None:
    text = recorder.OUT.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.encode())
    assert root.get("aria-label")
    assert len(text) < 100_000
    assert text.count("href=") == text.count('href="data:image/png;base64,') == 1  # the picture
    assert "<script" not in text
    assert "prefers-reduced-motion" in text
