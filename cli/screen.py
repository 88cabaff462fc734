"""Where an answer is shown while it is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mlx_smolvlm.cli.render import write

if TYPE_CHECKING:
    from mlx_smolvlm import Reply


class Screen(Protocol):
    """Where an answer is shown while it is generated; a reply is given beforehand."""

    def begin(self, label: str) -> None:
        """Show `label`, if there is one, before the answer."""

    def update(self) -> None:
        """Show what the reply holds by now."""

    def finish(self) -> None:
        """Show all of the reply, and end the line."""

    def close(self) -> None:
        """Leave the terminal as it was; also without `finish`, after an error."""


class NoScreen:
    """Shows nothing."""

    def begin(self, label: str) -> None:
        """Show nothing."""

    update = finish = close = lambda self: None


class PlainScreen:
    """Puts `reply` on stdout as it is."""

    def __init__(self, reply: Reply) -> None:
        self._reply, self._shown = reply, 0

    def begin(self, label: str) -> None:
        """Put `label` before the answer."""
        if label:
            write(f"{label}: ")

    def update(self) -> None:
        """Put what has been said since on stdout."""
        text = self._reply.text[self._shown :]
        self._shown += len(text)
        write(text)

    def finish(self) -> None:
        """Put the rest there, and end the line."""
        self.update()
        if not self._reply.text.endswith("\n"):
            write("\n")

    def close(self) -> None:
        """Nothing is left to do."""
