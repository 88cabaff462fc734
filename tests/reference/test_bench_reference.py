"""`bench` drives other programs so that they compute what this package does."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_smolvlm.bench import random_model
from mlx_smolvlm.bench.measure import Result, compare_outputs
from mlx_smolvlm.bench.models import BenchModel, make_random_model, open_model
from mlx_smolvlm.bench.peer import Peer
from mlx_smolvlm.bench.worker import Worker

TEXT = {"do": "text", "prompt": 40, "tokens": 7}
VISION = {"do": "vision", "tiles": 5, "side": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BenchModel:
    """Random weights of a size of two layers."""
    vision, text, factor = random_model.SIZES["256m"]
    vision = replace(vision, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    text = replace(text, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
    text = replace(text, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    sizes = (replace(vision, num_attention_heads=2, image_size=64), text, factor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(random_model.SIZES, "256m", sizes)
        return make_random_model("256m", (), tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def ours(model: BenchModel) -> Result:
    (folder,) = model.folders.values()
    worker = Worker(str(folder))
    ids, sample = worker.answer(TEXT)["ids"], worker.answer(VISION)["sample"]
    return Result("ours", True, token_ids=ids, sample=sample)


# mlx-vlm, with its 67 packages, is none of the oracles; where it is installed, it is tested too.
HAS_MLX_VLM = importlib.util.find_spec("mlx_vlm") is not None
PEERS = ["transformers", "mlx-lm", *(["mlx-vlm"] if HAS_MLX_VLM else [])]


# transformers' new name for the cache does not exist in older versions.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_the_same(model: BenchModel, ours: Result, name: str) -> None:
    pytest.importorskip("mlx_lm" if name == "mlx-lm" else "torch")
    peer = Peer(name, model.get_source())
    theirs = Result(name, False, version=peer.ready["version"])
    answer = peer.answer(TEXT)
    theirs.token_ids = answer["ids"]
    assert answer["prefill_s"] > 0
    assert answer["decode_s"] > 0
    text = "8 of 8 token ids the same"
    if name != "mlx-lm":
        theirs.sample = peer.answer(VISION)["sample"]
        assert theirs.sample == pytest.approx(ours.sample, abs=1e-4)
        text += ", features the same"
    assert compare_outputs(ours, theirs).startswith(text)
    if name != "transformers":
        assert len(peer.answer({"do": "graph", "prompt": 8, "repeat": 2})["seconds"]) == 2


def test_a_folder_of_hugging_face_serves_both(model: BenchModel, tmp_path: Path) -> None:
    opened = open_model(str(model.get_source()), (8,), tmp_path)
    assert opened.get_source() == model.get_source()
    assert list(opened.folders) == ["8 bits"]
