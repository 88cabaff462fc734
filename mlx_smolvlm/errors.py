"""Errors that a caller can act on.

Every message says what went wrong, with which value, and what to do next. The
command line prints the message alone, without a traceback. A message is one line of
bounded length without control characters, passwords or tokens, whatever it quotes.
"""

from __future__ import annotations

import re
import reprlib

MAX_MESSAGE = 2000  # characters of a message
MAX_QUOTE = 500  # characters of what another library says, within a message

# Terminals act on control characters, and show text in another order after the bidirectional
# ones. \n and \t are neither. A lone surrogate stands for a byte that is no text.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_QUOTED_URL = r"""(?P<quote>['"])(?P<quoted>[a-z][a-z0-9+.-]{0,30}:[/\\].*?)(?P=quote)"""
_BARE_URL = r"""(?P<bare>(?:https?:[/\\]|:[/\\]{2})\S*)"""
_URL = re.compile(f"{_QUOTED_URL}|{_BARE_URL}", re.I | re.S)
_URL_PARTS = re.compile(r"(\s*(?:[a-z][a-z0-9+.-]{1,30})?:[/\\]+)([^/\\?#]*)(.*)", re.I | re.S)
_REST = re.compile(r"[?#]|https?:[/\\]|:[/\\]{2}", re.I)  # of a URL: what is not shown of it
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf|api_org)_[A-Za-z0-9]{16,}")  # of the Hugging Face hub


def escape_controls(text: str, short: str = "\\x{:02x}") -> str:
    r"""`text` with control characters as escapes, such as \x1b or \u202e, except \n and \t.

    `short` is how those below U+0100 are written.
    """
    return _CONTROLS.sub(
        lambda found: (short if found[0] < "\u0100" else "\\u{:04x}").format(ord(found[0])), text
    )


def redact_url(url: str) -> str:
    """`url` without user name, password, query and fragment; any other text as it stands.

    A second URL in its path is left out as well.

    A password with an unescaped `/`, `?` or `#` ends the authority early. What is left of it
    then has no number for a port, and the host is what follows the last `@`.
    """
    match = _URL_PARTS.match(url)
    if match is None:
        return url
    scheme, authority, rest = match.groups()
    if "@" not in authority and not re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?", authority):
        if "@" in rest:
            return redact_url(scheme + rest.rpartition("@")[2])
        authority = authority.partition(":")[0]  # no port: it could be a password
    return scheme + authority.rpartition("@")[2] + _REST.split(rest, maxsplit=1)[0]


def redact(text: str) -> str:
    """`text` without the secrets of the URLs in it (see `redact_url`) and without hub tokens."""
    return _TOKEN.sub(r"\1_...", _URL.sub(_redact_match, text))


def _redact_match(found: re.Match[str]) -> str:
    quote, quoted, bare = found.group("quote", "quoted", "bare")
    if quoted is not None:
        return f"{quote}{redact_url(quoted)}{quote}"
    url = bare.rstrip("'\"`<>()[],.;:!")  # of the sentence around it
    return redact_url(url) + bare[len(url) :]


def cut_middle(text: str, limit: int) -> str:
    """`text` with its middle left out if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def format_message(text: str) -> str:
    """`text` as a message: one line, at most `MAX_MESSAGE` characters, all of it fit to print."""
    escaped = redact(escape_controls(redact(text)))  # again: an escape may look like a URL's part
    line = " ".join(part.strip() for part in escaped.split("\n"))
    return cut_middle(line.strip(), MAX_MESSAGE)


def format_error(error: object) -> str:
    """What `error` says, on one line of at most `MAX_QUOTE` characters; its type if nothing."""
    text = " ".join(redact(str(error)).split())
    return cut_middle(escape_controls(text), MAX_QUOTE) or type(error).__name__


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
        super().__init__(format_message(str(message)))


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
        super().__init__(format_message(str(message)))
