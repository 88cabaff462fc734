"""A cache of several sequences computes what a cache of each computes."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm.kv.batched import BatchedKVCache
from mlx_smolvlm.kv.cache import FLOAT_STORAGE, STEP, KVCache, PackedStorage, Storage

HEADS, KV_HEADS, WIDTH, LAYERS = 6, 2, 64, 2


def draw(tokens: int) -> tuple[mx.array, mx.array]:
    """Random queries and keys with values of one sequence."""
    shapes = (1, HEADS, tokens, WIDTH), (1, 2 * KV_HEADS, tokens, WIDTH)
    queries, keys_values = (mx.random.normal(shape) for shape in shapes)
    return queries, keys_values


def fill(cache: KVCache, tokens: int) -> KVCache:
    """`cache` with random tokens."""
    for layer in range(LAYERS):
        cache.attend(layer, *draw(tokens), "causal")
    cache.advance(tokens)
    return cache


def step(batched: BatchedKVCache, single: list[KVCache]) -> None:
    """Feed a token to each row and to each of `single`, and compare what they compute."""
    batched.reserve()
    mask = batched.make_mask()
    for layer in range(LAYERS):
        tokens = [draw(1) for _ in single]
        parts = (mx.concatenate([*one], axis=2) for one in zip(*tokens, strict=True))
        together = batched.attend(layer, *parts, mask)
        alone = [cache.attend(layer, *one, None) for cache, one in zip(single, tokens, strict=True)]
        np.testing.assert_allclose(together, mx.concatenate(alone, axis=2), atol=1e-5)
    batched.advance(len(single))
    for cache in single:
        cache.advance(1)


@pytest.mark.parametrize("storage", [FLOAT_STORAGE, PackedStorage(8, 32)], ids=["float", "packed"])
def test_rows_are_as_if_alone(storage: Storage) -> None:
    mx.random.seed(0)
    batched, single = BatchedKVCache(LAYERS, storage), list[KVCache]()
    for length in (5, 1, 9, 3):  # each row joins after a step of those before it
        single.append(fill(KVCache(LAYERS, storage), length))
        batched.add(single[-1])
        step(batched, single)
    for row in (1, 1, 1, 0):  # the second, and then what took its place
        batched.remove(row)
        single[row] = single[-1]
        del single[-1]
        if single:
            step(batched, single)
    assert batched.arrays == []
    single.append(fill(KVCache(LAYERS, storage), 2))
    batched.add(single[0])
    step(batched, single)


def test_a_copied_row_does_not_change_with_the_batch() -> None:
    single, batched = KVCache(1), BatchedKVCache(1)
    single.append(0, np.ones((1, 2, STEP, 8), np.float32))  # one head, and a full buffer
    single.advance(STEP)
    batched.add(single)
    row = batched.copy_row(0)
    for buffer in batched.arrays:
        np.array(buffer, copy=False)[:] = 7
    assert all((np.array(array) == 1).all() for array in row.arrays)


def test_a_row_becomes_a_cache_again() -> None:
    mx.random.seed(1)
    batched, single = BatchedKVCache(LAYERS), [fill(KVCache(LAYERS), n) for n in (4, 7)]
    for cache in single:
        batched.add(cache)
    step(batched, single)
    for row, cache in enumerate(single):
        twin = batched.copy_row(row)
        assert twin.offset == cache.offset
        for layer in range(LAYERS):
            tokens = draw(1)
            np.testing.assert_allclose(
                twin.attend(layer, *tokens, None), cache.attend(layer, *tokens, None), atol=1e-6
            )


def test_buffers_grow_and_are_used_again() -> None:
    mx.random.seed(2)
    batched = BatchedKVCache(LAYERS)
    single = [fill(KVCache(LAYERS), STEP - 1), fill(KVCache(LAYERS), 3)]
    for cache in single:
        batched.add(cache)
    assert batched.capacity == 2 * STEP
    for _ in range(3):
        step(batched, single)
    assert batched.capacity == 4 * STEP
    batched.remove(0)
    single = [single[1]]
    step(batched, single)
    assert batched.capacity == 4 * STEP  # room for a row that joins
    single.append(fill(KVCache(LAYERS), 5))
    batched.add(single[1])
    step(batched, single)
    assert batched.capacity == 4 * STEP
    single.append(fill(KVCache(LAYERS), 5))
    batched.add(single[2])
    step(batched, single)
    assert batched.capacity == 3 * STEP  # the long row has left
