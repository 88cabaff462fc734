"""Errors that a caller can act on.

Every message says what went wrong, with which value, and what to do next. The command line
prints only the message, without a traceback. A message is one line of limited length, and never
contains control characters, passwords or tokens, whatever it quotes.
"""

from __future__ import annotations

import re
import reprlib

MAX_MESSAGE = 2000  # characters of a message
MAX_QUOTE = 500  # characters of a quoted message of another library

# Control characters, except \n and \t, can control a terminal; bidirectional ones reorder the
# text; lone surrogates stand for bytes that are not text.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_QUOTED_URL = r"""(?P<quote>['"])(?P<quoted>[a-z][a-z0-9+.-]{0,30}:[/\\].*?)(?P=quote)"""
_BARE_URL = r"""(?P<bare>(?:https?:[/\\]|:[/\\]{2})\S*)"""
_URL = re.compile(f"{_QUOTED_URL}|{_BARE_URL}", re.I | re.S)
_URL_PARTS = re.compile(r"(\s*(?:[a-z][a-z0-9+.-]{1,30})?:[/\\]+)([^/\\?#]*)(.*)", re.I | re.S)
_HIDDEN_END = re.compile(r"[?#]|https?:[/\\]|:[/\\]{2}", re.I)  # where redaction cuts a URL off
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(hf|api_org)_[A-Za-z0-9]{16,}")  # Hugging Face tokens


def escape_controls(text: str, short: str = "\\x{:02x}") -> str:
    r"""`text` with control characters as escapes, such as \x1b or \u202e, except \n and \t.

    `short` is the format of characters below U+0100.
    """
    return _CONTROLS.sub(
        lambda match: (short if match[0] < "\u0100" else "\\u{:04x}").format(ord(match[0])), text
    )


def redact_url(url: str) -> str:
    """Remove user name, password, query, fragment and any second URL from `url`.

    Text that is not a URL is returned unchanged.

    A password with an unescaped `/`, `?` or `#` seems to end the host part early. Its beginning
    is then no valid port number, and the host follows the last `@`.
    """
    match = _URL_PARTS.match(url)
    if match is None:
        return url
    scheme, authority, rest = match.groups()
    if "@" not in authority and not re.fullmatch(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?", authority):
        if "@" in rest:
            return redact_url(scheme + rest.rpartition("@")[2])
        authority = authority.partition(":")[0]  # not a port; it could be a password
    return scheme + authority.rpartition("@")[2] + _HIDDEN_END.split(rest, maxsplit=1)[0]


def redact(text: str) -> str:
    """Remove hub tokens, and the secrets of URLs (see `redact_url`), from `text`."""
    return _TOKEN.sub(r"\1_...", _URL.sub(_redact_match, text))


def _redact_match(match: re.Match[str]) -> str:
    quote, quoted, bare = match.group("quote", "quoted", "bare")
    if quoted is not None:
        return f"{quote}{redact_url(quoted)}{quote}"
    url = bare.rstrip("'\"`<>()[],.;:!")  # punctuation of the sentence
    return redact_url(url) + bare[len(url) :]


def cut_middle(text: str, limit: int) -> str:
    """`text`, shortened in the middle if it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def format_message(text: str) -> str:
    """`text` as one printable line of at most `MAX_MESSAGE` characters, without secrets."""
    escaped = redact(escape_controls(redact(text)))  # twice: an escape may look like part of a URL
    line = " ".join(part.strip() for part in escaped.split("\n"))
    return cut_middle(line.strip(), MAX_MESSAGE)


def format_error(error: object) -> str:
    """The message of `error` on one line of at most `MAX_QUOTE` characters.

    The name of its type if the message is empty.
    """
    text = " ".join(redact(str(error)).split())
    return cut_middle(escape_controls(text), MAX_QUOTE) or type(error).__name__


_MAX_BITS = 4096


class _ShortRepr(reprlib.Repr):
    """Also writes huge integers: `repr` refuses those of more than 4,300 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 40
        self.maxlevel, self.maxdict, self.maxlist, self.maxarray = 2, 2, 3, 3

    def repr_int(self, x: int, level: int) -> str:
        if x.bit_length() > _MAX_BITS:
            return f"a number of {x.bit_length():,} bits"
        return super().repr_int(x, level)


_SHORT = _ShortRepr()


def shorten(value: object) -> str:
    """The `repr` of `value`, limited to about 40 characters, three elements and two levels.

    Plain `repr` would fill the screen with a long list and fail for a deeply nested one.
    """
    return _SHORT.repr(value)


class SmolVLMError(Exception):
    """Base class of the errors of this package."""

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


class MemoryLimitError(SmolVLMError):
    """The work does not fit into the memory limit, or into the machine."""


class ConstraintError(SmolVLMError):
    """An answer cannot be constrained to a schema or a regular expression."""


class DatasetError(SmolVLMError):
    """A line or a file of a dataset cannot be used."""


class TrainingError(SmolVLMError):
    """A training run cannot be started or resumed with its settings."""


class SmolVLMWarning(UserWarning):
    """A problem that a user should know of and that does not stop the work."""

    def __init__(self, message: object = "") -> None:
        super().__init__(format_message(str(message)))
