"""Log-probabilities over a vocabulary, right to 1e-6.

`mx.logsumexp` and `mx.sum` are not: on the CPU each lane of a vector adds up thousands of
float32 numbers one after the other, and the sum over 49,280 of them is off by up to 2e-4 of
itself. Here they are added in blocks first, so that no number is added to one that is
thousands of times larger.
"""

from __future__ import annotations

import mlx.core as mx

BLOCK = 256  # numbers that are added one after the other; about the root of a vocabulary


def sum_last(values: mx.array) -> mx.array:
    """The sum of `values` (..., vocabulary) over the last axis, (..., 1)."""
    count = values.shape[-1] // BLOCK
    blocks = mx.unflatten(values[..., : count * BLOCK], -1, (count, BLOCK)).sum(-1)
    rest = values[..., count * BLOCK :].sum(-1, keepdims=True)
    return mx.concatenate([blocks, rest], -1).sum(-1, keepdims=True)


def log_normalizer(logits: mx.array) -> tuple[mx.array, mx.array]:
    """The largest of `logits`, and the logarithm of the sum of exp(logits - largest).

    Both are (..., 1), and their sum is the logsumexp. They come apart because adding them
    rounds: next to logits of 1e4 a float32 has no digits left for the logarithm. The largest
    counts as a constant in gradients.

    Args:
        logits: float32 (..., vocabulary).
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
    """The softmax, computed anew: what the sum was made of would take as much memory as logits."""
    largest, log_sum = outputs
    return mx.exp(logits - largest - log_sum) * cotangents[1]


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities (..., vocabulary) of `logits` (..., vocabulary), float32."""
    logits = logits.astype(mx.float32)
    largest, log_sum = log_normalizer(logits)
    return (logits - largest) - log_sum


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropies (...) in nats of `targets` (...), float32.

    Args:
        logits: (..., vocabulary).
        targets: Token ids.
    """
    logits = logits.astype(mx.float32)
    largest, log_sum = log_normalizer(logits)
    chosen = mx.take_along_axis(logits, targets[..., None], -1)
    return (log_sum - (chosen - largest))[..., 0]
