"""Sampling options, samplers, and log-probabilities of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal, TypedDict

import mlx.core as mx
import numpy as np

from mlx_smolvlm.records import read_integer, read_number

BLOCK = 256  # numbers added in sequence; about the square root of a vocabulary


def sum_last(values: mx.array) -> mx.array:
    """Return the sum of `values` (..., vocabulary) over the last axis, (..., 1), in blocks.

    Blocks bound the rounding error of the sum.
    """
    count = values.shape[-1] // BLOCK
    blocks = mx.unflatten(values[..., : count * BLOCK], -1, (count, BLOCK)).sum(-1)
    rest = values[..., count * BLOCK :].sum(-1, keepdims=True)
    return mx.concatenate([blocks, rest], -1).sum(-1, keepdims=True)


def log_normalizer(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Return the largest logit and the logarithm of the sum of exp(logits - largest).

    Their sum is the logsumexp. They are returned separately because adding them rounds: next to
    logits of 1e4, a float32 has no digits left for the logarithm. The largest logit is a constant
    in gradients.

    Args:
        logits: float32 (..., vocabulary).

    Returns:
        Two arrays, float32 (..., 1).
    """
    outputs: tuple[mx.array, mx.array] = _log_normalizer(logits)  # type: ignore[assignment]
    largest, log_sum = outputs
    return mx.stop_gradient(largest), log_sum


@mx.custom_function  # type: ignore[untyped-decorator]
def _log_normalizer(logits: mx.array) -> tuple[mx.array, mx.array]:
    """`log_normalizer` without its gradient."""
    largest = logits.max(-1, keepdims=True)
    return largest, mx.log(sum_last(mx.exp(logits - largest)))


@_log_normalizer.vjp  # type: ignore[untyped-decorator]
def _log_normalizer_vjp(
    logits: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> mx.array:
    """Recompute the softmax, since storing the terms of the sum would take as much as logits."""
    largest, log_sum = outputs
    return mx.exp(logits - largest - log_sum) * cotangents[1]


def log_softmax(logits: mx.array) -> mx.array:
    """Return the log-probabilities, float32, of `logits`; both are (..., vocabulary)."""
    logits = logits.astype(mx.float32)
    largest, log_sum = log_normalizer(logits)
    return (logits - largest) - log_sum


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Return cross-entropies in nats, float32 (...).

    Args:
        logits: (..., vocabulary).
        targets: Token ids (...).
    """
    logits = logits.astype(mx.float32)
    largest, log_sum = log_normalizer(logits)
    target_logits = mx.take_along_axis(logits, targets[..., None], -1)
    return (log_sum - (target_logits - largest))[..., 0]


MAX_DRAFT = 7  # tokens; with the one before them 8 rows, a pass that costs little more than one
SEED_LIMIT = 2**64  # seeds are smaller
# Outside of this range float32 overflows; at its ends sampling is already greedy and uniform.
TEMPERATURE_RANGE = (1e-6, 1e6)
LEAST_TOP_P = 1e-30  # smaller values may be 0 in float32; only the likeliest token is left anyway

Sampler = Callable[[mx.array], mx.array]
"""Returns a token id (1,), given `logits` (vocabulary,)."""
RowSampler = Callable[[mx.array, np.ndarray], mx.array]
"""Returns token ids (B,), given `logits` (B, vocabulary) and lengths of the answers (B,)."""


@dataclass(frozen=True)
class Sampling:
    """Options for generating an answer. The default is greedy, as the checkpoints recommend.

    Attributes:
        temperature: 0 always takes the most probable token; higher values vary more.
        top_p: Keep the most probable tokens up to this total probability, in (0, 1].
        top_k: Keep this number of most probable tokens; 0, or the size of the vocabulary or
            more, keeps all.
        min_p: Drop tokens below this share of the highest probability, in [0, 1). This and the
            two above use the probabilities at temperature 1, as in mlx-lm; the temperature is
            then applied to the tokens that are kept.
        max_tokens: Maximum length of the answer, in tokens.
        seed: Makes a sampled answer repeatable, from 0 to 2**64 - 1; None varies each time.
        stop: Texts that end the answer; they are not part of it.
        schema: A JSON Schema, as an object or a text, or a pydantic model. The answer is JSON
            that fits it, and `Reply.parsed` is its value.
        regex: A regular expression that the whole answer matches.
        draft: How many tokens are guessed ahead at most, 1 to 7. Guesses are copied from the
            prompt and the answer, and checked together in one forward pass, which is faster
            where text repeats. The answer stays the same. "auto" drafts answers with a schema
            or a regular expression, and documents in DocTags, up to 7 tokens; "off" drafts
            none. Answers that are sampled, at a temperature above 0, are never drafted.

    Raises:
        ValueError: A value has the wrong type or is out of range; no answer can fit the schema
            or the regular expression; or both are given.
        ConstraintError: A schema or a regular expression is given, and llguidance is not
            installed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 1024
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: dict[str, Any] | type[Any] | str | None = None
    regex: str | None = None
    draft: int | Literal["auto", "off"] = "auto"

    def __post_init__(self) -> None:
        for name, accepts, limits in (
            ("temperature", lambda x: 0 <= x < math.inf, "a number, 0 or above"),
            ("top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
            ("min_p", lambda x: 0 <= x < 1, "a number, at least 0 and below 1"),
        ):
            self._set(name, read_number(name, getattr(self, name), accepts, limits))
        for name, accepts, limits in (
            ("top_k", lambda x: x >= 0, "an integer, 0 or above"),
            ("max_tokens", lambda x: x >= 1, "an integer, 1 or above"),
            ("seed", lambda x: 0 <= x < SEED_LIMIT, "an integer from 0 to 2**64 - 1"),
        ):
            if name != "seed" or self.seed is not None:
                self._set(name, read_integer(name, getattr(self, name), accepts, limits))
        self._set("stop", _read_stop(self.stop))
        if self.draft not in ("auto", "off"):
            limits = f'"auto", "off", or an integer from 1 to {MAX_DRAFT}'
            accepts = lambda x: 1 <= x <= MAX_DRAFT  # noqa: E731
            self._set("draft", read_integer("draft", self.draft, accepts, limits))
        if self.schema is not None and self.regex is not None:
            raise ValueError("schema and regex are both given; give only one of them")
        if self.is_constrained:
            from mlx_smolvlm.generate.json_schema import check_constraint

            check_constraint(self.schema, self.regex)

    def _set(self, name: str, value: object) -> None:
        """Set an attribute of this frozen class."""
        object.__setattr__(self, name, value)

    @property
    def is_constrained(self) -> bool:
        """Whether the answer must fit a schema or a regular expression."""
        return self.schema is not None or self.regex is not None


class SamplingOptions(TypedDict, total=False):
    """The attributes of `Sampling` as keyword arguments, for type checkers and editors."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int
    seed: int | None
    stop: Iterable[str]
    schema: dict[str, Any] | type[Any] | str | None
    regex: str | None
    draft: int | Literal["auto", "off"]


def choose_sampling(
    sampling: Sampling | None, options: SamplingOptions, default: Sampling
) -> Sampling:
    """Return `sampling` if it is given, else `default` with its attributes replaced by `options`.

    Raises:
        ValueError: Both are given, or an option is out of range.
        TypeError: An option is unknown.
    """
    unknown = [name for name in options if name not in SamplingOptions.__annotations__]
    if unknown:
        names = ", ".join(SamplingOptions.__annotations__)
        raise TypeError(f"there is no argument {unknown[0]!r}; sampling options are {names}")
    if sampling is None:
        return replace(default, **options)  # type: ignore[arg-type]
    if options:
        raise ValueError(
            f"sampling and {', '.join(options)} are both given; set them in sampling, or leave "
            "sampling out"
        )
    return sampling


def _read_stop(stop: object) -> tuple[str, ...]:
    """Return stop texts as a tuple.

    Raises:
        ValueError: `stop` is a single text or not a list of texts, or a text is empty.
    """
    texts = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else ("",)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"stop is {stop!r:.100}; it must be a list of texts, none empty")
    return texts


def make_sampler(sampling: Sampling) -> Sampler:
    """Return the sampler that `sampling` describes, for one answer: with a seed it has a state.

    A seed gives the same tokens as `mx.random.seed` and mlx-lm's sampler, but does not touch
    MLX's global random state, so that answers in other threads do not change this one.
    """
    if sampling.temperature == 0:
        return lambda logits: mx.argmax(logits, keepdims=True)
    draw = _make_draw(sampling)
    if sampling.seed is None:
        return lambda logits: draw(logits[None], None)
    keys = map(RandomKeys(sampling.seed).get, count())
    return lambda logits: draw(logits[None], next(keys))


def make_row_sampler(sampling: Sampling) -> RowSampler:
    """Return the sampler that `sampling` describes, for the next tokens of several answers.

    With a seed, each answer is sampled as it would be alone: the n-th tokens of all answers use
    the same random key. Without a seed, they are sampled independently.
    """
    if sampling.temperature == 0:
        return lambda logits, _: mx.argmax(logits, axis=-1)
    draw = _make_draw(sampling)
    if sampling.seed is None:
        return lambda logits, _: draw(logits, None)
    keys = RandomKeys(sampling.seed)

    def draw_rows(logits: mx.array, counts: np.ndarray) -> mx.array:
        rows = zip(logits, counts.tolist(), strict=True)
        return mx.concatenate([draw(row[None], keys.get(number)) for row, number in rows])

    return draw_rows


def _make_draw(sampling: Sampling) -> Callable[[mx.array, mx.array | None], mx.array]:
    """Return a function from `logits` (B, vocabulary) and a random key to token ids (B,).

    The filters and their order are mlx-lm's. Without a key, MLX's global random state is used.
    """
    low, high = TEMPERATURE_RANGE
    inverse = 1 / min(max(sampling.temperature, low), high)
    top_p = max(sampling.top_p, LEAST_TOP_P)

    def draw(logits: mx.array, key: mx.array | None) -> mx.array:
        logprobs = log_softmax(logits)
        if top_p < 1:
            logprobs = keep_top_p(logprobs, top_p)
        if sampling.min_p:
            logprobs = keep_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logprobs.shape[-1]:
            logprobs = keep_top_k(logprobs, sampling.top_k)
        return mx.random.categorical(logprobs * inverse, key=key)

    return draw


def keep_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Return `logprobs` (B, vocabulary) with -inf outside of the likeliest tokens up to `top_p`.

    A token is kept if those that are likelier than it have less than `top_p` of the total
    probability. Equally likely tokens are kept or dropped together.
    """
    ascending = mx.sort(logprobs, axis=-1)
    probabilities = mx.exp(ascending)
    above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    total = above[..., :1] + probabilities[..., :1]
    dropped = (above >= top_p * total).sum(-1, keepdims=True)
    threshold = mx.take_along_axis(ascending, dropped, axis=-1)
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def keep_min_p(logprobs: mx.array, min_p: float) -> mx.array:
    """Return `logprobs` (B, vocabulary) with -inf below `min_p` times the highest probability."""
    threshold = logprobs.max(-1, keepdims=True) + math.log(min_p)
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def keep_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Return `logprobs` (B, vocabulary) with -inf outside of the `top_k` likeliest tokens."""
    dropped = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, dropped, mx.array(-mx.inf, logprobs.dtype), axis=-1)


class RandomKeys:
    """The keys that MLX draws with after `mx.random.seed(seed)`, one a draw."""

    def __init__(self, seed: int) -> None:
        self._keys: list[mx.array] = []
        self._state = mx.random.key(seed)

    def get(self, number: int) -> mx.array:
        """Return the key of the draw `number`, counted from 0."""
        while len(self._keys) <= number:
            self._state, key = mx.random.split(self._state)
            self._keys.append(key)
        return self._keys[number]
