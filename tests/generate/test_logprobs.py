"""Log-probabilities over a whole vocabulary are those of NumPy in float64."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm.convert.compare.observe import compare_predictions
from mlx_smolvlm.convert.quant.dwq import _compute_divergence
from mlx_smolvlm.generate.choose import _score_tokens
from mlx_smolvlm.generate.sampling import (
    Sampling,
    cross_entropy,
    log_softmax,
    make_sampler,
    sum_last,
)
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.smolvlm import SmolVLM
from mlx_smolvlm.train.loss import Batch, answer_loss

VOCABULARY = 49_280
ROWS = 3


def random_logits(scale: float, size: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(0).normal(0, scale, (ROWS, size)).astype(np.float32)


def peaked(size: int = VOCABULARY) -> np.ndarray:
    logits = random_logits(1, size)
    logits[:, size // 2] += 25
    return logits


def masked(size: int = VOCABULARY) -> np.ndarray:
    """Logits as in a constrained answer: few tokens are allowed, and most blocks have none."""
    logits = random_logits(3, size)
    logits[:, size // 3 + 1 :] = -np.inf
    logits[:, ::2] = -np.inf
    return logits


DISTRIBUTIONS: dict[str, Callable[[int], np.ndarray]] = {
    "flat": lambda size: np.zeros((ROWS, size), np.float32),
    "usual": lambda size: random_logits(3, size),
    "peaked": peaked,
    "far": lambda size: random_logits(3, size) + np.array([[1e4], [-1e4], [0]], np.float32),
    "wide": lambda size: random_logits(4e3, size).clip(-1e4, 1e4),
    "masked": masked,
}


def true_log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


@pytest.mark.parametrize("size", [5, 256, 640, VOCABULARY])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_log_softmax(name: str, size: int) -> None:
    logits = DISTRIBUTIONS[name](size)
    expected = true_log_softmax(logits)
    actual = np.array(log_softmax(mx.array(logits)))
    # The rounding error of a float32 is 1e-6 at -16 and 5e-4 at -1e4: half of its last digit.
    np.testing.assert_allclose(actual, expected, rtol=1.2e-7, atol=1e-6)
    assert abs(np.exp(actual.astype(np.float64)).sum(-1) - 1).max() < 2e-6


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_scores_of_tokens(name: str) -> None:
    """`choose` subtracts in float64, so that all its scores have an error below 1e-6."""
    logits = DISTRIBUTIONS[name](VOCABULARY)
    token_ids = np.array([VOCABULARY // 2, 1, 7])
    vlm = SimpleNamespace(model=SimpleNamespace(head=lambda states: states))
    scores = _score_tokens(vlm, mx.array(logits), token_ids)  # type: ignore[arg-type]
    expected = true_log_softmax(logits)[np.arange(ROWS), token_ids]
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_cross_entropy_and_its_gradient(dtype: mx.Dtype) -> None:
    logits = mx.array(random_logits(3)).astype(dtype)
    targets = np.array([5, VOCABULARY - 1, 300])
    losses = cross_entropy(logits, mx.array(targets))
    expected = true_log_softmax(np.array(logits.astype(mx.float32)))
    np.testing.assert_allclose(losses, -expected[np.arange(ROWS), targets], rtol=2e-7)
    assert losses.dtype == mx.float32
    weights = np.array([1.0, -2.0, 0.5], np.float32)
    gradient = mx.grad(lambda x: (mx.array(weights) * cross_entropy(x, mx.array(targets))).sum())
    true = np.exp(expected)
    true[np.arange(ROWS), targets] -= 1
    tolerance = 1e-6 if dtype == mx.float32 else 1e-2
    actual = np.array(gradient(logits).astype(mx.float32))
    np.testing.assert_allclose(actual, true * weights[:, None], rtol=tolerance, atol=tolerance)


def test_sum_last_adds_every_number() -> None:
    for size in (1, 255, 256, 257, 1000):
        values = np.arange(2 * size, dtype=np.float32).reshape(2, size)
        assert np.array_equal(sum_last(mx.array(values)), values.sum(-1, keepdims=True))


def test_predictions_of_two_models() -> None:
    """The divergence of two nearly equal models is far below the terms of its sum."""
    one = random_logits(3)
    other = one + np.random.default_rng(1).normal(0, 0.01, one.shape).astype(np.float32)
    targets = np.array([0, 9, VOCABULARY - 1])
    found = compare_predictions(
        (mx.array(one), mx.array(other)), (lambda x: x, lambda x: x), targets
    )
    p, q = true_log_softmax(one), true_log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert 1e-5 < kl.min() < kl.max() < 1e-3
    np.testing.assert_allclose(found.kl_nats, kl, rtol=0, atol=1e-6)
    rows = np.arange(ROWS)
    nll = -np.stack([p[rows, targets], q[rows, targets]])
    np.testing.assert_allclose(found.nll_nats, nll, rtol=2e-7)
    np.testing.assert_allclose(
        _compute_divergence(mx.array(one), mx.array(other)), kl.sum(), atol=3e-6
    )


def test_the_loss_of_answers(tiny: SmolVLM) -> None:
    mx.random.seed(0)
    text = dataclasses.replace(tiny.config.text, vocab_size=VOCABULARY)
    network = Model(dataclasses.replace(tiny.config, text=text))
    network.lm_head.weight = 5 * network.lm_head.weight  # so that predictions are no flat ones
    ids = np.array([[1, 2, 3, 40_000, 5]], np.int32)
    places, targets = np.array([2, 3], np.int32), np.array([40_000, 5], np.int32)
    total, count = answer_loss(network, Batch(ids, places, targets, None, None, 0))
    logits = np.array(network(network.embed(ids[0]))[0])
    assert 2 < logits.std() < 4
    expected = -true_log_softmax(logits)[places, targets].sum()
    assert count.item() == 2
    np.testing.assert_allclose(total.item(), expected, rtol=3e-7)


def test_samplers_get_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def categorical(logprobs: mx.array, key: object) -> mx.array:
        seen.append(np.array(logprobs))
        return mx.argmax(logprobs, axis=-1)

    monkeypatch.setattr(mx.random, "categorical", categorical)
    logits = random_logits(3)[0]
    make_sampler(Sampling(temperature=1.0))(mx.array(logits))
    np.testing.assert_allclose(seen[0][0], true_log_softmax(logits), rtol=1.2e-7, atol=1e-6)
