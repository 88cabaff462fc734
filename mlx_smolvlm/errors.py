"""Errors that a caller can act on.

Every message says what went wrong, with which value, and what to do next. The
command line prints the message alone, without a traceback. A message is one line of
bounded length without control characters, passwords or tokens, whatever it quotes.
"""

from __future__ import annotations

import reprlib

from mlx_smolvlm.quoting import message_line

_WRITTEN_BITS = 4096


class _ShortRepr(reprlib.Repr):
    """Python refuses to write whole numbers of more than 4,300 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 40
        self.maxlevel, self.maxdict, self.maxlist, self.maxarray = 2, 2, 3, 3

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > _WRITTEN_BITS:
            return f"a number of {x.bit_length():,} bits"
        return super().repr_int(x, level)


_SHORT = _ShortRepr()


def shorten(value: object) -> str:
    """`value` as Python writes it, cut to some 40 characters, three elements and two levels.

    A list of a million numbers would fill the screen, and one nested a thousand deep cannot
    be written at all.
    """
    return _SHORT.repr(value)


class SmolVLMError(Exception):
    """Base of every error that this package raises on purpose."""

    def __init__(self, message: object = "") -> None:
        super().__init__(message_line(str(message)))


class CheckpointError(SmolVLMError):
    """A checkpoint folder, configuration or weight file cannot be used."""


class MediaError(SmolVLMError):
    """A picture or video cannot be opened or decoded."""


class PromptError(SmolVLMError):
    """The messages cannot be turned into a prompt that the model can read."""


class ContextError(PromptError):
    """The prompt is longer than the model's context."""


class ConstraintError(SmolVLMError):
    """An answer cannot be held to a schema or a regular expression."""


class DatasetError(SmolVLMError):
    """A dataset has a line or a file that cannot be used."""


class TrainingError(SmolVLMError):
    """A training cannot be run or resumed as its configuration says."""


class SmolVLMWarning(UserWarning):
    """Something that a user should know and that does not stop the work."""

    def __init__(self, message: object = "") -> None:
        super().__init__(message_line(str(message)))
