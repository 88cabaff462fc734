"""What reaches the terminal: the answer on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from mlx_smolvlm.errors import SmolVLMWarning
from mlx_smolvlm.quoting import escape_controls, message_line

if TYPE_CHECKING:
    from mlx_smolvlm import Reply


class OutputClosedError(Exception):
    """Nobody reads stdout any more."""


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable whatever they are.

    A closed one becomes the null device, and characters that the locale lacks
    become "?" instead of an error. A warning of this package is one line on stderr.
    """
    warnings.showwarning = _show_warning
    # Python would show one that says the same as an earlier one only once.
    warnings.filterwarnings("always", "the context is full", SmolVLMWarning)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (stays open)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # replaced by a caller's own stream
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # see above


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Put a warning on stderr; other packages' are of no use to who runs the command."""
    if issubclass(category, SmolVLMWarning):
        warn(message)


def write(text: str) -> None:
    """Put `text` on stdout now; a terminal gets control characters as escapes.

    What a model says may come from a picture's author.

    Raises:
        OutputClosedError: The reader of the pipe is gone.
    """
    write_raw(escape_controls(text) if sys.stdout.isatty() else text)


def write_raw(text: str) -> None:
    """Put `text` on stdout now as it is; errors as `write`."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
        raise OutputClosedError from None
    except OSError:
        discard(sys.stdout)  # or the interpreter would complain once more at exit
        raise


def write_json(values: Any) -> None:
    """Put `values` on stdout as one line of JSON, on a terminal too."""
    import json

    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(values, ensure_ascii=not utf8)
    if sys.stdout.isatty():
        text = escape_controls(text, "\\u{:04x}")  # JSON has no \x9b
    write_raw(text + "\n")


def say(text: str, *, dim: bool = False, end: str = "\n") -> None:
    """Put `text` on stderr now, control characters as escapes; a terminal shows it dim if asked."""
    text = escape_controls(text)
    if dim and sys.stderr.isatty():
        text = f"\x1b[2m{text}\x1b[0m"
    try:
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)


def warn(message: object) -> None:
    """Put "warning: ..." on stderr, in one line without secrets."""
    say(f"warning: {message_line(str(message))}")


def fail(message: object) -> None:
    """Put "error: ..." on stderr, in one line without secrets."""
    say(f"error: {message_line(str(message))}")


def os_fault(error: OSError) -> str:
    """What the system could not do, and with which file."""
    name = f": {error.filename}" if error.filename is not None else ""
    return f"{error.strerror or error}{name}"


def out_of_memory(error: Exception) -> str | None:
    """What to tell a user if `error` is a lack of memory, as MLX tells it or Python."""
    advice = "try --detail low, or a smaller model or --bits 4"
    if isinstance(error, MemoryError):
        return f"out of memory; {advice}"
    if "malloc" in str(error) or "Insufficient Memory" in str(error):
        return f"out of memory ({error}); {advice}"
    return None


def discard(stream: TextIO) -> None:
    """Let what `stream` still holds go nowhere."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def size(nbytes: int) -> str:
    """`nbytes` in MB or GB, of 10**6 and 10**9 bytes."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def stats_line(reply: Reply) -> str:
    """What `reply` cost, in one line."""
    seen = [
        f"{count} {noun}{'' if count == 1 else 's'}"
        for count, noun in ((reply.image_tiles, "tile"), (reply.video_frames, "frame"))
        if count
    ]
    if reply.cached_tokens:
        seen.append(f"{reply.cached_tokens} from before")
    media = f" ({', '.join(seen)})" if seen else ""
    return (
        f"prompt: {reply.prompt_tokens} tokens{media}, {reply.prompt_tps:.1f} tokens/s; "
        f"answer: {reply.generation_tokens} tokens, {reply.generation_tps:.1f} tokens/s; "
        f"first token after {reply.time_to_first_token_s:.2f} s; "
        f"peak memory {reply.peak_memory_gb:.2f} GB"
    )


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """`rows` with their columns aligned, control characters in them as escapes."""
    cells = [[escape_controls(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
    return "\n".join(lines) + "\n"


class Bar:
    """A line on stderr that shows how far something is; nothing if that is no terminal.

    It appears after `delay_s` seconds, so that what is done sooner does not flicker.
    """

    WIDTH, INTERVAL_S = 24, 0.1

    def __init__(self, delay_s: float = 0.0) -> None:
        self._begins_at = time.monotonic() + delay_s
        self._drawn_at = 0.0
        self._drawn = False

    @property
    def is_shown(self) -> bool:
        """Whether stderr is a terminal, where it can be drawn."""
        return sys.stderr.isatty()

    def draw(self, done: float, total: float, text: str) -> None:
        """Show `done` of `total`, at most ten times a second, and `text` beside it."""
        now = time.monotonic()
        if not sys.stderr.isatty() or now < self._begins_at:
            return
        if now - self._drawn_at < self.INTERVAL_S and done < total:
            return
        self._drawn_at, self._drawn = now, True
        filled = int(self.WIDTH * done / max(total, 1))
        bar = "#" * filled + "." * (self.WIDTH - filled)
        sys.stderr.write(f"\r\x1b[K[{bar}] {escape_controls(text)}")
        sys.stderr.flush()

    def close(self) -> None:
        """Remove the line."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False


class ConversionProgress(Bar):
    """Called with bytes done, bytes in all and a name.

    `announcement`, if there is one, is put on stderr when a conversion begins.
    """

    def __init__(self, announcement: str = "") -> None:
        super().__init__()
        self._announcement = announcement

    def __call__(self, done: int, total: int, name: str) -> None:
        if self._announcement:
            say(self._announcement, dim=True)
            self._announcement = ""
        self.draw(done, total, f"{size(done)} of {size(total)}")
