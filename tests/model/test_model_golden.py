"""All stages of the network are compared with recorded ones of transformers."""

import gzip
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm.checkpoint.load import load_model
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.model.cpu import compute_in_numpy
from tests.helpers import network_cases as cases

TESTS = Path(__file__).parents[1]
STATES = 1e-4


GOLDEN = json.loads(gzip.decompress((TESTS / "golden" / "network.json.gz").read_bytes()))


@pytest.mark.parametrize("name", cases.CASES)
def test_every_stage(name: str, tmp_path: Path) -> None:
    folder = convert_checkpoint(cases.make(tmp_path / "hf", name), tmp_path / "ours")
    model = load_model(folder, "float32")
    seen = cases.stages(model, *cases.inputs(name))
    golden = GOLDEN[name]
    assert list(seen) == list(golden["stages"])
    for stage, expected in golden["stages"].items():
        got = np.array(cases.sample(seen[stage]))
        assert np.abs(got).max() > 0.1
        assert np.abs(got - np.array(expected)).max() <= STATES, stage
    assert cases.greedy(model, seen["merged embeddings"]) == golden["token_ids"]
    compute_in_numpy(model)
    pixel_values, input_ids = cases.inputs(name)
    merged = model.embed(input_ids, model.encode(mx.array(pixel_values)))
    whole = {"merged embeddings": merged, "logits": model(merged)}
    for stage, array in whole.items():
        difference = np.array(cases.sample(array)) - np.array(golden["stages"][stage])
        assert np.abs(difference).max() <= STATES, stage
    assert cases.greedy(model, merged) == golden["token_ids"]
