"""Fixtures of the tests of the interactive program."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import pty_terminal
from tests.helpers.pty_terminal import Program, Talk


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Talk]:
    opened: list[Any] = []

    def begin(
        *options: str | Path,
        answers: dict[str, str] | None = None,
        env: dict[str, str] | None = None,
        size: tuple[int, int] = (80, 24),
        stdout: Path | None = None,
    ) -> Any:
        program = Program(tmp_path, answers or {}, env or {})
        command = ["-c", pty_terminal.PROGRAM, "chat", *map(str, options)]
        terminal = pty_terminal.Emulator(command, program.env, size, stdout)
        terminal.program = program
        opened.append(terminal)
        terminal.expect("/help lists the commands")
        return terminal

    yield begin
    for terminal in opened:
        terminal.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    path = folder / "red one.png"
    Image.new("RGB", (64, 48), (200, 30, 30)).save(path)
    return path
