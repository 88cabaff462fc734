"""The numbers themselves: how far predictions, features and matrices lie apart.

Letters in shapes: L tokens to predict, D text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_smolvlm.convert.opened import Matrix
from mlx_smolvlm.logprobs import log_softmax, sum_last
from mlx_smolvlm.model import Model

HEAD_ROWS = 128  # tokens whose logits are held at once
BLOCK = 2**22  # elements of a matrix that are compared at once

Head = Callable[[mx.array], mx.array]


def head_of(model: Model) -> Head:
    """The output head of `model`, which needs nothing else of it."""
    if "lm_head" in model:
        head: Head = model.lm_head
    else:
        head = model.text_model.embed_tokens.as_linear
    return head


@dataclass(frozen=True)
class Predictions:
    """What two models say about the same tokens (L,), the reference first.

    Attributes:
        kl_nats: KL divergence of the second from the reference.
        nll_nats: Negative log-likelihoods of the true tokens, (2, L).
        likeliest: Token ids, (2, L).
    """

    kl_nats: np.ndarray
    nll_nats: np.ndarray
    likeliest: np.ndarray


def predictions(
    hidden: tuple[mx.array, mx.array], heads: tuple[Head, Head], targets: np.ndarray
) -> Predictions:
    """What two models say about `targets` (L,), from their last hidden states (L, D).

    Logits are computed for `HEAD_ROWS` tokens at a time.
    """
    divergences, nlls, likeliest = [], [], []
    for start in range(0, targets.size, HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        true = mx.array(targets[part])[:, None]
        logs = [log_softmax(head(states[part])) for states, head in zip(hidden, heads, strict=True)]
        divergence = sum_last(mx.exp(logs[0]) * (logs[0] - logs[1]))[:, 0]
        nll = mx.stack([-mx.take_along_axis(log, true, -1)[:, 0] for log in logs])
        best = mx.stack([mx.argmax(log, -1) for log in logs])
        mx.eval(divergence, nll, best)
        divergences.append(np.array(divergence))
        nlls.append(np.array(nll))
        likeliest.append(np.array(best))
    return Predictions(
        np.maximum(np.concatenate(divergences), 0),  # rounding can make 0 a little less
        np.concatenate(nlls, 1),
        np.concatenate(likeliest, 1),
    )


def cosines(a: mx.array, b: mx.array) -> np.ndarray:
    """Cosines of the angles between vectors of `a` and `b`, along the last axis, flat."""
    one, other = _vectors(a), _vectors(b)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    result: np.ndarray = np.minimum((one * other).sum(-1) / np.maximum(lengths, 1e-30), 1)
    return result


def relative_errors(a: mx.array, b: mx.array) -> np.ndarray:
    """Length of each vector of `b - a` over that of `a`, along the last axis, flat.

    Vectors are taken one by one since a few are very much longer than the others.
    """
    one, other = _vectors(a), _vectors(b)
    lengths = np.maximum(np.linalg.norm(one, axis=-1), 1e-30)
    errors: np.ndarray = np.linalg.norm(other - one, axis=-1) / lengths
    return errors


def _vectors(x: mx.array) -> np.ndarray:
    """The vectors along the last axis of `x`, in float64: near 1 a cosine needs the digits."""
    vectors: np.ndarray = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
    return vectors.astype(np.float64)


def relative_frobenius(a: Matrix, b: Matrix) -> float:
    """|b - a| / |a| in the Frobenius norm, over the rows and columns that both have.

    If `a` is all zeros, it is |b|.
    """
    total = difference = 0.0
    for one, other in _blocks(a, b):
        total += _squares(one)
        difference += _squares(other - one)
    return math.sqrt(difference / total) if total else math.sqrt(difference)


def _squares(x: mx.array) -> float:
    """The sum of the squares of `x`; millions of them lose digits in float32, a row does not."""
    return float(np.array((x * x).sum(-1)).sum(dtype=np.float64))


def _blocks(a: Matrix, b: Matrix) -> Iterator[tuple[mx.array, mx.array]]:
    """Rows of both in float32, some at a time."""
    rows, width = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    step = max(1, BLOCK // width)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield a.rows(start, stop)[:, :width], b.rows(start, stop)[:, :width]
