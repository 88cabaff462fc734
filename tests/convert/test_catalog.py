"""Sizes and memory of the published models, and the precision that suits a machine."""

import math
from pathlib import Path

import pytest

from mlx_smolvlm.checkpoint.headers import read_headers
from mlx_smolvlm.checkpoint.load import read_config
from mlx_smolvlm.convert.catalog import MODELS, PHOTO_MODEL, list_figures
from mlx_smolvlm.convert.fit import PRECISIONS, choose_bits, count_weight_bytes, estimate_answer
from mlx_smolvlm.convert.hub import ALIASES, resolve
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.generate.memory_plan import Machine
from tests.helpers import hf_folder

GB, GIB = 10**9, 2**30
# Numbers of weights in the published files.
WEIGHTS = {
    "smolvlm-256m": 256_484_928,
    "smolvlm-500m": 507_482_304,
    "smolvlm-2.2b": 2_246_272_880,
    "smolvlm2-256m": 256_484_928,
    "smolvlm2-500m": 507_482_304,
    "smolvlm2-2.2b": 2_246_784_880,
    "smoldocling": 256_484_928,
    "granite-docling": 257_517_120,
}


def test_every_alias_is_described_with_the_published_number_of_weights() -> None:
    assert list(MODELS) == list(ALIASES) == list(WEIGHTS)
    for alias, model in MODELS.items():
        assert count_weight_bytes(model.config, 16, 1) == WEIGHTS[alias]
        assert model.purpose


@pytest.mark.parametrize(
    ("alias", "published_gb"),
    [("smolvlm-256m", 0.8), ("smolvlm-500m", 1.2), ("smolvlm-2.2b", 4.9)],
)
def test_memory_on_a_gpu_is_near_the_published_one(alias: str, published_gb: float) -> None:
    machine = Machine("mlx-gpu", 2, None)
    estimated = estimate_answer(MODELS[alias].config, 16, machine)
    assert estimated == pytest.approx(published_gb * GB, rel=0.15)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_size_of_a_conversion_is_foreseen(tmp_path: Path, bits: int):
    settings = hf_folder.settings()
    source = hf_folder.make(tmp_path / "source", settings)
    folder = convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=bits))
    stored = sum(info.nbytes for info in read_headers(folder).values())
    assert count_weight_bytes(read_config(folder), bits, 4) == pytest.approx(stored, rel=0.02)


@pytest.mark.parametrize(
    ("gib", "bits"),
    [
        (8, {"smolvlm2-256m": 16, "smolvlm2-500m": 16, "smolvlm2-2.2b": 8, "smolvlm-2.2b": 8}),
        (16, dict.fromkeys(MODELS, 16)),
        (5, {"smolvlm2-500m": 16, "smolvlm2-2.2b": 4}),
        (2, {"smolvlm2-256m": 16, "smolvlm2-500m": 8}),
    ],
)
def test_the_bits_that_suit_a_mac(gib: int, bits: dict[str, int]) -> None:
    machine = Machine("mlx-gpu", 2, gib * GIB)
    for alias, wanted in bits.items():
        found = choose_bits(MODELS[alias].config, machine)
        assert (found.bits, found.suits) == (wanted, True)
        assert found.answer_bytes == estimate_answer(MODELS[alias].config, wanted, machine)


def test_what_suits_at_no_precision_gets_the_fewest_bits_and_an_unknown_machine_floats() -> None:
    config = MODELS["smolvlm2-2.2b"].config
    small = choose_bits(config, Machine("mlx-gpu", 2, 2 * GIB))
    assert (small.bits, small.suits) == (4, False)
    unknown = choose_bits(config, Machine("numpy", 4, None))
    assert (unknown.bits, unknown.suits) == (16, True)


@pytest.mark.parametrize("machine", [Machine("mlx-gpu", 2, None), Machine("numpy", 4, None)])
def test_fewer_bits_take_less(machine: Machine) -> None:
    for model in MODELS.values():
        sizes = [estimate_answer(model.config, bits, machine) for bits in PRECISIONS]
        assert math.inf > sizes[0] > sizes[1] > sizes[2] > 0
    assert PHOTO_MODEL in MODELS


def test_figures_of_the_demo_and_the_published_models() -> None:
    demo, *others = list_figures(Machine("mlx-gpu", 2, 8 * GIB))
    assert (demo.alias, demo.download_bytes, demo.fits_bits) == ("demo", 0, 16)
    stored = (resolve("demo") / "model.safetensors").stat().st_size
    assert demo.disk_bytes[16] == pytest.approx(stored, rel=0.01)
    assert [one.alias for one in others] == list(ALIASES)
    for one in others:
        width = 4 if one.alias.startswith("smolvlm2") else 2  # float32 or bfloat16
        assert one.download_bytes == one.disk_bytes[16] == width * WEIGHTS[one.alias]
        assert one.disk_bytes[16] > one.disk_bytes[8] > one.disk_bytes[4] > 0
        assert one.answer_bytes[8] == estimate_answer(
            MODELS[one.alias].config, 8, Machine("mlx-gpu", 2, None)
        )
        assert one.fits_bits == (8 if "2.2b" in one.alias else 16)
    tight = list_figures(Machine("mlx-gpu", 2, GIB))
    assert [one.fits_bits for one in tight][:2] == [16, None]
