"""Packed and bounded caches: what they hold, and what attention finds in them."""

from collections.abc import Collection, Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm.config import TextConfig
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.generate.loop import prefill
from mlx_smolvlm.kv.bounded import RECENT, SINKS, BoundedKVCache
from mlx_smolvlm.kv.cache import FLOAT_STORAGE, STEP, Buffers, KVCache, Mask, PackedStorage
from mlx_smolvlm.kv.options import CacheOptions
from mlx_smolvlm.model.model import PREFILL_CHUNK, Model

LIMIT = 96  # tokens of the bounded caches here
PACKED = [(bits, group) for bits in (8, 4) for group in (32, 64)]
KINDS = {
    "packed": CacheOptions(kv_bits=8),
    "4 bits": CacheOptions(kv_bits=4, kv_group_size=32),
    "bounded": CacheOptions(max_kv_tokens=LIMIT),
    "both": CacheOptions(kv_bits=8, max_kv_tokens=LIMIT),
}


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def logits(model: Model, embeds: mx.array, cache: KVCache, cuts: Sequence[int] = ()) -> mx.array:
    """Logits (L, vocabulary) of all of `embeds`, run in pieces that end at `cuts`."""
    edges = [0, *cuts, embeds.shape[1]]
    parts = []
    for start, stop in pairwise(edges):
        parts.append(model(embeds[:, start:stop], cache)[0])
        mx.eval(parts[-1], cache.arrays)
    return mx.concatenate(parts)


def far(first: mx.array, second: mx.array) -> float:
    return float(mx.abs(first - second).max().item())


def unpacked(storage: PackedStorage, held: Buffers) -> mx.array:
    """What `held` stands for, by MLX."""
    return mx.dequantize(*held, storage.group_size, storage.bits)


class Masked(KVCache):
    """Every token is held, and some are masked out: what a bounded cache must equal."""

    def __init__(self, layers: int, limit: int, pins: Collection[int]) -> None:
        super().__init__(layers)
        self.limit, self.pins = limit, pins

    def attend(self, layer: int, queries: mx.array, keys_values: mx.array, mask: Mask) -> mx.array:
        seen, held = [], list[int]()
        for now in range(queries.shape[2]):
            if len(held) == self.limit:
                held.remove(next(token for token in held if token not in self.pins))
            held.append(now)
            seen.append([token in held for token in range(queries.shape[2])])
        return FLOAT_STORAGE.attend(queries, (keys_values,), mx.array(seen))


# Attention to packed keys and values


@pytest.mark.parametrize(("bits", "group"), PACKED)
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_equals_mlxs_over_what_is_held(
    bits: int, group: int, length: int, heads: tuple[int, int]
) -> None:
    count, kv_heads = heads
    storage = PackedStorage(bits, group)
    queries, keys_values = normal(2, count, length, 64), normal(2, 2 * kv_heads, 37, 64, seed=1)
    held = storage.pack(keys_values)
    keys, values = mx.split(unpacked(storage, held), 2, axis=1)
    some = normal(length, 37, seed=2) > 0
    some[:, 0] = True
    masks: list[Mask] = ["causal", some] if length > 1 else [None]
    for mask in masks:
        expected = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=64**-0.5, mask=mask
        )
        assert far(storage.attend(queries, held, mask), expected) < 1e-4


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_attention_in_half_precision(dtype: mx.Dtype) -> None:
    storage = PackedStorage(8, 64)
    queries, keys_values = normal(1, 4, 3, 64).astype(dtype), normal(1, 4, 9, 64).astype(dtype)
    held = storage.pack(keys_values)
    assert held[1].dtype == {mx.float16: mx.float16, mx.bfloat16: mx.float32}[dtype]
    got = storage.attend(queries, held, "causal")
    expected = FLOAT_STORAGE.attend(
        queries.astype(mx.float32), (unpacked(storage, held).astype(mx.float32),), "causal"
    )
    assert got.dtype == dtype
    # The queries' scaling and the result are rounded to the 8 bits of bfloat16, 11 of float16.
    assert far(got.astype(mx.float32), expected) < 0.02


@pytest.mark.parametrize(("bits", "group"), PACKED)
def test_what_is_held_is_within_a_step_of_what_came(wide: Model, bits: int, group: int) -> None:
    embeds = normal(1, 300, 64)
    options = CacheOptions(kv_bits=bits, kv_group_size=group)
    packed, full = wide.make_cache(options), wide.make_cache()
    logits(wide, embeds, packed, [7, 280])
    logits(wide, embeds, full, [7, 280])
    # The first layer gets the same from both. Between the least and the greatest number of a
    # group there are 2**bits - 1 steps, which MLX may shift so that one is at 0.
    came, held = full.buffers[0], packed.buffers[0]
    assert came is not None
    assert held is not None
    assert isinstance(packed.storage, PackedStorage)
    groups = came[0][:, :, :300].reshape(-1, group)
    steps = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    got = unpacked(packed.storage, held)[:, :, :300].reshape(-1, group)
    assert (mx.abs(got - groups).max(-1) <= 1.01 * steps).all()
    assert far(got, groups) > 0


def test_eight_bits_are_near_float_and_four_are_farther(wide: Model) -> None:
    embeds = normal(1, 400, 64)
    expected = logits(wide, embeds, wide.make_cache())
    spread = float(mx.sqrt(mx.var(expected)).item())
    errors = {
        bits: far(logits(wide, embeds, wide.make_cache(CacheOptions(kv_bits=bits))), expected)
        for bits in (8, 4)
    }
    # A number among 64 that spread over 5 deviations is off by at most 5/255 = 2% of one; keys
    # and values both are, in three layers, and averaging over tokens makes it less: so the
    # logits stay within 5% of their own deviation. Steps of 4 bits are 17 times as wide.
    assert errors[8] < 0.05 * spread
    assert 5 * errors[8] < errors[4] < 17 * 0.05 * spread


# Chunks, trimming, forks: for every kind of cache


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_equal_token_by_token(wide: Model, kind: str) -> None:
    embeds = normal(1, 250, 64)
    caches = [wide.make_cache(KINDS[kind]) for _ in range(3)]
    single = logits(wide, embeds, caches[0], range(1, 250))
    chunks = logits(wide, embeds, caches[1], [3, 90, 91, 200, 215])
    whole = logits(wide, embeds, caches[2])
    # A number at the border of two steps may fall to either side: one step in one number. At 4
    # bits that is up to 0.05 in a logit, since OpenBLAS rounds one row and many differently.
    bound = {"bounded": 1e-4, "4 bits": 0.06}.get(kind, 0.02)
    for other in (chunks, whole):
        assert far(single, other) < bound
        assert (mx.abs(single - other) > 0.02).mean().item() < 1e-3
    assert [cache.offset for cache in caches] == [250] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_of_a_long_prompt(wide: Model, kind: str) -> None:
    embeds = normal(1, 2 * PREFILL_CHUNK + 9, 64)
    expected = logits(wide, embeds, wide.make_cache(KINDS[kind]))[-1]
    got = prefill(wide, embeds, wide.make_cache(KINDS[kind]))
    assert far(got, expected) < (1e-4 if kind == "bounded" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_trim_forgets_exactly(wide: Model, kind: str) -> None:
    first, other, more = normal(1, 60, 64), normal(1, 30, 64, seed=1), normal(1, 20, 64, seed=2)
    cache, clean = wide.make_cache(KINDS[kind]), wide.make_cache(KINDS[kind])
    logits(wide, first, cache)
    logits(wide, other, cache)
    assert cache.can_resume(60)
    cache.trim(60)
    logits(wide, first, clean)
    assert cache.offset == clean.offset == 60
    # Up to and beyond what the bounded ones hold, to the bit.
    assert mx.array_equal(logits(wide, more, cache), logits(wide, more, clean))
    assert mx.array_equal(logits(wide, other, cache, [9]), logits(wide, other, clean, [9]))


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_forks_go_on_by_themselves(wide: Model, kind: str) -> None:
    options, singly = KINDS.get(kind, CacheOptions()), range(1, 12)
    embeds, mine, theirs = normal(1, 90, 64), normal(1, 12, 64, seed=1), normal(1, 13, 64, seed=2)
    cache, one = wide.make_cache(options), wide.make_cache(options)
    for each in (cache, one):
        logits(wide, embeds, each)
    # At first up to what the bounded ones hold, then beyond, where a token replaces another.
    for cuts in ([], singly, singly):
        twin = cache.fork()
        assert type(twin) is type(cache)
        logits(wide, theirs, twin, cuts)
        got = logits(wide, mine, cache, cuts)
        logits(wide, theirs, twin, cuts)
        assert mx.array_equal(got, logits(wide, mine, one, cuts))
        assert twin.offset == cache.offset + 14
    # And the twin is not disturbed either.
    twin, other = one.fork(), one.fork()
    logits(wide, mine, one, singly)
    expected = logits(wide, theirs, other, singly)
    assert mx.array_equal(logits(wide, theirs, twin, singly), expected)


@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_a_fork_shares_its_arrays_until_one_writes(wide: Model, kind: str) -> None:
    cache = wide.make_cache(KINDS.get(kind, CacheOptions()))
    logits(wide, normal(1, 500, 64), cache)
    before = mx.get_active_memory()
    twin = cache.fork()
    mx.eval(twin.arrays)
    assert mx.get_active_memory() - before < cache.nbytes / 20
    assert twin.nbytes == cache.nbytes


# Memory


@pytest.mark.parametrize(("bits", "group"), PACKED)
def test_bytes_of_packed_keys_and_values(wide: Model, bits: int, group: int) -> None:
    embeds = normal(1, 256, 64)
    packed = wide.make_cache(CacheOptions(kv_bits=bits, kv_group_size=group))
    full = wide.make_cache()
    logits(wide, embeds, packed)
    logits(wide, embeds, full)
    assert full.nbytes == 3 * 256 * 4 * 64 * 4  # layers, tokens, keys and values, width, bytes
    # A scale and a bias of 32 bits each for a group.
    assert packed.nbytes / full.nbytes == (bits + 64 / group) / 32
    assert packed.nbytes == sum(array.nbytes for array in packed.arrays)


def peak(options: CacheOptions, tokens: int) -> int:
    """The most bytes that MLX holds while a cache takes `tokens`, a few at a time."""
    cache, few = options.make_cache(4), 16
    new = normal(1, 4, few, 64)
    mx.eval(new)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(0, tokens, few):
        for layer in range(4):
            mx.eval(cache.attend(layer, new, new, "causal"), cache.arrays)
        cache.advance(few)
    return int(mx.get_peak_memory() - before)


def test_peak_memory_of_long_contexts() -> None:
    tokens = 5 * STEP
    full = peak(CacheOptions(), tokens)
    assert full >= 4 * tokens * 4 * 64 * 4  # layers, tokens, keys and values, width, bytes
    assert peak(CacheOptions(kv_bits=8), tokens) < 0.45 * full
    assert peak(CacheOptions(kv_bits=4), tokens) < 0.35 * full
    assert peak(CacheOptions(max_kv_tokens=LIMIT), tokens) < 0.15 * full


@pytest.mark.parametrize("bits", [None, 8])
def test_a_bounded_cache_never_holds_more(wide: Model, bits: int | None) -> None:
    cache = wide.make_cache(CacheOptions(kv_bits=bits, max_kv_tokens=LIMIT))
    embeds = normal(1, 700, 64)
    start = 0
    for length in [20, 70, 1, 1, 1, 1, 1, 1, 1, 1, 90, 1, 300, 1, 1, 7]:
        logits(wide, embeds[:, start : start + length], cache)
        start += length
        assert {array.shape[2] for array in cache.arrays} <= set(range(1, LIMIT + 1))
        assert isinstance(cache, BoundedKVCache)
        assert cache.positions.size == min(start, LIMIT)
    token = sum(array.nbytes for array in wide_token(wide, bits).arrays)
    assert cache.nbytes == LIMIT * token


def wide_token(model: Model, bits: int | None) -> KVCache:
    """A cache with room for as many tokens as its step, cut to one."""
    cache = model.make_cache(CacheOptions(kv_bits=bits))
    logits(model, normal(1, 1, 64), cache)
    cache.buffers = [held and tuple(part[:, :, :1] for part in held) for held in cache.buffers]
    return cache


# What a bounded cache keeps


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("cuts", [[], [100], [60, 61, 62, 150]])
def test_a_bound_that_is_not_reached_changes_no_bit(
    wide: Model, bits: int | None, cuts: list[int]
) -> None:
    embeds = normal(1, 300, 64)
    full = wide.make_cache(CacheOptions(kv_bits=bits))
    bounded = wide.make_cache(CacheOptions(kv_bits=bits, max_kv_tokens=300))
    assert mx.array_equal(logits(wide, embeds, bounded, cuts), logits(wide, embeds, full, cuts))
    cuts = list(range(1, 300))
    full.trim(0)
    bounded.trim(0)
    assert mx.array_equal(logits(wide, embeds, bounded, cuts), logits(wide, embeds, full, cuts))


PINS = {
    "sinks": [],
    "first": list(range(40)),
    "apart": [*range(10), *range(60, 80), *range(120, 140), 200],
}


@pytest.mark.parametrize("pins", PINS)
@pytest.mark.parametrize(
    "cuts",
    [[], range(1, 250), [95], [96], [97], [98, 99, 100, 130], [10, 210], [150, 151, 152, 200]],
    ids=str,
)
def test_equals_attention_with_the_others_masked_out(
    wide: Model, pins: str, cuts: Sequence[int]
) -> None:
    embeds = normal(1, 250, 64)
    expected = logits(wide, embeds, Masked(3, LIMIT, {*range(SINKS), *PINS[pins]}))
    cache = BoundedKVCache(3, LIMIT)
    cache.pin(np.array(PINS[pins]))
    assert far(logits(wide, embeds, cache, cuts), expected) < 1e-4
    full = logits(wide, embeds, wide.make_cache())
    assert far(full[:LIMIT], expected[:LIMIT]) < 1e-4
    assert far(full[LIMIT:], expected[LIMIT:]) > 0.1  # what is dropped is missed


@pytest.mark.parametrize("cuts", [[], [30], [96], range(1, 251), [240, 241]], ids=str)
def test_the_pinned_and_the_latest_stay(wide: Model, cuts: Sequence[int]) -> None:
    cache = BoundedKVCache(3, LIMIT)
    cache.pin(np.array([0, 9, 100, 101, 1000]))
    logits(wide, normal(1, 251, 64), cache, cuts)
    kept = [0, 1, 2, 3, 9, 100, 101, *range(251 - LIMIT + 7, 251)]
    assert sorted(cache.positions.tolist()) == kept
    assert cache.num_dropped == 251 - LIMIT


def test_what_to_drop_is_computed_once_a_forward_pass(
    wide: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    argmin = np.argmin
    monkeypatch.setattr(np, "argmin", lambda values: (calls.append(1), argmin(values))[1])
    logits(wide, normal(1, LIMIT + 4, 64), BoundedKVCache(3, LIMIT), range(LIMIT, LIMIT + 4))
    assert len(calls) == 4


def test_pins_may_come_later(wide: Model) -> None:
    # As when a conversation goes on to another picture.
    embeds, pins = normal(1, 250, 64), np.array([*range(10), *range(160, 180)])
    cache, whole = BoundedKVCache(3, LIMIT), BoundedKVCache(3, LIMIT)
    cache.pin(pins[:10])
    first = logits(wide, embeds[:, :150], cache)
    assert cache.can_resume(150, pins)
    cache.pin(pins)
    whole.pin(pins)
    got = mx.concatenate([first, logits(wide, embeds[:, 150:], cache)])
    assert far(got, logits(wide, embeds, whole)) < 1e-4
    assert sorted(cache.positions) == sorted(whole.positions)


def test_a_bounded_cache_says_what_it_cannot_do(wide: Model) -> None:
    cache, twenty = BoundedKVCache(3, LIMIT), np.arange(20)
    cache.pin(twenty)
    logits(wide, normal(1, LIMIT, 64), cache)
    assert cache.can_resume(50, np.arange(60))
    logits(wide, normal(1, 1, 64), cache)
    assert not cache.can_resume(LIMIT, twenty)
    assert not cache.can_resume(LIMIT + 1, np.arange(30))
    assert not cache.can_resume(LIMIT + 1)
    assert cache.can_resume(LIMIT + 1, np.array([*twenty, LIMIT + 1]))
    with pytest.raises(ValueError, match=r"back to 96 of 97 tokens.* dropped 1.*can_resume"):
        cache.trim(LIMIT)
    with pytest.raises(ValueError, match=r"outside 0\.\.97"):
        cache.trim(98)
    with pytest.raises(ValueError, match=r"among the first 97.* dropped 1.*can_resume"):
        cache.pin(np.arange(30))
    with pytest.raises(ValueError, match=r"65 tokens to pin and 32 recent ones exceed 96"):
        BoundedKVCache(3, LIMIT).pin(np.arange(LIMIT - RECENT + 1))
    few = normal(1, 4, 2, 64)
    with pytest.raises(ValueError, match=r"99 tokens exceed the 96 .* no mask"):
        cache.attend(0, few, few, mx.full((2, 99), True))
    cache.trim(LIMIT + 1)
    cache.pin(twenty)
    with pytest.raises(ValueError, match="max_tokens is 35"):
        BoundedKVCache(3, SINKS + RECENT - 1)


# Options


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_bits": 3}, "kv_bits is 3; it must be 4 or 8"),
        ({"kv_bits": 16}, "kv_bits is 16"),
        ({"kv_group_size": 128}, "kv_group_size is 128; it must be 32 or 64"),
        ({"max_kv_tokens": 71}, "max_kv_tokens is 71; it must be 72 or above"),
        ({"folder": "x", "kv_bits": 8}, "neither kv_bits nor max_kv_tokens"),
        ({"folder": "x", "max_kv_tokens": 100}, "neither kv_bits nor max_kv_tokens"),
    ],
)
def test_options_out_of_range(wrong: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CacheOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("width", "group", "advice"),
    [(96, 64, "a kv_group_size of 32"), (72, 64, "leave kv_bits out"), (16, 32, "leave kv_bits")],
)
def test_heads_that_do_not_divide(width: int, group: int, advice: str) -> None:
    text = TextConfig(64, 96, 2, 4, 2, width, 1e4, 1e-5, 640, 512, False)
    with pytest.raises(CheckpointError, match=f"are {width} wide.*{group}; .*{advice}"):
        CacheOptions(kv_bits=8, kv_group_size=group).check(text)
    CacheOptions(max_kv_tokens=100).check(text)
    CacheOptions(kv_bits=8, kv_group_size=32).check(
        TextConfig(64, 96, 2, 4, 2, 96, 1e4, 1e-5, 640, 512, False)
    )
