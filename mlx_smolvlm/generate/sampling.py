"""Sampling options, samplers, and log-probabilities of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypedDict

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
    """Return the sampler that `sampling` describes.

    A seed sets MLX's global random state, as in mlx-lm.
    """
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    if sampling.temperature == 0:
        return lambda logits: mx.argmax(logits, keepdims=True)
    draw = _make_draw(sampling)
    return lambda logits: draw(logits[None])


def _make_draw(sampling: Sampling) -> Sampler:
    """Return a function from `logits` (B, vocabulary) to independent token ids (B,).

    The samplers are mlx-lm's. Importing them takes more than a second, so they are imported only
    when needed.
    """
    from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

    low, high = TEMPERATURE_RANGE

    @cache
    def chain(vocab_size: int) -> Sampler:
        sampler: Sampler = mlx_lm_sampler(
            temp=min(max(sampling.temperature, low), high),
            top_p=max(sampling.top_p, LEAST_TOP_P) if sampling.top_p < 1 else 0.0,
            min_p=sampling.min_p,
            top_k=sampling.top_k if sampling.top_k < vocab_size else 0,  # mlx-lm's limit
        )
        return sampler

    def draw(logits: mx.array) -> mx.array:
        with preserve_random_state():
            return chain(logits.shape[-1])(log_softmax(logits))

    return draw


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore MLX's random state if the body raises.

    mlx-lm's samplers are compiled with that state as an input. While MLX traces such a function,
    the state is a placeholder. If the function raises (an interrupt is enough), it remains one,
    and all later sampling in the process fails.
    """
    state: mx.array = mx.random.state[0]  # type: ignore[index]
    try:
        yield
    except BaseException:
        mx.random.seed(_compute_seed(state))
        raise


def make_row_sampler(sampling: Sampling) -> RowSampler:
    """Return the sampler that `sampling` describes, for the next tokens of several answers.

    With a seed, each answer is sampled as it would be alone: the n-th tokens of all answers use
    the same random state. Without a seed, they are sampled independently.
    """
    if sampling.temperature == 0:
        return lambda logits, _: mx.argmax(logits, axis=-1)
    if sampling.seed is None:
        draw_all = _make_draw(sampling)
        return lambda logits, _: draw_all(logits)
    sampler, states = make_sampler(sampling), RandomStates(sampling.seed)

    def draw(logits: mx.array, counts: np.ndarray) -> mx.array:
        token_ids = []
        for row, count in zip(logits, counts.tolist(), strict=True):
            mx.random.seed(states.seed_after(count))
            token_ids.append(sampler(row))
        return mx.concatenate(token_ids)

    return draw


class RandomStates:
    """MLX's random states at a seed and after each draw, as the seeds that set them.

    States are computed on the CPU, so that they do not wait for work on a GPU.
    """

    def __init__(self, seed: int) -> None:
        self._seeds, self._state = [seed], mx.random.key(seed)

    def seed_after(self, draws: int) -> int:
        """Return the seed that sets the random state after `draws` draws."""
        while len(self._seeds) <= draws:
            self._state = mx.random.split(self._state, stream=mx.cpu)[0]
            self._seeds.append(_compute_seed(self._state))
        return self._seeds[draws]


def _compute_seed(state: mx.array) -> int:
    """Return the seed that sets MLX's random state to `state`, the two halves of 64 bits."""
    high, low = np.array(state).tolist()
    seed: int = high << 32 | low
    return seed
