"""Tokens by what they mean, and the cached keys and values of them.

Equal contents may share cached work. Placeholders are equal if the pictures or videos behind
them are, whatever their ids; so another picture in the same place is a different content.
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
    """Placeholders from `start` up to `stop`, and the digest of what they stand for."""

    start: int
    stop: int
    digest: str


@dataclass(frozen=True)
class Content:
    """Tokens by what they mean: `ids` int32 (L,), and the spans of their placeholders."""

    ids: np.ndarray
    spans: tuple[Span, ...] = ()

    def with_tokens(self, token_ids: Sequence[int]) -> Content:
        """These tokens and then `token_ids`, which are no placeholders."""
        return Content(np.concatenate([self.ids, np.array(token_ids, np.int32)]), self.spans)

    def count_common(self, other: Content, most: int) -> int:
        """How many tokens both begin with, at most `most`; never a part of a medium."""
        length = count_common(self.ids[:most], other.ids[:most])
        for mine, theirs in zip_longest(self.spans, other.spans):
            starts = [span.start for span in (mine, theirs) if span is not None]
            if min(starts) >= length:
                break
            if mine != theirs or mine.stop > length:
                return min(starts)
        return length


def count_common(first: np.ndarray, second: np.ndarray) -> int:
    """Tokens that the ids `first` and `second` begin with both."""
    length = min(first.size, second.size)
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if different.size else length


def make_content(ids: np.ndarray, media: Sequence[Medium], placeholder: int, each: int) -> Content:
    """The content of a prompt `ids` (L,) with `media`, of `each` placeholders a tile."""
    places = np.flatnonzero(ids == placeholder)
    spans, at = [], 0
    for medium in media:
        last = at + medium.num_tiles * each - 1
        spans.append(Span(int(places[at]), int(places[last]) + 1, medium.digest))
        at = last + 1
    return Content(ids, tuple(spans))


@dataclass
class CachedState:
    """A cache, and the content that it holds keys and values of."""

    content: Content
    cache: KVCache

    @property
    def num_tokens(self) -> int:
        """Tokens that are known and whose keys and values are there."""
        return min(len(self.content.ids), self.cache.offset)

    def count_reusable(self, content: Content, pins: np.ndarray, most: int) -> int:
        """How many tokens of `content`, at most `most`, can be taken from here."""
        length = self.content.count_common(content, min(most, self.num_tokens))
        return length if self.cache.can_resume(length, pins) else 0

    def fork(self) -> CachedState:
        """The same, to go on with by itself."""
        return CachedState(self.content, self.cache.fork())
