"""An answer on a terminal while it is generated: Markdown, and tokens/s below it.

What is finished scrolls up and stays. The block at hand is drawn again as it grows; of one that
is taller than the screen the end is shown, and all of it once it is finished.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.chat import Printer
from mlx_smolvlm.cli.markdown import Block, Renderer, blocks
from mlx_smolvlm.cli.render import write_raw
from mlx_smolvlm.cli.screen import Screen
from mlx_smolvlm.cli.terminal import columns_and_rows, unechoed
from mlx_smolvlm.quoting import escape_controls

if TYPE_CHECKING:
    from mlx_smolvlm import Reply, SmolVLM
    from mlx_smolvlm.cli.options import ChatOptions


class LivePrinter(Printer):
    """Shows answers as Markdown."""

    def __init__(self, vlm: SmolVLM, options: ChatOptions) -> None:
        super().__init__(vlm, options)
        self._renderer = Renderer()

    def _screen(self, reply: Reply) -> Screen:
        return LiveScreen(reply, self._renderer)


class LiveScreen:
    """Shows `reply` as Markdown; typed keys wait unseen meanwhile."""

    INTERVAL_S = 0.08

    def __init__(self, reply: Reply, renderer: Renderer) -> None:
        self._reply, self._renderer = reply, renderer
        self._region = Region()
        self._restart()
        self._drawn_at = 0.0
        self._open = contextlib.ExitStack()
        self._open.enter_context(unechoed())
        self._open.enter_context(self._region.resumed())

    def begin(self, label: str) -> None:
        """Show that the prompt is being read."""
        self._region.draw([], [self._status(f"reading {self._reply.prompt_tokens} tokens")])

    def update(self) -> None:
        """Show what has been said by now, a dozen times a second at most."""
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
        reply = self._reply
        text = escape_controls(reply.text)
        complete = blocks(text[self._final : text.rfind("\n") + 1])
        final = self._final_lines(complete[:-1])
        if final:
            self._is_tight = complete[-1].is_tight
        live = self._gapped(self._lines(text[self._final :]), self._is_tight)
        count, speed = reply.generation_tokens, reply.generation_tps
        self._region.draw(final, [*live, self._status(f"{count} tokens, {speed:.1f} tokens/s")])

    def finish(self) -> None:
        """Show all of it, and leave the cursor below."""
        if self._region.is_narrowed():
            self._restart()
            self._region.turn_page()
        final = self._final_lines(blocks(escape_controls(self._reply.text)[self._final :]))
        self._region.draw(final, [])

    def close(self) -> None:
        """Remove what is not final, and show typed keys again."""
        with self._open:
            self._region.draw([], [])

    def _restart(self) -> None:
        """Let nothing be shown for good."""
        self._final = 0  # characters that are
        self._is_tight = True  # whether the block at hand follows without a blank line

    def _final_lines(self, done: list[Block]) -> list[str]:
        """The lines of blocks that are shown for good."""
        found: list[str] = []
        for block in done:
            tight = self._is_tight if block is done[0] else block.is_tight
            found += self._gapped(self._lines(block.text), tight)
            self._final += len(block.text)
        return found

    @staticmethod
    def _gapped(lines: list[str], is_tight: bool) -> list[str]:
        return lines if is_tight or not lines else ["", *lines]

    def _lines(self, text: str) -> list[str]:
        return self._renderer.lines(text, columns_and_rows()[0])

    @staticmethod
    def _status(text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m"


class Region:
    """Lines at the end of the screen that are drawn again in place."""

    SETTLED_S = 0.25

    def __init__(self) -> None:
        self._rows = 0  # that are drawn; the cursor is at the end of the last
        self._columns = self._seen_columns = columns_and_rows()[0]
        self._seen_at = 0.0

    def draw(self, final: list[str], live: list[str]) -> None:
        """Replace the lines by `final`, which stay, and the end of `live` below them."""
        columns, rows = columns_and_rows()
        if not (self._rows or final or live):
            return
        live = live[-(rows - 1) :] if rows > 1 else live[-1:]
        up = f"\x1b[{self._rows - 1}A" if self._rows > 1 else ""
        self._rows, self._columns = len(live), columns
        kept = "".join(line + "\n" for line in final)
        # Without wrapping, a line that a terminal draws wider than expected is one row still.
        drawn = "\x1b[?7l" + "\n".join(live) + "\x1b[?7h" if live else ""
        write_raw(f"\r{up}\x1b[J{kept}{drawn}")

    def is_narrowed(self) -> bool:
        """Whether the terminal has since wrapped the lines at another place."""
        return columns_and_rows()[0] < self._columns

    def is_settled(self, now: float) -> bool:
        """Whether its size has stayed the same for a while."""
        columns = columns_and_rows()[0]
        if columns != self._seen_columns:
            self._seen_columns, self._seen_at = columns, now
        return now - self._seen_at >= self.SETTLED_S

    def turn_page(self) -> None:
        """Let all that is on the screen scroll up, and go on at the top.

        Where the lines are now depends on the terminal, so that none can be drawn over.
        """
        columns, rows = columns_and_rows()
        self._rows, self._columns = 0, columns
        write_raw(f"\r\x1b[J\x1b[{rows};1H" + "\n" * rows + "\x1b[H\x1b[J")

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """Go on below what is there after Ctrl-Z and fg."""

        def forget(number: int, frame: object) -> None:
            self._rows = 0

        before = signal.signal(signal.SIGCONT, forget)
        try:
            yield
        finally:
            signal.signal(signal.SIGCONT, before)
