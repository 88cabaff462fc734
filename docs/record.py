"""Record a conversation with the demo as an animated picture: `python docs/record.py`.

It runs `mlx-smolvlm chat` on a pseudo-terminal that shows pictures, types `TYPED`, and draws what a
terminal emulator (pyte, an extra of `dev`) shows as docs/session.svg. The answers are the
program's own. Only the pace is not: keys and words appear at a speed that can be read.
"""

from __future__ import annotations

import base64
import os
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from tests.helpers.pty_terminal import Emulator  # noqa: E402

OUT = ROOT / "docs" / "session.svg"
COMMAND = "mlx-smolvlm chat"
# On any machine, the memory that the first line states is that of a Mac, as in the README.
PROGRAM = """
from mlx_smolvlm.generate import memory_plan
memory_plan.find_machine = lambda: memory_plan.Machine("mlx-gpu", 2, 8 * 2**30)
from mlx_smolvlm.cli.app import main
main()
"""
TYPED = (
    "examples/three.png",
    "What is in this picture?",
    "Where is the square?",
    "What color is the star?",
)
COLUMNS, ROWS = 72, 29
CELL = (9, 19)  # of a character, in pixels
MARGIN, BAR = 16, 34  # around the text; the title bar
KEY_S, WORD_S, READ_S, END_S = 0.045, 0.09, 1.4, 4.0
FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
BACK, FRONT = "#1f2430", "#e6e6e6"
COLORS = {
    "black": "#3b4252",
    "red": "#f28779",
    "green": "#bae67e",
    "brown": "#ffd580",
    "yellow": "#ffd580",
    "blue": "#73d0ff",
    "magenta": "#d4bfff",
    "cyan": "#95e6cb",
    "white": "#e6e6e6",
    "brightblack": "#8a93a6",
}
_PICTURE = re.compile(rb"\x1b_G([^;]*);([^\x1b]*)\x1b\\")


class Style(NamedTuple):
    """How a character looks."""

    front: str
    back: str
    is_bold: bool
    is_italic: bool


class Run(NamedTuple):
    """Characters of one style in a line."""

    column: int
    text: str
    style: Style


@dataclass(frozen=True)
class Picture:
    """A picture shown inline.

    Attributes:
        line: Of its top, counted from the first line that was ever shown.
    """

    line: int
    png: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header."""
        width, height = struct.unpack(">II", self.png[16:24])
        return width, height


class Frame(NamedTuple):
    """What is on the screen from a time on."""

    time_s: float
    rows: tuple[tuple[Run, ...], ...]
    pictures: tuple[tuple[int, Picture], ...]  # with the row of the top, which may be negative
    cursor: tuple[int, int]


class Recorder(Emulator):
    """A terminal that shows pictures, and keeps what it has shown."""

    def __init__(self, cache: Path) -> None:
        self.frames: list[Frame] = []
        self.time_s = 0.0
        self._pictures: list[Picture] = []
        self._sent, self._rest = b"", b""
        env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TMUX")}
        env |= {"TERM": "xterm-kitty", "MLX_SMOLVLM_CACHE": str(cache), "LC_ALL": "C.UTF-8"}
        env |= {"PYTHONPATH": str(ROOT), "COLORTERM": "truecolor", "TERM_PROGRAM": ""}
        os.chdir(ROOT)
        super().__init__(["-c", PROGRAM, "chat"], env, (COLUMNS, ROWS))

    def _set_size(self, columns: int, rows: int) -> None:
        import fcntl
        import termios

        size = struct.pack("HHHH", rows, columns, columns * CELL[0], rows * CELL[1])
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, size)

    def feed(self, data: bytes) -> None:
        """Show `data`, with its pictures where the cursor is."""
        data = self._rest + data
        start = 0
        for match in _PICTURE.finditer(data):
            self._stream.feed(data[start : match.start()])
            start = match.end()
            self._sent += match[2]
            if b"m=0" in match[1]:
                self._place(base64.b64decode(self._sent))
                self._sent = b""
        begun = data.find(b"\x1b_G", start)
        self._rest = data[begun:] if begun >= 0 else b""
        self._stream.feed(data[start : begun if begun >= 0 else None])
        self.snap(WORD_S)

    def _place(self, png: bytes) -> None:
        """Show a picture, and leave the cursor in its last line, as Kitty does."""
        picture = Picture(len(self.screen.history.top) + self.screen.cursor.y, png)
        self._pictures.append(picture)
        self._stream.feed(b"\r\n" * (-(-picture.size[1] // CELL[1]) - 1))

    def snap(self, pause_s: float) -> None:
        """Keep the screen as it is, if it has changed, for `pause_s`."""
        top = len(self.screen.history.top)
        rows = tuple(tuple(self._read_runs(y)) for y in range(ROWS))
        shown = tuple((one.line - top, one) for one in self._pictures)
        cursor = self.screen.cursor
        frame = Frame(self.time_s, rows, shown, (cursor.x, cursor.y))
        if not self.frames or frame[1:] != self.frames[-1][1:]:
            self.frames.append(frame)
            self.time_s += pause_s

    def _read_runs(self, y: int) -> Iterator[Run]:
        """The characters of a row by style, without blanks at its end."""
        run: Run | None = None
        for x in range(COLUMNS):
            cell = self.screen.buffer[y][x]
            style = _read_style(cell)
            if run and run.style == style:
                run = run._replace(text=run.text + cell.data)
                continue
            if run and (run.text.strip() or run.style.back != BACK):
                yield run
            run = Run(x, cell.data, style)
        if run and (run.text.strip() or run.style.back != BACK):
            yield run

    def type(self, line: str) -> None:
        """Type `line` a key at a time, and wait for what is said to it."""
        for key in line:
            self.send(key)
            self.wait(lambda key=key: self._typed().endswith(key), key)  # type: ignore[misc]
            self.snap(KEY_S)
        self.time_s += 0.4
        self.send("\r")
        self.wait(lambda: not self._typed().endswith(line) and self._is_waiting(), "a prompt")
        self.settle()
        self.time_s += READ_S

    def _is_waiting(self) -> bool:
        """Whether there is an empty prompt below what was typed."""
        cursor = self.screen.cursor
        return self.screen.display[cursor.y].rstrip() == ">" and cursor.x == 2


def _read_style(cell: Any) -> Style:
    """The style of a character of pyte's screen."""
    front = COLORS.get(cell.fg, FRONT if cell.fg == "default" else f"#{cell.fg}")
    back = COLORS.get(cell.bg, BACK if cell.bg == "default" else f"#{cell.bg}")
    front, back = (back, front) if cell.reverse else (front, back)
    return Style(front, back, cell.bold, cell.italics)


def record() -> list[Frame]:
    """Run the conversation; the frames that were shown."""
    with tempfile.TemporaryDirectory() as folder:
        terminal = Recorder(Path(folder))
        try:
            for end in range(len(COMMAND) + 1):
                terminal._stream.feed(b"\r\x1b[32m$\x1b[m " + COMMAND[:end].encode())
                terminal.snap(KEY_S)
            terminal._stream.feed(b"\r\n")
            terminal.snap(0.4)
            terminal.wait(terminal._is_waiting, "the prompt")
            terminal.settle()
            terminal.time_s += READ_S / 2
            for line in TYPED:
                terminal.type(line)
        finally:
            terminal.close()
    return [*terminal.frames, terminal.frames[-1]._replace(time_s=terminal.time_s + END_S)]


def read_lines(drawing: str) -> list[str]:
    """The lines that a drawing shows at its end, without the figures below the prompt."""
    rows: dict[int, list[tuple[int, str]]] = {}
    for group in ElementTree.fromstring(drawing.encode()).iterfind(".//{*}g"):
        if "f" not in group.get("class", "f").split():
            for text in group.iterfind("{*}text"):
                place = int(text.get("y", "0")), int(text.get("x", "0"))
                rows.setdefault(place[0], []).append((place[1], text.text or ""))
    lines = [" ".join(text for _, text in sorted(row)) for _, row in sorted(rows.items())]
    return [line for line in lines if not line.startswith("demo |")]


def draw(frames: list[Frame]) -> str:
    """The frames as an animated SVG; where nothing moves, the last one is shown."""
    length_s = frames[-1].time_s
    width, height = COLUMNS * CELL[0] + 2 * MARGIN, ROWS * CELL[1] + 2 * MARGIN + BAR
    names: dict[tuple[float, float], str] = {}
    parts, rules = list[str](), list[str]()
    for what, start_s, end_s in _find_spans(frames):
        is_last = end_s >= length_s
        if (start_s, end_s) == (0, length_s):
            parts.append(what)
            continue
        is_new = (start_s, end_s) not in names
        name = names.setdefault((start_s, end_s), f"k{len(names)}")
        if is_new:
            start, end = 100 * start_s / length_s, 100 * end_s / length_s
            ending = "" if is_last else f"{end:.2f}%{{opacity:0}}"
            rules.append(f"@keyframes {name}{{0%{{opacity:0}}{start:.2f}%{{opacity:1}}{ending}}}")
            rules.append(f".{name}{{animation-name:{name}}}")
        parts.append(f'<g class="{"l" if is_last else "f"} {name}">{what}</g>')
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="A recorded conversation">',
            "<style>",
            f"text{{font:15px {FONTS};white-space:pre;fill:{FRONT}}}",
            f".f,.l{{animation:{length_s:.2f}s step-end infinite}}.f{{opacity:0}}",
            "@media (prefers-reduced-motion:reduce){.f,.l{animation:none}}",
            *rules,
            "</style>",
            f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="9" fill="{BACK}" '
            'stroke="#6b7489"/>',
            *(
                f'<circle cx="{20 + 20 * i}" cy="18" r="6" fill="{color}"/>'
                for i, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
            ),
            f'<g transform="translate({MARGIN} {MARGIN + BAR - 10})">',
            *parts,
            "</g>",
            "</svg>",
            "",
        ]
    )


def _find_spans(frames: list[Frame]) -> Iterator[tuple[str, float, float]]:
    """What is drawn, from when to when."""
    begun: dict[str, float] = {}
    for frame in frames:
        drawn = list(_draw_frame(frame))
        for what in [one for one in begun if one not in drawn]:
            yield what, begun.pop(what), frame.time_s
        for what in drawn:
            begun.setdefault(what, frame.time_s)
    for what, start_s in begun.items():
        yield what, start_s, frames[-1].time_s


def _draw_frame(frame: Frame) -> Iterator[str]:
    """The elements of a frame."""
    (width, height), (column, row) = CELL, frame.cursor
    for y, runs in enumerate(frame.rows):
        if runs:
            yield "".join(_draw_run(run, y) for run in runs)
    for y, picture in frame.pictures:
        if y >= 0:
            data = base64.b64encode(picture.png).decode()
            size = f'width="{picture.size[0]}" height="{picture.size[1]}"'
            yield f'<image y="{y * height}" {size} href="data:image/png;base64,{data}"/>'
    yield (
        f'<rect x="{column * width}" y="{row * height}" width="{width}" height="{height}" '
        f'fill="{FRONT}" opacity=".7"/>'
    )


def _draw_run(run: Run, y: int) -> str:
    """Characters of one style, each in its cell."""
    width, height = CELL
    text = run.text.rstrip()
    back = ""
    if run.style.back != BACK:
        size = f'width="{len(run.text) * width}" height="{height}"'
        back = f'<rect x="{run.column * width}" y="{y * height}" {size} fill="{run.style.back}"/>'
    if not text:
        return back
    column = run.column + len(text) - len(text.lstrip())
    text = text.lstrip()
    looks = f' fill="{run.style.front}"' if run.style.front != FRONT else ""
    looks += ' font-weight="bold"' if run.style.is_bold else ""
    looks += ' font-style="italic"' if run.style.is_italic else ""
    return (
        f'{back}<text x="{column * width}" y="{y * height + 14}" '
        f'textLength="{len(text) * width}"{looks}>{escape(text)}</text>'
    )


if __name__ == "__main__":
    OUT.write_text(draw(record()), encoding="utf-8")
    print(OUT, OUT.stat().st_size, "bytes")
