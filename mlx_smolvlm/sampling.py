"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

Sampler = Callable[[mx.array], mx.array]
"""Takes `logits` (vocabulary,), gives a token id (1,)."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is generated; the default is greedy, as the checkpoints ask for.

    Attributes:
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: Keep the likeliest tokens up to this share of the probability, in (0, 1].
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        min_p: Drop tokens below this share of the likeliest token's probability, in [0, 1).
        max_tokens: The answer's length at most, in tokens.
        seed: Repeats a sampled answer; None is a new one each time.
        stop: Texts that end the answer; they are not part of it.
        schema: A JSON Schema, as an object or a text, or a pydantic model, that the
            answer fits; `Reply.parsed` is its value.
        regex: A regular expression that the whole answer matches.

    Raises:
        ValueError: A value outside its range, a schema or an expression that no answer can
            be held to, or both.
        ConstraintError: There is a schema or an expression, and llguidance is not installed.
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
        checks = (
            (0 <= self.temperature < float("inf"), "temperature", "0 or above"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.top_k >= 0, "top_k", "0 or above"),
            (0 <= self.min_p < 1, "min_p", "at least 0 and below 1"),
            (self.max_tokens >= 1, "max_tokens", "1 or above"),
            (self.seed is None or self.seed >= 0, "seed", "0 or above"),
            (not isinstance(self.stop, str) and all(self.stop), "stop", "texts, none empty"),
        )
        for holds, name, range_ in checks:
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {range_}")
        if self.schema is not None and self.regex is not None:
            raise ValueError("schema and regex are both given; an answer is held to one of them")
        if self.is_constrained:
            from mlx_smolvlm.schema import check

            check(self.schema, self.regex)

    @property
    def is_constrained(self) -> bool:
        """Whether the answer is held to a schema or a regular expression."""
        return self.schema is not None or self.regex is not None


def make_sampler(sampling: Sampling) -> Sampler:
    """The sampler that `sampling` describes.

    Greedy needs nothing else. Other samplers are mlx-lm's; importing them takes
    more than a second, so it happens here and only then. A seed sets MLX's global
    random state, as mlx-lm does.
    """
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    if sampling.temperature == 0:
        return lambda logits: mx.argmax(logits, keepdims=True)
    from mlx_lm.sample_utils import make_sampler as mlx_lm_sampler

    sample = mlx_lm_sampler(
        temp=sampling.temperature,
        top_p=sampling.top_p if sampling.top_p < 1 else 0.0,
        min_p=sampling.min_p,
        top_k=sampling.top_k,
    )

    def draw(logits: mx.array) -> mx.array:
        logits = logits[None].astype(mx.float32)
        token_id: mx.array = sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        return token_id

    return draw
