"""The network in NumPy computes what MLX computes, whatever the cache and the weights."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

from mlx_smolvlm import CacheOptions, SmolVLM, load, smolvlm
from mlx_smolvlm.checkpoint.load import load_model
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.generate.memory_plan import Work, estimate
from mlx_smolvlm.kv.batched import BatchedKVCache
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.model import cpu, products
from mlx_smolvlm.model.lora import LoRALinear, adapt
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.model.text import Placement
from mlx_smolvlm.model.vision import gelu_tanh
from mlx_smolvlm.smolvlm import load_in_mlx
from tests.helpers import network_cases as cases

POOL = ThreadPoolExecutor(2)
CLOSE = 1e-5  # both sum in float32, in different orders
NAME = sorted(cases.CASES)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return convert_checkpoint(cases.make(folder / "hf", NAME), folder / "ours")


@pytest.fixture(scope="module")
def in_mlx(folder: Path) -> Model:
    return load_model(folder, "float32")


@pytest.fixture(scope="module")
def in_numpy(folder: Path) -> Model:
    model = load_model(folder, "float32")
    cpu.compute_in_numpy(model)
    return model


def make_embeds(model: Model, b: int, length: int, seed: int = 0) -> mx.array:
    width = model.text_model.norm.weight.size
    values = np.random.default_rng(seed).normal(size=(b, length, width)) / width**0.5
    return mx.array(values.astype(np.float32))


def assert_close(a: mx.array, b: mx.array, tolerance: float = CLOSE) -> None:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == mx.float32
    assert np.abs(np.array(a)).max() > 0.01
    assert np.abs(np.array(a) - np.array(b)).max() <= tolerance


def run_parts(model: Model, cache: KVCache | None, lengths: tuple[int, ...], b: int) -> mx.array:
    """Hidden states of random tokens that are fed in parts of `lengths`."""
    embeds, start, states = make_embeds(model, b, sum(lengths)), 0, []
    for length in lengths:
        states.append(model.text_model(embeds[:, start : start + length], cache))
        start += length
    return mx.concatenate(states, axis=1)


CACHES = {
    "plain": CacheOptions(),
    "packed": CacheOptions(kv_bits=8, kv_group_size=32),
    "bounded": CacheOptions(max_kv_tokens=80),
}


@pytest.mark.parametrize("name", CACHES)
def test_parts_of_a_sequence(in_mlx: Model, in_numpy: Model, name: str) -> None:
    parts = (70, 1, 1, 20, 180, 1)  # more than a buffer, which has room for 256 tokens
    a, b = (
        run_parts(model, model.make_cache(CACHES[name]), parts, 1) for model in (in_mlx, in_numpy)
    )
    # A difference of 1e-7 can round a number to the next of its 256 levels.
    assert_close(a, b, 1e-2 if name == "packed" else CLOSE)


def test_a_batch_without_a_cache_and_with_one(in_mlx: Model, in_numpy: Model) -> None:
    assert_close(run_parts(in_mlx, None, (9,), 3), run_parts(in_numpy, None, (9,), 3))
    a, b = (run_parts(one, one.make_cache(), (9, 1, 4), 3) for one in (in_mlx, in_numpy))
    assert_close(a, b)


@pytest.mark.parametrize("name", ["plain", "packed"])
def test_sequences_of_unlike_lengths(in_mlx: Model, in_numpy: Model, name: str) -> None:
    states = []
    for model in (in_mlx, in_numpy):
        rows = BatchedKVCache(len(model.text_model.layers), CACHES[name].make_storage())
        for length in (254, 3, 70):
            cache = model.make_cache(CACHES[name])
            run_parts(model, cache, (length,), 1)
            rows.add(cache)
        for seed in range(4):  # the buffer grows in between
            rows.reserve()
            placement = Placement(rows.lengths, rows.make_mask())
            embeds = make_embeds(model, 1, 3, seed)
            states.append(model.text_model(embeds, rows, placement))
    for a, b in zip(states[:4], states[4:], strict=True):
        assert_close(a, b, 1e-2 if name == "packed" else CLOSE)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("height", [31, 70, 320])
def test_few_rows_are_multiplied_block_by_block(
    threads: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random, multiply_few, counts = np.random.default_rng(0), products.multiply_few, list[int]()

    def count(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
        counts.append(len(rows))
        return multiply_few(matrix, rows)

    monkeypatch.setattr(products, "multiply_few", count)
    monkeypatch.setattr(products, "THREADED_SIZE", 0)
    monkeypatch.setattr(products, "count_blas_threads", lambda: threads)
    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(products, "get_pool", lambda: pool)
        weight, bias = random.normal(size=(height, 24)), random.normal(size=height)
        weight, bias = weight.astype(np.float32), bias.astype(np.float32)
        for rows in (1, 2, 8, 16, 17):
            x = random.normal(size=(1, rows, 24)).astype(np.float32)
            product = products.multiply(weight.T, bias, x)
            np.testing.assert_allclose(product, x @ weight.T + bias, atol=1e-5)
            assert product.flags.c_contiguous
    assert counts == [2, 8, 16]


@pytest.mark.parametrize("block", [1, 40, 1000])
def test_small_blocks(
    in_mlx: Model, in_numpy: Model, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK", block)
    pixel_values, _ = cases.inputs(NAME)
    a, b = (model.encode(mx.array(pixel_values)) for model in (in_mlx, in_numpy))
    assert_close(a, b)
    a, b = (run_parts(one, one.make_cache(), (7, 5, 1), 2) for one in (in_mlx, in_numpy))
    assert_close(a, b)


def test_a_mask_and_positions(in_mlx: Model, in_numpy: Model) -> None:
    mask = np.random.default_rng(0).random((4, 10)) < 0.5
    mask[:, 0] = True
    results = []
    for model in (in_mlx, in_numpy):
        cache = model.make_cache()
        model.text_model(make_embeds(model, 1, 6), cache)
        placement = Placement(np.array([6, 3, 9, 7]), mx.array(mask))
        results.append(model.text_model(make_embeds(model, 1, 4, 1), cache, placement))
    assert_close(*results)


def test_forks_do_not_see_each_other(in_numpy: Model) -> None:
    cache = in_numpy.make_cache()
    in_numpy.text_model(make_embeds(in_numpy, 1, 5), cache)
    twin = cache.fork()
    alone = []
    for seed in (1, 2):
        fresh = in_numpy.make_cache()
        in_numpy.text_model(make_embeds(in_numpy, 1, 5), fresh)
        alone.append(in_numpy.text_model(make_embeds(in_numpy, 1, 2, seed), fresh))
        alone.append(in_numpy.text_model(make_embeds(in_numpy, 1, 1, seed + 5), fresh))
    together = [
        in_numpy.text_model(make_embeds(in_numpy, 1, 2, 1), cache),
        in_numpy.text_model(make_embeds(in_numpy, 1, 2, 2), twin),
        in_numpy.text_model(make_embeds(in_numpy, 1, 1, 6), cache),
        in_numpy.text_model(make_embeds(in_numpy, 1, 1, 7), twin),
    ]
    for expected, got in zip(
        alone, [together[0], together[2], together[1], together[3]], strict=True
    ):
        assert np.array_equal(np.array(expected), np.array(got))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_cache_of_another_type(in_numpy: Model, dtype: mx.Dtype) -> None:
    cache, other = in_numpy.make_cache(), in_numpy.make_cache()
    in_numpy.text_model(make_embeds(in_numpy, 1, 5), cache)
    in_numpy.text_model(make_embeds(in_numpy, 1, 5), other)
    other.buffers = [(buffer.astype(dtype),) for buffer in cache.arrays]
    a, b = (in_numpy.text_model(make_embeds(in_numpy, 1, 2, 1), one) for one in (cache, other))
    assert_close(a, b, 0.05)  # bfloat16 has 8 bits of precision
    assert {buffer.dtype for buffer in other.arrays} == {mx.float32}


def test_what_was_saved_does_not_change(in_numpy: Model) -> None:
    cache = in_numpy.make_cache()
    in_numpy.text_model(make_embeds(in_numpy, 1, 5), cache)
    twin = cache.fork()
    before = [np.array(array) for array in twin.arrays]
    cache.trim(2)
    in_numpy.text_model(make_embeds(in_numpy, 1, 3, 1), cache)
    for array, expected in zip(twin.arrays, before, strict=True):
        assert np.array_equal(np.array(array), expected)


@pytest.mark.parametrize(
    ("bits", "mode"), [(4, "affine"), (8, "affine"), (3, "affine"), (4, "mxfp4")]
)
@pytest.mark.parametrize(
    ("rows", "block"), [(1, 2**22), (1, 7 * 96), (3, 2**22), (9, 2**22), (9, 7 * 96)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_packed_matrices(
    bits: int, mode: str, rows: int, block: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BLOCK", "UNPACK_BLOCK"):
        monkeypatch.setattr(products, name, block)
    monkeypatch.setattr(products, "THREADED_SIZE", 1)
    monkeypatch.setattr(products, "count_blas_threads", lambda: threads)
    monkeypatch.setattr(products, "get_pool", lambda: POOL)
    group_size = 32
    linear = nn.Linear(96, 50)
    linear.weight = mx.random.normal((50, 96), key=mx.random.key(0))
    packed = nn.QuantizedLinear.from_linear(linear, group_size, bits, mode)
    x = mx.random.normal((rows, 96), key=mx.random.key(1))
    expected = np.array(packed(x))
    for one in (packed, products.unpack_linear(packed)):
        got = products.bind_linear(one)(np.array(x))
        assert np.abs(got - expected).max() <= 1e-4  # sums of 96 products of about 1
    plain = mx.dequantize(
        packed.weight, packed.scales, packed.get("biases"), group_size, bits, mode
    ).astype(mx.float32)
    assert np.abs(products.unpack_rows(packed) - np.array(plain)).max() <= 1e-6


def test_a_packed_head(monkeypatch: pytest.MonkeyPatch) -> None:
    table = nn.QuantizedEmbedding(40, 64, group_size=32, bits=8)
    in_numpy = cpu.NumpyPackedEmbedding(table)
    ids, x = mx.array([3, 39]), mx.random.normal((2, 64), key=mx.random.key(0))
    assert np.array_equal(np.array(in_numpy(ids)), np.array(table(ids)))
    for rows in (x[0], x, mx.random.normal((9, 64), key=mx.random.key(1))):
        assert_close(in_numpy.as_linear(rows), table.as_linear(rows))


def test_many_rows_are_unpacked_and_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = nn.QuantizedLinear(64, 32, bits=4, group_size=64)
    calls: list[slice] = []
    unpack = products.unpack_rows

    def recording(module: nn.QuantizedLinear, rows: slice) -> np.ndarray:
        calls.append(rows)
        return unpack(module, rows)

    monkeypatch.setattr(products, "unpack_rows", recording)
    multiply: Callable[[np.ndarray], np.ndarray] = products.bind_linear(packed)
    multiply(np.ones((1, 1, 64), np.float32))
    assert not calls
    multiply(np.ones((1, products.UNPACK_ROWS, 64), np.float32))
    assert calls == [slice(0, 32)]
    monkeypatch.setattr(products, "UNPACK_BLOCK", 20 * 64)
    multiply(np.ones((1, products.UNPACK_ROWS, 64), np.float32))
    assert calls[1:] == [slice(0, 20), slice(20, 32)]


def test_activations_of_extreme_numbers() -> None:
    x = np.array([[-1e4, -90.0, -1.0, 0.0, 1.0, 90.0, 1e4]], np.float32)
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("error")
        gelu = cpu.apply_gelu_tanh(x.copy())
        swiglu = cpu.apply_swiglu(np.concatenate([x, np.ones_like(x)], axis=1))
    assert np.abs(gelu - np.array(gelu_tanh(mx.array(x)))).max() <= 1e-6
    assert np.abs(swiglu - np.array(nn.silu(mx.array(x)))).max() <= 1e-6


def test_unpacked_weights(tmp_path: Path, folder: Path) -> None:
    made = convert_checkpoint(
        folder.parent / "hf", tmp_path / "4", ConvertOptions(bits=4, group_size=32)
    )
    packed, unpacked = load_model(made, "float32"), load_model(made, "float32")
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    paths = [path for path, one in packed.named_modules() if isinstance(one, kinds)]
    products.unpack_weights(unpacked)
    modules = dict(unpacked.named_modules())
    assert paths
    assert all(modules[path].weight.dtype == mx.float32 for path in paths)
    assert not any(isinstance(one, kinds) for one in unpacked.modules())
    pixel_values, input_ids = cases.inputs(NAME)
    results = []
    for model, in_numpy in ((packed, False), (packed, True), (unpacked, True)):
        if in_numpy:
            cpu.compute_in_numpy(model)
        merged = model.embed(input_ids, model.encode(mx.array(pixel_values)))
        results.append(model(merged))
    for other in results[1:]:
        assert_close(results[0], other)


def is_in_numpy(vlm: SmolVLM) -> bool:
    return isinstance(vlm.model.text_model, cpu.NumpyTextModel)


def test_packed_matrices_are_freed_while_others_are_unpacked(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = convert_checkpoint(folder, tmp_path / "4", ConvertOptions(bits=4, group_size=32))
    model = load_model(made, "float32")
    seen: list[weakref.ref[nn.Module]] = []
    unpack = products.unpack_linear

    def recording(module: nn.QuantizedLinear) -> nn.Linear:
        assert all(one() is None for one in seen[:-1])  # the last is freed when this one is stored
        seen.append(weakref.ref(module))
        return unpack(module)

    monkeypatch.setattr(products, "unpack_linear", recording)
    products.unpack_weights(model)
    assert len(seen) > 8


def test_when_a_model_computes_in_numpy(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder
    assert is_in_numpy(load(folder)) == (sys.platform == "linux")
    monkeypatch.setattr(sys, "platform", "linux")
    assert is_in_numpy(load(folder))
    assert not is_in_numpy(load(folder, dtype="float16"))
    assert not is_in_numpy(load_in_mlx(folder))
    monkeypatch.setenv("MLX_SMOLVLM_NUMPY", "0")
    assert not is_in_numpy(load(folder))
    monkeypatch.delenv("MLX_SMOLVLM_NUMPY")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not is_in_numpy(load(folder))


def test_weights_that_would_fill_the_memory_stay_packed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = convert_checkpoint(tiny_folder, tmp_path / "4", ConvertOptions(bits=4, group_size=32))
    monkeypatch.setattr(sys, "platform", "linux")
    whole = load(folder)
    assert not any(isinstance(one, nn.QuantizedLinear) for one in whole.model.modules())
    need = estimate(whole.engine.guard.setup, Work()).total
    monkeypatch.setattr(smolvlm, "measure_machine", lambda: 2 * need)
    assert any(isinstance(one, nn.QuantizedLinear) for one in load(folder).model.modules())


@pytest.mark.parametrize("bits", [4, 16])
def test_adapters_are_added_to_the_weights(folder: Path, tmp_path: Path, bits: int) -> None:
    options = ConvertOptions(bits=bits, group_size=32)
    made = convert_checkpoint(folder.parent / "hf", tmp_path / "made", options)
    results = []
    for in_numpy in (False, True):
        model = load_model(made, "float32")
        for path in ("text_model.embed_tokens", "text_model.layers.0.self_attn.qkv_proj"):
            layer = adapt(dict(model.named_modules())[path], 2, 3.0, 0.0)
            layer.lora_a = mx.random.normal(layer.lora_a.shape, key=mx.random.key(0))
            layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(1)) * 0.1
            model.update_modules(tree_unflatten([(path, layer)]))
        model.eval()
        if in_numpy:
            products.unpack_weights(model)
            assert not any(isinstance(one, LoRALinear) for one in model.modules())
            cpu.compute_in_numpy(model)
        results.append(model(model.embed(np.arange(9))))
    plain = load_model(made, "float32")
    assert np.abs(np.array(plain(plain.embed(np.arange(9))) - results[0])).max() > 0.1
    assert_close(results[0], results[1], 1e-4)  # adapted weights are ten times as large
