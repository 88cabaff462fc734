"""Samplers and low-rank layers against mlx-lm's: the same tokens from a seed, the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

pytest.importorskip("mlx_lm")

from mlx_lm import sample_utils
from mlx_lm.tuner import lora as theirs

from mlx_smolvlm.generate import sampling as own
from mlx_smolvlm.model.lora import Adaptable, LoRALinear, adapt

SIZE = 49_280
RANK, SCALE = 4, 3.0


def random_logits(rows: int, seed: int, spread: float = 3.0, size: int = SIZE) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.normal(0, spread, (rows, size)).astype(np.float32))


FILTERS: list[tuple[Callable[..., Any], Callable[..., Any], list[float]]] = [
    (own.keep_top_p, sample_utils.apply_top_p, [1e-30, 0.1, 0.5, 0.9, 0.999]),
    (own.keep_min_p, sample_utils.apply_min_p, [1e-30, 0.01, 0.3, 0.999]),
    (own.keep_top_k, sample_utils.apply_top_k, [1, 2, 50, SIZE - 1]),
]


@pytest.mark.parametrize(("keep", "apply", "values"), FILTERS, ids=["top_p", "min_p", "top_k"])
def test_filters_keep_what_mlx_lm_keeps(
    keep: Callable[..., Any], apply: Callable[..., Any], values: list[float]
) -> None:
    spread = own.log_softmax(random_logits(3, seed=0))
    # A row of ties, one with few tokens allowed, and one where a token has all the probability.
    tied = mx.array(np.repeat(np.arange(SIZE // 8), 8)[None].astype(np.float32) / 500)
    few = mx.where(mx.arange(SIZE)[None] % 9000 == 7, random_logits(1, seed=1), -mx.inf)
    sure = mx.where(mx.arange(SIZE)[None] == 9, 100.0, 0.0)
    logprobs = mx.concatenate([spread, *map(own.log_softmax, (tied, few, sure))])
    lengths = set()
    for value in values:
        found, expected = np.array(keep(logprobs, value)), np.array(apply(logprobs, value))
        np.testing.assert_array_equal(found, expected)
        lengths.add(int(np.isfinite(found[:3]).sum()))
    assert len(lengths) == len(values)  # each value keeps another number of tokens


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 0.9, "min_p": 0.02},
        {"temperature": 5.0, "top_k": 9},
        {"temperature": 2.0, "top_p": 0.7, "min_p": 0.01, "top_k": 30},
    ],
    ids=str,
)
def test_a_seed_draws_the_tokens_that_mlx_lm_draws(options: dict[str, Any], seed: int) -> None:
    steps = 12
    logits = random_logits(steps, seed=3)
    names = {"temperature": "temp"}
    sampler = sample_utils.make_sampler(**{names.get(k, k): v for k, v in options.items()})
    mx.random.seed(seed)
    expected = [sampler(own.log_softmax(row[None])).item() for row in logits]
    mx.random.seed(seed + 1 if seed < 9 else 0)  # the global state does not matter
    sampling = own.Sampling(**options, seed=seed)
    one, rows = own.make_sampler(sampling), own.make_row_sampler(sampling)
    assert [one(row).item() for row in logits] == expected
    assert rows(logits, np.arange(steps)).tolist() == expected
    assert len(set(expected)) > steps // 2


def draw_layers() -> dict[str, Adaptable]:
    """Layers that can have an adapter, of floats and quantized, with a bias and without."""
    mx.random.seed(0)
    linear, plain = nn.Linear(64, 32), nn.Linear(96, 32, bias=False)
    linear.bias = mx.random.normal((32,))
    table = nn.Embedding(40, 64)
    half = nn.Linear(64, 32)
    half.set_dtype(mx.bfloat16)
    return {
        "linear": linear,
        "no bias": plain,
        "bfloat16": half,
        "8 bits": linear.to_quantized(32, 8),
        "4 bits": plain.to_quantized(32, 4),
        "mxfp4": plain.to_quantized(32, 4, mode="mxfp4"),
        "table": table,
        "table, 8 bits": table.to_quantized(32, 8),
    }


@pytest.mark.parametrize("name", list(draw_layers()))
def test_low_rank_layers_compute_what_mlx_lm_computes(name: str) -> None:
    base: Any = draw_layers()[name]
    layer: Any = adapt(base, RANK, SCALE, dropout=0.25)
    is_linear = isinstance(layer, LoRALinear)
    kind = theirs.LoRALinear if is_linear else theirs.LoRAEmbedding
    other: Any = kind.from_base(base, r=RANK, dropout=0.25, scale=SCALE)
    assert layer.lora_a.shape == other.lora_a.shape
    assert layer.lora_b.shape == other.lora_b.shape
    for drawn in (layer.lora_a, other.lora_a):  # uniform up to the same bound
        bound = 1 / np.sqrt(drawn.shape[0])
        assert 0.9 * bound < mx.abs(drawn).max().item() <= bound
        assert abs(drawn.mean().item()) < 0.2 * bound
    assert not layer.lora_b.any().item()
    dtype = base.weight.dtype if base.weight.dtype == mx.bfloat16 else mx.float32
    b = mx.random.normal(layer.lora_b.shape).astype(dtype)
    for one in (layer, other):
        one.update({"lora_a": other.lora_a.astype(dtype), "lora_b": b})
    ids = mx.array([[3, 0, 39]])
    x = mx.random.normal((2, 3, layer.lora_a.shape[0] if is_linear else 64)).astype(dtype)

    def outputs(one: Any) -> list[mx.array]:
        return [one(x)] if is_linear else [one(ids), one.as_linear(x)]

    def assert_equal(found: list[mx.array], expected: list[mx.array]) -> None:
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(*(np.array(y.astype(mx.float32)) for y in (a, b)))

    for training in (False, True):
        results = []
        for one in (layer, other):
            one.train(training)
            mx.random.seed(4)  # of dropout
            results.append(outputs(one))
        assert_equal(*results)
    layer.eval()
    fused, wanted = layer.fuse(), other.fuse(dequantize=True)
    assert type(fused) is type(wanted)
    if name == "mxfp4":  # mlx-lm rounds the sum to bfloat16
        np.testing.assert_allclose(
            fused.weight, wanted.weight.astype(mx.float32), rtol=2**-7, atol=1e-3
        )
    else:
        assert_equal([fused.weight], [wanted.weight])
    assert ("bias" in fused) == ("bias" in base)
    tolerance = 0.2 if dtype == mx.bfloat16 else 1e-4
    applied = [fused(x)] if is_linear else [fused(ids), fused.as_linear(x)]
    for a, c in zip(applied, outputs(layer), strict=True):
        np.testing.assert_allclose(a.astype(mx.float32), c.astype(mx.float32), atol=tolerance)
