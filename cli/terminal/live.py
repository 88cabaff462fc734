"""Show an answer on a terminal while it is generated: Markdown, with tokens/s below it.

Finished blocks are printed once and scroll up. The last block is drawn again as it grows; if it
is taller than the screen, only its end is shown until it is finished.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.output import write_raw
from mlx_smolvlm.cli.terminal.device import columns_and_rows, hide_typing
from mlx_smolvlm.cli.terminal.markdown import Block, Renderer, split_blocks
from mlx_smolvlm.errors import escape_controls

if TYPE_CHECKING:
    from mlx_smolvlm import Reply


class LiveScreen:
    """Shows an answer as Markdown; typed keys are not shown meanwhile."""

    INTERVAL_S = 0.08

    def __init__(self, renderer: Renderer) -> None:
        self._renderer, self._text = renderer, ""
        self._region = Region()
        self._restart()
        self._drawn_at = 0.0
        self._open = contextlib.ExitStack()
        self._open.enter_context(hide_typing())
        self._open.enter_context(self._region.handle_resume())

    def begin(self, label: str, reply: Reply) -> None:
        """Show that the prompt is being read; `reply` counts the tokens of the answer."""
        self._reply = reply
        self._region.draw([], [self._format_status(f"reading {reply.prompt_tokens} tokens")])

    def add(self, text: str) -> None:
        """Add a piece of the answer; it is drawn a dozen times a second at most."""
        self._text += text
        now = time.monotonic()
        is_settled = self._region.is_settled(now)
        if now - self._drawn_at < self.INTERVAL_S:
            return
        if self._region.is_narrowed():
            if not is_settled:
                return
            self._restart()
            self._region.turn_page()
        self._drawn_at = now
        text = escape_controls(self._text)
        complete = split_blocks(text[self._final : text.rfind("\n") + 1])
        final = self._finish_blocks(complete[:-1])
        if final:
            self._is_tight = complete[-1].is_tight
        live = self._add_gap(self._render(text[self._final :]), self._is_tight)
        count, speed = self._reply.generation_tokens, self._reply.generation_tps
        status = self._format_status(f"{count} tokens, {speed:.1f} tokens/s")
        self._region.draw(final, [*live, status])

    def finish(self, text: str) -> None:
        """Show the whole answer `text`, and leave the cursor below it."""
        if self._region.is_narrowed():
            self._restart()
            self._region.turn_page()
        final = self._finish_blocks(split_blocks(escape_controls(text)[self._final :]))
        self._region.draw(final, [])

    def close(self) -> None:
        """Remove what is not final, and show typed keys again."""
        with self._open:
            self._region.draw([], [])

    def _restart(self) -> None:
        """Draw the answer from its beginning."""
        self._final = 0  # characters of finished blocks, which are not drawn again
        self._is_tight = True  # whether the next block follows without a blank line

    def _finish_blocks(self, done: list[Block]) -> list[str]:
        """Return the lines of the finished blocks `done`."""
        lines: list[str] = []
        for block in done:
            tight = self._is_tight if block is done[0] else block.is_tight
            lines += self._add_gap(self._render(block.text), tight)
            self._final += len(block.text)
        return lines

    @staticmethod
    def _add_gap(lines: list[str], is_tight: bool) -> list[str]:
        """Put a blank line in front of a block's lines, unless it is tight."""
        return lines if is_tight or not lines else ["", *lines]

    def _render(self, text: str) -> list[str]:
        """Render blocks for the width that the terminal has now."""
        return self._renderer.render(text, columns_and_rows()[0])

    @staticmethod
    def _format_status(text: str) -> str:
        """Return `text` in faint letters."""
        return f"\x1b[2m{text}\x1b[0m"


class Region:
    """The lines at the end of the screen, which are redrawn in place."""

    SETTLED_S = 0.25

    def __init__(self) -> None:
        self._rows = 0  # drawn lines; the cursor is at the end of the last one
        self._columns = self._seen_columns = columns_and_rows()[0]
        self._seen_at = 0.0

    def draw(self, final: list[str], live: list[str]) -> None:
        """Replace the lines by `final`, which stay, and the last lines of `live` below them."""
        columns, rows = columns_and_rows()
        if not (self._rows or final or live):
            return
        live = live[-(rows - 1) :] if rows > 1 else live[-1:]
        up = f"\x1b[{self._rows - 1}A" if self._rows > 1 else ""
        self._rows, self._columns = len(live), columns
        above = "".join(line + "\n" for line in final)
        # Without wrapping, a line that the terminal draws wider than expected is still one row.
        below = "\x1b[?7l" + "\n".join(live) + "\x1b[?7h" if live else ""
        write_raw(f"\r{up}\x1b[J{above}{below}")

    def is_narrowed(self) -> bool:
        """Return whether the terminal is narrower than when the lines were drawn."""
        return columns_and_rows()[0] < self._columns

    def is_settled(self, now: float) -> bool:
        """Return whether the terminal's width has been the same for a while."""
        columns = columns_and_rows()[0]
        if columns != self._seen_columns:
            self._seen_columns, self._seen_at = columns, now
        return now - self._seen_at >= self.SETTLED_S

    def turn_page(self) -> None:
        """Scroll the whole screen up, and continue at the top.

        A narrower terminal may have wrapped the lines, so their position is unknown.
        """
        columns, rows = columns_and_rows()
        self._rows, self._columns = 0, columns
        write_raw(f"\r\x1b[J\x1b[{rows};1H" + "\n" * rows + "\x1b[H\x1b[J")

    @contextlib.contextmanager
    def handle_resume(self) -> Iterator[None]:
        """After Ctrl-Z and fg, continue below what is on the screen."""

        def forget_rows(number: int, frame: object) -> None:
            self._rows = 0

        before = signal.signal(signal.SIGCONT, forget_rows)
        try:
            yield
        finally:
            signal.signal(signal.SIGCONT, before)
