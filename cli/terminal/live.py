"""Show an answer on a terminal while it is generated, as Markdown.

Nothing that was printed is drawn again, except for a status before there is text. So a terminal
that becomes narrower wraps an answer as it does all text, and shows it once. What may still look
different later, such as the last word or a table, is printed when it is settled.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.output import write_raw
from mlx_smolvlm.cli.terminal.device import columns_and_rows, hide_typing
from mlx_smolvlm.cli.terminal.markdown import Line, Renderer, cut_unsettled, split_blocks
from mlx_smolvlm.errors import escape_controls

if TYPE_CHECKING:
    from mlx_smolvlm import Reply


NOTHING = (0, 0)
ERASE = "\r\x1b[K"  # the line with the cursor


class LiveScreen:
    """Shows an answer as Markdown; typed keys are not shown meanwhile."""

    INTERVAL_S, STATUS_S = 0.08, 0.3

    def __init__(self, renderer: Renderer) -> None:
        self._renderer, self._text = renderer, ""
        self._final = 0  # characters of finished blocks, which are printed
        self._is_tight = True  # whether the next block follows them without a blank line
        self._printed = NOTHING  # of the blocks after them, see `_count`
        self._is_line_empty, self._has_status = True, False
        self._columns = columns_and_rows()[0]
        self._next_at = self._printed_at = 0.0
        self._open = contextlib.ExitStack()
        self._open.enter_context(hide_typing())

    def begin(self, label: str, reply: Reply) -> None:
        """Show that the prompt is being read; `reply` counts the tokens of the answer."""
        self._reply = reply
        self._show_status(f"reading {reply.prompt_tokens} tokens")

    def add(self, text: str) -> None:
        """Add a piece of the answer; it is printed a dozen times a second at most.

        Printing takes a tenth of the time at most.
        """
        self._text += text
        now = time.monotonic()
        if now < self._next_at:
            return
        self._print_settled(is_whole=False)
        took = time.monotonic() - now  # long for a long block, which is rendered each time
        self._next_at = now + max(self.INTERVAL_S, 10 * took)
        if self._printed == NOTHING and now - self._printed_at > self.STATUS_S:
            count, speed = self._reply.generation_tokens, self._reply.generation_tps
            self._show_status(f"{count} tokens, {speed:.1f} tokens/s")

    def finish(self, text: str) -> None:
        """Show the whole answer `text`, and leave the cursor below it."""
        self._text = text
        self._print_settled(is_whole=True)
        self._end_line()

    def close(self) -> None:
        """Leave the cursor on an empty line, and show typed keys again."""
        with self._open:
            self._end_line()

    def _print_settled(self, is_whole: bool) -> None:
        """Print what is settled of the answer, or all of it if it `is_whole`."""
        text = escape_controls(self._text)[self._final :]
        blocks = split_blocks(text)
        rendered: list[list[Line]] = []
        for number, block in enumerate(blocks):
            is_tight = block.is_tight if number else self._is_tight
            is_growing = block is blocks[-1] and not is_whole
            lines = self._render(cut_unsettled(block.text) if is_growing else block.text)
            rendered.append(lines if is_tight or not lines else [Line(), *lines])
        self._print_lines([line for lines in rendered for line in lines])
        if len(blocks) < 2:
            return
        # A block is finished if another one begins in the complete lines after it.
        complete = split_blocks(text[: text.rfind("\n") + 1])
        count = len(complete) - 1
        if count > 0 and complete[:count] == blocks[:count]:
            self._final += sum(len(block.text) for block in complete[:count])
            self._is_tight = complete[count].is_tight
            words, signs = _count(line for lines in rendered[:count] for line in lines)
            left = self._printed[0] - words
            self._printed = (left, self._printed[1] - (0 if left else signs))

    def _render(self, text: str) -> list[Line]:
        """Render a block for the width that the terminal has now."""
        return self._renderer.render(text, columns_and_rows()[0])

    def _print_lines(self, lines: list[Line]) -> None:
        """Print what is not printed yet of `lines`, without the last line break."""
        columns, before = columns_and_rows()[0], self._columns
        self._columns = columns
        text, row = "", 0
        if self._printed != NOTHING and lines:
            row, column = _find_place(lines, self._printed)
            text = lines[row].format(column)
            if text and columns != before:  # lines break elsewhere now
                text = "\n" + lines[row].format_rest(column)
            row += 1
        if row < len(lines):
            is_new_line = bool(text) or not self._is_line_empty
            text += "\n" * is_new_line + "\n".join(line.format() for line in lines[row:])
        if text:
            write_raw(ERASE * self._has_status + text)
            self._is_line_empty, self._has_status = False, False
            self._printed_at = time.monotonic()
            self._printed = max(self._printed, _count(lines))

    def _show_status(self, text: str) -> None:
        """Show `text` on a line of its own, until something is printed."""
        line_break = "" if self._is_line_empty else "\n"
        text = text[: columns_and_rows()[0] - 1]
        write_raw(f"{line_break}\r\x1b[K\x1b[2m{text}\x1b[0m")
        self._is_line_empty = self._has_status = True

    def _end_line(self) -> None:
        """Remove the status, and leave the cursor on an empty line."""
        if self._has_status:
            write_raw(ERASE)
        elif not self._is_line_empty:
            write_raw("\n")
        self._is_line_empty, self._has_status = True, False


def _count(lines: Iterable[Line]) -> tuple[int, int]:
    """Return the number of characters of words, and of other signs after the last word.

    This says up to where lines are printed, even if the text breaks elsewhere now, since the
    terminal has another width. Bullets and borders do not count before a word.
    """
    words = signs = 0
    for character in "".join(line.plain for line in lines):
        if _is_word(character):
            words, signs = words + 1, 0
        elif not character.isspace():
            signs += 1
    return words, signs


def _find_place(lines: Sequence[Line], printed: tuple[int, int]) -> tuple[int, int]:
    """Return the row and column of `lines` behind what is `printed`, as `_count` counts it."""
    words, signs = printed
    place = (0, 0)
    for row, line in enumerate(lines):
        for column, character in enumerate(line.plain, 1):
            if _is_word(character):
                if not words:
                    return place
                words -= 1
            elif character.isspace():
                continue
            elif not words:
                if not signs:
                    return place
                signs -= 1
            place = (row, column)
    return place


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
