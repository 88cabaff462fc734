"""How the next token is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

Sampler = Callable[[mx.array], mx.array]
"""Takes `logits` (vocabulary,), gives a token id (1,)."""
RowSampler = Callable[[mx.array, np.ndarray], mx.array]
"""Takes `logits` (B, vocabulary) and how many tokens each answer has (B,), gives token ids (B,)."""


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

    Raises:
        ValueError: A value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 1024
    seed: int | None = None
    stop: tuple[str, ...] = ()

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


def make_row_sampler(sampling: Sampling) -> RowSampler:
    """The sampler that `sampling` describes, for the next tokens of several answers.

    With a seed, each answer is drawn as it would be alone: the n-th tokens of all are
    drawn from the same random state. Without one, they are drawn independently.
    """
    if sampling.temperature == 0:
        return lambda logits, _: mx.argmax(logits, axis=-1)
    sampler = make_sampler(sampling)
    if sampling.seed is None:
        return lambda logits, _: mx.concatenate([sampler(row) for row in logits])
    states = RandomStates(sampling.seed)

    def draw(logits: mx.array, counts: np.ndarray) -> mx.array:
        token_ids = []
        for row, count in zip(logits, counts.tolist(), strict=True):
            mx.random.seed(states.after(count))
            token_ids.append(sampler(row))
        return mx.concatenate(token_ids)

    return draw


class RandomStates:
    """MLX's random state at a seed and after each draw, as the seeds that set it.

    A state is two halves of 64 bits. They are computed on the CPU, so that nothing waits
    for what a GPU is at.
    """

    def __init__(self, seed: int) -> None:
        self._seeds, self._state = [seed], mx.random.key(seed)

    def after(self, draws: int) -> int:
        """The seed of the state after so many draws."""
        while len(self._seeds) <= draws:
            self._state = mx.random.split(self._state, stream=mx.cpu)[0]
            high, low = np.array(self._state).tolist()
            self._seeds.append(high << 32 | low)
        return self._seeds[draws]
