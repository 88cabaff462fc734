"""Pictures and videos that a question names by their paths: "What is in photo.png?".

They are attached, and the question says "the picture" instead, since a model knows the pictures
that it sees, but not their names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mlx_smolvlm.cli.args import decode_text
from mlx_smolvlm.cli.many_pictures import expand_sources
from mlx_smolvlm.cli.media import is_url
from mlx_smolvlm.cli.output import say
from mlx_smolvlm.cli.paths import (
    SUFFIXES,
    decode_file_url,
    expand_home,
    find_similar_files,
    is_video,
)
from mlx_smolvlm.errors import MediaError, redact_url

MAX_LENGTH = 1 << 14  # characters of a text in which paths are looked for
MAX_QUESTION = 500  # characters; a longer text may quote names of files that are not meant
MAX_NAMES = 6  # of attached files in a message
_MAX_WORDS = 24  # of a path with spaces
_MAX_SUFFIXES = 3  # within a path, as in "clip.mp4 at 0.10.png"
_MAX_PATH = 4096  # characters
_KINDS = "|".join(one[1:] for one in SUFFIXES)
_SUFFIX = re.compile(rf"(?<=[^\s./\\'\"])\.(?:{_KINDS})(?![\w-]|\.\w)", re.IGNORECASE)
# Before a word: quotation marks and commas of other languages, too.
_BEFORE = r"\s'\"`(\[{<>=,;|\u201c\u2018\u201e\u00ab\u300c\u300e\uff08\u3010\u3001\uff0c"
_WORD_START = re.compile(rf"(?:^|(?<=[{_BEFORE}:]))(?=\S)")
_LAST_WORD = re.compile(rf"(?:\\.|[^{_BEFORE}\\])+\Z")
_URL = re.compile(r"https?://\S+\Z", re.IGNORECASE)
_QUOTES = "'\"`"
_LAST_NOUN = re.compile(r"(\w+)\s*\Z")
_MAX_NOUN = 32  # characters that are searched for it
_LOOSE_ENDS = " \t\n,;:-\u2013\u2014"  # between paths and a sentence
_SEPARATOR = re.compile(r"[\s,;]*(?:(?:and|or|&)\s+)?", re.IGNORECASE)
_DETERMINERS = ("the", "this", "that", "these", "those", "my", "our", "a", "an", "each", "both")
_NOUNS = r"(?:picture|image|photo|photograph|screenshot|file|video|clip|movie|frame)s?"
QUESTIONS = {  # for paths without a question, by their kinds: pictures, videos
    (True, False): ("What is in this picture?", "What is in these pictures?"),
    (False, True): ("What happens in this video?", "What happens in these videos?"),
    (True, True): ("What is in these pictures and videos?",) * 2,
}


@dataclass(frozen=True)
class Mention:
    """A path in a question.

    Attributes:
        start: Where it begins, with its quotation mark.
        end: Where it ends.
        source: The path or URL, unquoted.
        is_there: Whether it is an existing file.
    """

    start: int
    end: int
    source: str
    is_there: bool


@dataclass(frozen=True)
class TypedQuestion:
    """A question, and the pictures and videos that it names.

    Attributes:
        text: The question without paths. It is a general one where only paths were typed.
        images: Paths of pictures, in order.
        videos: Paths of videos, in order.
        missing: Names of pictures or videos that are not there, and URLs.
        named: Those of `images` and `videos` that the question names.
    """

    text: str
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    named: tuple[str, ...] = ()


def read_typed_question(
    words: Sequence[str], num_images: int = 0, num_videos: int = 0, has_media: bool = False
) -> TypedQuestion:
    """Find the pictures and videos that a typed question names.

    Args:
        words: Parts of the question, to be joined by spaces. One that is an existing picture or
            video as a whole is a path, whatever its name contains, and so is the URL of one. In
            the others, paths may be quoted, escaped or file:// URLs.
        num_images: Number of pictures that come before those in the question.
        num_videos: Likewise of videos.
        has_media: Whether the model sees other pictures or videos. If so, a name that is not there
            may only be talked about, unless it has a folder, resembles the name of a file, or is
            one of `words` beside a whole question.

    Raises:
        MediaError: A picture or video that is meant does not exist.
    """
    text = " ".join(words)
    mentions: list[Mention] = []
    start = 0
    are_apart = all(_is_medium(one) or _is_name(one) or len(one.split()) > 1 for one in words)
    for word in words:
        end = start + len(word)
        if _is_medium(word):
            mentions.append(Mention(start, end, word, True))
        elif len(word) <= MAX_LENGTH:
            mentions += find_mentions(text, start, end)
        start = end + 1
    there = [one for one in mentions if one.is_there]
    missing = [one for one in mentions if not one.is_there]
    has_media = has_media or bool(there or num_images or num_videos)
    for one in missing:
        is_alone = are_apart and one.source in words and not is_url(one.source)
        is_meant = len(text) <= MAX_QUESTION and (not has_media or _is_meant(one.source))
        if is_alone or is_meant:
            raise MediaError(describe_missing(one.source))
    if not there:
        return TypedQuestion(text, missing=tuple(one.source for one in missing))
    images = tuple(one.source for one in there if not is_video(one.source))
    videos = tuple(one.source for one in there if is_video(one.source))
    return TypedQuestion(
        replace_mentions(text, there, num_images, num_videos),
        images,
        videos,
        tuple(one.source for one in missing),
        tuple(one.source for one in there),
    )


def read_arguments(
    arguments: Sequence[str], images: Sequence[str], videos: Sequence[str]
) -> TypedQuestion:
    """Join the words of PROMPT, and find the pictures and videos that they name.

    `-i *.png "What?"`, of which the shell makes `-i a.png b.png "What?"`, works, too.

    Args:
        arguments: The words of PROMPT.
        images: What `--image` gives; folders and patterns are expanded.
        videos: What `--video` gives.

    Returns:
        The question with all pictures and videos, the given ones first.

    Raises:
        MediaError: A picture or video that is meant does not exist, or a folder holds none.
        typer.BadParameter: An argument is not valid UTF-8 text.
    """
    for one in arguments:
        if "/" in one and os.path.isdir(expand_home(one)):
            raise MediaError(f"{one!r} is a folder; give it with -i")
    images = expand_sources(images)
    words = [one if _is_medium(one) else decode_text("PROMPT", one) for one in arguments]
    typed = read_typed_question(words, len(images), len(videos))
    return replace(typed, images=(*images, *typed.images), videos=(*videos, *typed.videos))


def _is_medium(argument: str) -> bool:
    """Return whether `argument` as a whole is an existing picture or video, or the URL of one."""
    if not argument.lower().endswith(SUFFIXES):
        return False
    is_address = is_url(argument) and len(argument.split()) == 1
    return is_address or os.path.isfile(expand_home(argument))


def _is_name(argument: str) -> bool:
    """Return whether `argument` is a word that could be the name of a picture or video."""
    return argument.lower().endswith(SUFFIXES) and len(argument.split()) == 1


def announce_media(typed: TypedQuestion) -> None:
    """Say on stderr which pictures and videos the question names, and what is asked."""
    missing = list(dict.fromkeys(typed.missing))
    for source in missing[:MAX_NAMES]:
        is_not = "is a URL; -i or -v fetches it" if is_url(source) else "does not exist"
        say(f"hint: {redact_url(source)} is not attached, since it {is_not}", dim=True)
    if len(missing) > MAX_NAMES:
        say(f"hint: {len(missing) - MAX_NAMES} more are not attached", dim=True)
    if typed.named:
        names = ", ".join(map(redact_url, typed.named[:MAX_NAMES]))
        rest = len(typed.named) - MAX_NAMES
        text = typed.text[:MAX_QUESTION]
        text += " ..." if len(text) < len(typed.text) else ""
        say(
            f"attached {names}{f' and {rest} more' if rest > 0 else ''}; asking: {text}",
            dim=True,
        )


def describe_missing(source: str) -> str:
    """Return the message for a named picture or video that is not a file."""
    if is_url(source):
        return f"{redact_url(source)} is not fetched from within a question; give it with -i or -v"
    path = expand_home(source)
    if os.path.isdir(path):
        return f"{source!r} is a folder; give it with -i"
    if os.path.lexists(path):
        return f"{source!r} is not a file that can be read"
    near = find_similar_files(source)
    advice = f"did you mean {near[0]!r}?" if near else "check the path"
    suffix = os.path.splitext(source)[1]
    return f"{source!r} does not exist; {advice} (if no file is meant, leave out {suffix!r})"


def _is_meant(source: str) -> bool:
    """Return whether a name that is not there is a mistyped path: it has a folder, or resembles."""
    if is_url(source):
        return False
    return "/" in source or source.startswith("~") or bool(find_similar_files(source))


def find_mentions(text: str, begin: int = 0, stop: int | None = None) -> Iterator[Mention]:
    """Yield the paths in `text[begin:stop]` that have a suffix of `SUFFIXES`.

    A path may contain unescaped spaces if it exists, as when it is pasted.
    """
    stop = len(text) if stop is None else stop
    ends = [match.end() for match in _SUFFIX.finditer(text, begin, stop)]
    for number, end in enumerate(ends):
        if end <= begin:  # within the last path
            continue
        if url := _URL.search(text, begin, end):
            mention = Mention(url.start(), end, text[url.start() : end], False)
        elif found := _find_existing(text, begin, ends[number : number + _MAX_SUFFIXES]):
            mention = found
        elif text[end : end + 1] in ("/", "\\"):  # of a folder or a part of a name, so far
            continue
        else:
            start = _find_word_start(text, begin, end)
            source = decode_file_url(_unescape(text[start:end]))
            mention = _include_quotes(text, Mention(start, end, source, False))
        yield mention
        begin = max(mention.end, end)


def _find_existing(text: str, begin: int, ends: Sequence[int]) -> Mention | None:
    """Return the longest path of a file that ends at one of `ends`; None if there is none."""
    begin = max(begin, ends[0] - _MAX_PATH)
    starts = [one.start() for one in _WORD_START.finditer(text, begin, ends[0])]
    for start in starts[-_MAX_WORDS:]:
        for end in reversed(ends):
            if path := _find_file(text[start:end]):
                return _include_quotes(text, Mention(start, end, path, True))
    return None


def _find_file(raw: str) -> str | None:
    """Return the path of an existing file that was typed as `raw`; None if there is none."""
    for path in (raw, _unescape(raw), decode_file_url(raw)):
        if os.path.isfile(expand_home(path)):
            return path
    return None


def _unescape(raw: str) -> str:
    return re.sub(r"\\(.)", r"\1", raw)


def _find_word_start(text: str, begin: int, end: int) -> int:
    """Return where the word that ends at `end` begins, or the quoted text."""
    quote = text[end : end + 1]
    if quote and quote in _QUOTES:
        start = text.rfind(quote, begin, end)
        if start >= 0 and _WORD_START.match(text, start):
            return start + 1
    word = _LAST_WORD.search(text, begin, end)
    return begin if word is None else word.start()


def _include_quotes(text: str, mention: Mention) -> Mention:
    """Return `mention` with the quotation marks around it, if it has them."""
    start, end = mention.start, mention.end
    quote = text[end : end + 1]
    if start and quote and quote in _QUOTES and text[start - 1] == quote:
        return Mention(start - 1, end + 1, mention.source, mention.is_there)
    return mention


def replace_mentions(
    text: str, mentions: Sequence[Mention], num_images: int = 0, num_videos: int = 0
) -> str:
    """Return `text` with words instead of paths, such as "the picture" or "video 2".

    Paths before or after the sentences are left out, if none is within one; if nothing else
    remains, the text is a general question.
    """
    names, num_images, num_videos = _name_media(mentions, num_images, num_videos)
    first, last = _count_outside(text, mentions)
    if first + last < len(mentions):  # one within a sentence, which may be compared to the others
        first = last = 0
    position = mentions[first - 1].end if first else 0
    end = mentions[-last].start if last else len(text)
    parts = []
    for one, name in list(zip(mentions, names, strict=True))[first : len(mentions) - last]:
        parts.append(_append_name(text[position : one.start], name))
        position = one.end
    result = "".join([*parts, text[position:end]])
    result = result.lstrip(_LOOSE_ENDS) if first else result
    result = result.rstrip(_LOOSE_ENDS) if last else result
    if re.search(r"\w", result):
        return re.sub(r"[ \t]{2,}", " ", result)
    question = QUESTIONS[num_images > 0, num_videos > 0]
    return question[num_images + num_videos > 1]


def _name_media(
    mentions: Sequence[Mention], num_images: int, num_videos: int
) -> tuple[list[str], int, int]:
    """Return a name for each of `mentions`, and the numbers of pictures and videos in all."""
    videos = [is_video(one.source) for one in mentions]
    counts = {False: num_images, True: num_videos}
    totals = {kind: count + videos.count(kind) for kind, count in counts.items()}
    names = []
    for kind in videos:
        counts[kind] += 1
        noun = "video" if kind else "picture"
        names.append(f"the {noun}" if totals[kind] == 1 else f"{noun} {counts[kind]}")
    return names, totals[False], totals[True]


def _count_outside(text: str, mentions: Sequence[Mention]) -> tuple[int, int]:
    """Return how many of `mentions` stand before the first sentence, and behind the last one."""
    first, position = 0, 0
    while first < len(mentions) and _SEPARATOR.fullmatch(text, position, mentions[first].start):
        position = mentions[first].end
        first += 1
    last, position = 0, len(text)
    while last < len(mentions) - first:
        one = mentions[-1 - last]
        if _SEPARATOR.fullmatch(text, one.end, position) is None:
            break
        position = one.start
        last += 1
    before = text[:position].rstrip(" \t")
    return first, last if before.endswith((".", "?", "!", ":", "\n")) else 0


def _append_name(before: str, name: str) -> str:
    """Return `before` and `name`, without an article or noun that the sentence has already."""
    word = _LAST_NOUN.search(before, max(0, len(before) - _MAX_NOUN))
    if word and re.fullmatch(_NOUNS, word[1], re.IGNORECASE) and name.startswith("the "):
        return before.rstrip()
    if word and word[1].lower() in _DETERMINERS:
        name = name.removeprefix("the ")
    return before + name
