"""Write to stdout (answers and results) and stderr (everything else)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mlx_smolvlm.errors import SmolVLMWarning, escape_controls, format_message

if TYPE_CHECKING:
    from mlx_smolvlm import Reply


class OutputClosedError(Exception):
    """The reader of stdout has closed the pipe."""


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable, whatever they are.

    A closed stream is replaced by the null device, and characters that the locale lacks are
    written as "?" instead of raising an error. A warning of this package is one line on stderr.
    """
    warnings.showwarning = _show_warning
    # Python would show one that says the same as an earlier one only once.
    warnings.filterwarnings("always", "the context is full", SmolVLMWarning)
    # Commands for which that matters say it in their own words.
    warnings.filterwarnings("ignore", "the demo knows", SmolVLMWarning)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (stays open)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a caller may have replaced it
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # see above


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Write a warning of this package to stderr; a user cannot act on those of others."""
    if issubclass(category, SmolVLMWarning):
        warn(message)


def write(text: str) -> None:
    """Write `text` to stdout and flush; on a terminal, control characters are escaped.

    They would let the author of a picture control the terminal through the answer.

    Raises:
        OutputClosedError: The reader has closed the pipe.
    """
    write_raw(escape_controls(text) if sys.stdout.isatty() else text)


def write_raw(text: str) -> None:
    """Write `text` to stdout unchanged and flush; raises as `write` does."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        raise OutputClosedError from None
    except OSError:
        discard(sys.stdout)  # or the interpreter reports the error again at exit
        raise


def write_json(values: Any) -> None:
    """Write `values` to stdout as one line of JSON."""
    import json

    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(values, ensure_ascii=not utf8)
    if sys.stdout.isatty():
        text = escape_controls(text, "\\u{:04x}")  # JSON has no \x9b
    write_raw(text + "\n")


def say(text: str, *, dim: bool = False, end: str = "\n") -> None:
    """Write `text` to stderr with control characters escaped; `dim` applies to terminals."""
    text = escape_controls(text)
    if dim and sys.stderr.isatty():
        text = f"\x1b[2m{text}\x1b[0m"
    try:
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def say_wrapped(text: str, *, dim: bool = False) -> None:
    """Write a line to stderr as `say` does; on a terminal, it breaks at blanks."""
    if sys.stderr.isatty():
        import textwrap

        columns = max(_count_columns(), 20)
        text = textwrap.fill(text, columns, break_on_hyphens=False)
    say(text, dim=dim)


def _count_columns() -> int:
    """Return the width of the terminal that is stderr; 80 if it is unknown."""
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80


def warn(message: object) -> None:
    """Write "warning: ..." to stderr, in one line without secrets."""
    say(f"warning: {format_message(str(message))}")


def fail(message: object) -> None:
    """Write "error: ..." to stderr, in one line without secrets."""
    say(f"error: {format_message(str(message))}")


def describe_os_error(error: OSError) -> str:
    """Return the system's error message with the name of the file."""
    name = f": {error.filename}" if error.filename is not None else ""
    return f"{error.strerror or error}{name}"


def describe_memory_error(error: Exception) -> str | None:
    """Return an error message if `error` means that memory ran out in Python or MLX, else None."""
    advice = "try --detail low, or a smaller model or --bits 4"
    if isinstance(error, MemoryError):
        return f"out of memory; {advice}"
    if "malloc" in str(error) or "Insufficient Memory" in str(error):
        return f"out of memory ({error}); {advice}"
    return None


def discard(stream: TextIO) -> None:
    """Point `stream` at the null device, so that its buffer can be flushed."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def format_size(nbytes: int) -> str:
    """Return `nbytes` in MB (10**6 bytes) or GB (10**9 bytes)."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def format_stats(reply: Reply) -> str:
    """Return the token counts, speeds and peak memory of `reply` in one line."""
    notes = [
        f"{count} {noun}{'' if count == 1 else 's'}"
        for count, noun in ((reply.image_tiles, "tile"), (reply.video_frames, "frame"))
        if count
    ]
    if reply.cached_tokens:
        notes.append(f"{reply.cached_tokens} from before")
    guesses = ""
    if reply.drafted_tokens:
        guesses = f" ({reply.accepted_tokens} of {reply.drafted_tokens} guesses right)"
    media = f" ({', '.join(notes)})" if notes else ""
    return (
        f"prompt: {reply.prompt_tokens} tokens{media}, {reply.prompt_tps:.1f} tokens/s; "
        f"answer: {reply.generation_tokens} tokens{guesses}, {reply.generation_tps:.1f} tokens/s; "
        f"first token after {reply.time_to_first_token_s:.2f} s; "
        f"peak memory {reply.peak_memory_gb:.2f} GB"
    )


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return `rows` with aligned columns; control characters in cells are escaped."""
    cells = [[escape_controls(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    return "\n".join(lines) + "\n"


class ProgressBar:
    """A progress bar on stderr, shown if stderr is a terminal.

    It appears after `delay_s` seconds, so that short work does not make it flicker.
    """

    WIDTH, INTERVAL_S = 24, 0.1

    def __init__(self, delay_s: float = 0.0) -> None:
        self._visible_from = time.monotonic() + delay_s
        self._drawn_at = 0.0
        self._drawn = False

    @property
    def is_shown(self) -> bool:
        """Whether the bar is shown, because stderr is a terminal."""
        return sys.stderr.isatty()

    def draw(self, done: float, total: float, text: str) -> None:
        """Show `done` of `total` with `text` beside the bar; redrawn ten times a second at most."""
        now = time.monotonic()
        if not sys.stderr.isatty() or now < self._visible_from:
            return
        if now - self._drawn_at < self.INTERVAL_S and done < total:
            return
        self._drawn_at, self._drawn = now, True
        filled = int(self.WIDTH * done / max(total, 1))
        bar = "#" * filled + "." * (self.WIDTH - filled)
        line = f"[{bar}] {escape_controls(text)}"
        # A longer line would be wrapped, and its beginning stay when the next one is drawn.
        sys.stderr.write(f"\r\x1b[K{line[: _count_columns() - 1]}")
        sys.stderr.flush()

    def close(self) -> None:
        """Remove the bar."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False


class ConversionProgress(ProgressBar):
    """The progress of a conversion; called with bytes done, total bytes and a tensor's name.

    `announcement`, if given, is written to stderr when a conversion begins.
    """

    def __init__(self, announcement: str = "") -> None:
        super().__init__()
        self._announcement = announcement

    def __call__(self, done: int, total: int, name: str) -> None:
        if self._announcement:
            say(self._announcement, dim=True)
            self._announcement = ""
        self.draw(done, total, f"{format_size(done)} of {format_size(total)}")
