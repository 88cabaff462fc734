"""Print answers from their chunks while they are generated."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from mlx_smolvlm.cli.media import FrameWriter
from mlx_smolvlm.cli.output import (
    ProgressBar,
    fail,
    format_stats,
    say,
    say_wrapped,
    write,
    write_json,
)

if TYPE_CHECKING:
    from mlx_smolvlm import AnswerStream, Reply, Sampling, SmolVLM
    from mlx_smolvlm.cli.args import ChatOptions

INTERRUPTED = 130  # the exit status after Ctrl-C


class Screen(Protocol):
    """Where an answer is shown while it is generated."""

    def begin(self, label: str, reply: Reply) -> None:
        """Show `label`, if any; `reply` counts the tokens and the time from now on."""

    def add(self, text: str) -> None:
        """Show the next piece of the answer."""

    def finish(self, text: str) -> None:
        """Show what is missing of the whole answer `text`, and end the line."""

    def close(self) -> None:
        """Restore the terminal; called without `finish` after an error."""


class NullScreen:
    """Shows nothing, where the reply is printed as JSON at the end."""

    def begin(self, label: str, reply: Reply) -> None:
        """Show nothing."""

    def add(self, text: str) -> None:
        """Show nothing."""

    def finish(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


class PlainScreen:
    """Writes an answer to stdout as it is."""

    def __init__(self) -> None:
        self._length = 0  # of what has been written

    def begin(self, label: str, reply: Reply) -> None:
        """Write the label in front of the answer."""
        if label:
            write(f"{label}: ")

    def add(self, text: str) -> None:
        """Write the next piece of the answer."""
        self._length += len(text)
        write(text)

    def finish(self, text: str) -> None:
        """Write what is missing of the whole answer `text`, and end the line."""
        write(text[self._length :] + "\n" * (not text.endswith("\n")))

    def close(self) -> None:
        """Do nothing."""


class Printer:
    """Prints answers on stdout, and the progress of pictures and videos on stderr.

    Args:
        vlm: The model; it says how pixels are normalized, for `--frames`.
        options: What the user asked for.
        make_screen: Makes where an answer is shown; not used with `--json`.

    Attributes:
        has_cut_answer: Whether an answer ended before it fitted `--schema` or `--regex`.
    """

    def __init__(
        self,
        vlm: SmolVLM,
        options: ChatOptions,
        make_screen: Callable[[], Screen] = PlainScreen,
    ) -> None:
        self._has_json, self._has_stats = options.json, options.stats
        self._sampling, self.has_cut_answer = options.sampling, False
        self._make_screen = NullScreen if options.json else make_screen
        folder, image = options.frames.frames_folder, vlm.config.image
        self._writer = None if folder is None else FrameWriter(folder, image.mean, image.std)

    def print_answer(
        self, stream: AnswerStream, label: str = "", extra: Mapping[str, object] | None = None
    ) -> bool:
        """Print the answer; return False if Ctrl-C stopped it.

        Args:
            stream: The answer.
            label: Printed in front of the answer.
            extra: More fields for `--json`.
        """
        is_finished, reply = False, stream.reply
        with contextlib.closing(self._make_screen()) as screen:
            try:
                self._prepare(stream)
                screen.begin(label, reply)
                for chunk in stream:
                    screen.add(chunk.text)
                is_finished = True
            except KeyboardInterrupt:
                stream.close()
            screen.finish(reply.text)  # Ctrl-C may come between a chunk and its printing
        if self._has_json:
            write_json({**reply.to_dict(), **(extra or {})})
        if self._has_stats:
            say_wrapped(format_stats(reply))
        if is_finished and (message := explain_cut(reply, self._sampling)):
            self.has_cut_answer = True
            fail(message)
        return is_finished

    def print_earlier(self, text: str) -> None:
        """Print an answer of a conversation that goes on; not to a file of new answers."""
        if not sys.stdout.isatty() or self._has_json:
            say(text)
            return
        with contextlib.closing(self._make_screen()) as screen:
            screen.finish(text)

    def _prepare(self, stream: AnswerStream) -> None:
        """Decode and encode pictures and videos, with a progress bar; write frames if asked to."""
        with contextlib.closing(ProgressBar(delay_s=0.3)) as bar:
            for step in stream.prepare():
                text = f"{step.decoded} of {step.total} tiles read, {step.encoded} encoded"
                bar.draw(step.decoded + step.encoded, 2 * step.total, text)
                if self._writer is not None:
                    self._writer.write(step)


def explain_cut(reply: Reply, sampling: Sampling) -> str | None:
    """Return why a finished answer does not fit `--schema` or `--regex`; None if it does."""
    if not sampling.is_constrained:
        return None
    goal = "it was complete JSON" if sampling.schema is not None else "it matched --regex"
    if reply.finish_reason == "stop":
        if sampling.schema is None or reply.parsed is not None or reply.text == "null":
            return None
        return f"a text of --stop ended the answer before {goal}"
    if reply.generation_tokens < sampling.max_tokens:
        return (
            f"the context was full before {goal}; leave more of it: a lower --detail, fewer "
            "frames, or a shorter prompt"
        )
    return (
        f"the answer was cut at --max-tokens {sampling.max_tokens}, before {goal}; "
        "give a larger --max-tokens"
    )
