"""GPTQ of one matrix, compared with the update formula of the paper."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert.options import AFFINE_BITS, pack, unpack
from mlx_smolvlm.convert.quant.gptq import GptqOptions, compensate, pack_levels

UNCUT = GptqOptions(shrinks=(1.0,))


def make_case(seed=0, rows=48, width=256, tokens=700):
    """A weight (rows, width) and correlated inputs (tokens, width)."""
    random = np.random.default_rng(seed)
    inputs = random.normal(size=(tokens, width // 4)) @ random.normal(size=(width // 4, width))
    inputs += random.normal(size=(tokens, width))
    weight = random.normal(size=(rows, width)) * random.uniform(0.3, 3, size=(rows, 1))
    return mx.array(weight.astype(np.float32)), inputs.astype(np.float32)


def moment_of(inputs):
    return mx.array(inputs.T @ inputs)


def error_of(weight, inputs, arrays, quantization):
    """Squared error of the products with the inputs."""
    wide = {s: a if s == "weight" else a.astype(mx.float32) for s, a in arrays.items()}
    errors = np.array(unpack(wide, quantization, mx.float32) - weight)
    return float(np.square(inputs @ errors.T).sum())


def by_the_book(weight, inputs, quantization, damping):
    """Levels of GPTQ in float64: the inverse of H shrinks by one column a step, as in the paper."""
    weight = np.array(weight, np.float64)
    moment = inputs.T.astype(np.float64) @ inputs
    inverse = np.linalg.inv(moment + damping * np.mean(np.diag(moment)) * np.eye(len(moment)))
    levels, most = np.zeros(weight.shape), 2**quantization.bits - 1
    for j in range(weight.shape[1]):
        if j % quantization.group_size == 0:
            group = weight[:, j : j + quantization.group_size].astype(np.float32)
            found = mx.quantize(mx.array(group), quantization.group_size, quantization.bits)
            scale, bias = (np.array(one)[:, 0].astype(np.float64) for one in found[1:])
        levels[:, j] = np.clip(np.rint((weight[:, j] - bias) / scale), 0, most)
        error = weight[:, j] - (levels[:, j] * scale + bias)
        weight -= np.outer(error, inverse[j] / inverse[j, j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1  # done with; anything but 0, by which the next steps would divide
    return levels


def levels_of(arrays, quantization):
    """The integers of packed arrays."""
    ones = mx.ones(arrays["scales"].shape)
    plain = {"weight": arrays["weight"], "scales": ones, "biases": mx.zeros_like(ones)}
    return np.array(unpack(plain, quantization, mx.float32))


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_independent_inputs_make_it_plain_rounding(bits):
    quantization = Quantization(bits, 64, "affine")
    weight, _ = make_case()
    rounded = pack(weight, quantization)
    for moment in (3 * mx.eye(256), mx.zeros((256, 256))):
        found = compensate(weight, moment, quantization, mx.float32, UNCUT)
        assert found.keys() == rounded.keys()
        assert all(mx.array_equal(found[suffix], rounded[suffix]) for suffix in rounded)
        assert all(found[suffix].dtype == rounded[suffix].dtype for suffix in rounded)


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (4, 64), (4, 128), (6, 64)])
def test_the_levels_are_those_of_the_formula_in_the_paper(bits, group_size):
    quantization = Quantization(bits, group_size, "affine")
    weight, inputs = make_case(bits)
    found = compensate(weight, moment_of(inputs), quantization, mx.float32, UNCUT)
    expected = by_the_book(weight, inputs, quantization, UNCUT.damping)
    same = levels_of(found, quantization) == expected
    assert same.mean() > 0.99  # float32 rounds a level that lies between two the other way
    assert same[:, :group_size].mean() > 0.999


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_products_lie_nearer_than_rounded_ones_and_nearer_still_with_cut_ranges(bits):
    quantization = Quantization(bits, 64, "affine")
    weight, inputs = make_case(bits)
    errors = [error_of(weight, inputs, pack(weight, quantization), quantization)]
    for options in (UNCUT, GptqOptions()):
        found = compensate(weight, moment_of(inputs), quantization, mx.float32, options)
        errors.append(error_of(weight, inputs, found, quantization))
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]


def test_what_scales_lose_in_bfloat16_is_made_up_for_too():
    quantization = Quantization(6, 64, "affine")
    weight, inputs = make_case()
    known = compensate(weight, moment_of(inputs), quantization, mx.bfloat16, UNCUT)
    assert known["scales"].dtype == known["biases"].dtype == mx.bfloat16
    late = compensate(weight, moment_of(inputs), quantization, mx.float32, UNCUT)
    late |= {s: late[s].astype(mx.bfloat16) for s in ("scales", "biases")}
    errors = [error_of(weight, inputs, one, quantization) for one in (known, late)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_levels_are_packed_as_mlx_unpacks_them(bits):
    levels = np.random.default_rng(bits).integers(0, 2**bits, (3, 128), dtype=np.uint8)
    packed = {"weight": mx.array(pack_levels(levels, bits)), "scales": mx.zeros((3, 2))}
    assert np.array_equal(levels_of(packed, Quantization(bits, 64, "affine")), levels)


def test_inputs_that_were_never_seen_move_nothing():
    quantization = Quantization(4, 64, "affine")
    weight, inputs = make_case()
    inputs[:, 100:] = 0
    found = compensate(weight, moment_of(inputs), quantization, mx.float32, UNCUT)
    rounded = pack(weight, quantization)
    same = levels_of(found, quantization) == levels_of(rounded, quantization)
    assert same[:, 128:].all()
    assert not same[:, :100].all()


def test_chunks_of_rows_change_nothing(monkeypatch):
    quantization = Quantization(4, 64, "affine")
    weight, inputs = make_case()
    whole = compensate(weight, moment_of(inputs), quantization, mx.float32)
    monkeypatch.setattr("mlx_smolvlm.convert.quant.gptq.ROWS", 20)
    parts = compensate(weight, moment_of(inputs), quantization, mx.float32)
    same = levels_of(whole, quantization) == levels_of(parts, quantization)
    assert same.mean() > 0.999  # a product of other sizes may round its last bit differently
    assert parts["scales"].shape == whole["scales"].shape
