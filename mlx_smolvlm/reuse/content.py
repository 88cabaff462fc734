"""The content of a prompt, and a cache together with the content that it was computed from.

Two prompts may share cached work as far as their contents agree. All placeholders have the same
token id, so a content also has a digest of each picture or video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.media.encode import Medium


@dataclass(frozen=True)
class Span:
    """The placeholders of one medium: token indices [start, stop), and the medium's digest."""

    start: int
    stop: int
    digest: str


@dataclass(frozen=True)
class Content:
    """Token ids, int32 (L,), and the spans of the media among them, in order."""

    ids: np.ndarray
    spans: tuple[Span, ...] = ()

    def with_tokens(self, token_ids: Sequence[int]) -> Content:
        """A content with `token_ids`, which contain no placeholders, appended."""
        return Content(np.concatenate([self.ids, np.array(token_ids, np.int32)]), self.spans)

    def count_common(self, other: Content, most: int) -> int:
        """Length of the common prefix in tokens, at most `most`; never ends inside a medium."""
        length = count_common(self.ids[:most], other.ids[:most])
        for mine, theirs in zip_longest(self.spans, other.spans):
            starts = [span.start for span in (mine, theirs) if span is not None]
            if min(starts) >= length:
                break
            if mine != theirs or mine.stop > length:
                return min(starts)
        return length


def count_common(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the common prefix of the token ids `first` and `second`."""
    length = min(first.size, second.size)
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if different.size else length


def make_content(ids: np.ndarray, media: Sequence[Medium], placeholder: int, each: int) -> Content:
    """The content of a prompt.

    Args:
        ids: Token ids, int32 (L,).
        media: The media of the prompt, in order.
        placeholder: Token id of a placeholder.
        each: Placeholders per tile.
    """
    places = np.flatnonzero(ids == placeholder)
    spans, at = [], 0
    for medium in media:
        last = at + medium.num_tiles * each - 1
        spans.append(Span(int(places[at]), int(places[last]) + 1, medium.digest))
        at = last + 1
    return Content(ids, tuple(spans))


@dataclass
class CachedState:
    """A cache, and the content whose keys and values it holds."""

    content: Content
    cache: KVCache

    @property
    def num_tokens(self) -> int:
        """Number of tokens of `content` whose keys and values are in the cache."""
        return min(len(self.content.ids), self.cache.offset)

    def count_reusable(self, content: Content, pins: np.ndarray, most: int) -> int:
        """Number of tokens of `content`, at most `most`, that the cache can supply."""
        length = self.content.count_common(content, min(most, self.num_tokens))
        return length if self.cache.can_resume(length, pins) else 0

    def fork(self) -> CachedState:
        """An independent copy; see `KVCache.fork`."""
        return CachedState(self.content, self.cache.fork())
