"""The loss and its gradient against transformers', with the same weights, rows and labels."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch")

from mlx_smolvlm.smolvlm import SmolVLM  # noqa: E402
from mlx_smolvlm.train.batches import (  # noqa: E402  # noqa: E402
    BatchLoader,
    EmbeddingCache,
    MediaOptions,
    build_row,
    measure_media,
)
from mlx_smolvlm.train.dataset import read_dataset  # noqa: E402
from mlx_smolvlm.train.loss import Batch, answer_loss, checkpointed_loss  # noqa: E402
from mlx_smolvlm.train.parameters import freeze_other_parts  # noqa: E402
from tests.helpers import model_pairs as models  # noqa: E402
from tests.helpers import tuning_cases as cases  # noqa: E402

CASE = models.Case(
    False,
    {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
     "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
    {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
     "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 700,
     "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
     "tie_word_embeddings": False},
    2, 64,
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random SmolVLM in both libraries."""
    torch.set_num_threads(1)
    return models.make_pair(CASE, tmp_path_factory.mktemp("training"))


def batches(vlm: SmolVLM, folder: Path) -> tuple[Batch, Batch]:
    """The same six conversations twice: with pixels, and with embeddings."""
    examples = read_dataset(cases.make_dataset(folder))
    found = []
    for features in (None, EmbeddingCache(vlm)):
        loader = BatchLoader(vlm, lambda number: examples, 1, MediaOptions(), features)
        found.append(loader.load_batch(0))
        loader.close()
    return found[0], found[1]


def theirs(model: Any, vlm: SmolVLM, folder: Path, batch: Batch) -> Any:
    """transformers' loss of `batch`, with labels of -100 where the rows have no target."""
    ids = torch.tensor(batch.input_ids, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(read_dataset(folder)):
        told = build_row(
            vlm.engine.prompt_builder, example, measure_media(vlm, example, MediaOptions())
        )
        for place in np.flatnonzero(told.is_target):
            labels[row, place] = int(told.ids[place])
    # Rows end at their last target, or at the line break behind it.
    ends = [int(np.flatnonzero(row)[-1]) + 1 for row in batch.input_ids]
    mask = torch.tensor([[i < end for i in range(ids.shape[1])] for end in ends]).long()
    assert batch.pixel_values is not None
    tiles = torch.tensor(batch.pixel_values).permute(0, 3, 1, 2)
    per_tile = vlm.config.image_seq_len
    counts = [int((row == vlm.config.image_token_id).sum()) // per_tile for row in batch.input_ids]
    pixels = torch.zeros(len(counts), max(counts), *tiles.shape[1:])
    for row, (count, stop) in enumerate(zip(counts, np.cumsum(counts), strict=True)):
        pixels[row, :count] = tiles[stop - count : stop]
    return model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss


def test_the_loss_equals_transformers(pair: Any, tmp_path: Path) -> None:
    with_pixels, with_embeds = batches(pair.in_mlx, tmp_path)
    lengths = [(row != 0).sum() for row in with_pixels.input_ids]
    assert max(lengths) > 2 * min(lengths)  # there is padding
    assert with_embeds.pixel_values is None
    with torch.no_grad():
        expected = float(theirs(pair.theirs, pair.in_mlx, tmp_path, with_pixels))
    for loss in (answer_loss, checkpointed_loss):
        for batch in (with_pixels, with_embeds):
            total, count = loss(pair.in_mlx.model, batch)
            assert (total / count).item() == pytest.approx(expected, abs=1e-4)


def test_the_gradient_equals_transformers(pair: Any, tmp_path: Path) -> None:
    vlm = pair.in_mlx
    batch, _ = batches(vlm, tmp_path)
    pair.theirs.zero_grad()
    theirs(pair.theirs, vlm, tmp_path, batch).backward()
    freeze_other_parts(vlm.model, ("text", "vision", "connector", "embeddings"))
    (_, count), gradient = nn.value_and_grad(vlm.model, answer_loss)(vlm.model, batch)
    own = {name: np.array(array) / count.item() for name, array in tree_flatten(gradient)}
    other = {
        name.removeprefix("model."): parameter.grad.numpy()
        for name, parameter in pair.theirs.named_parameters()
        if parameter.grad is not None
    }
    same = [name for name in own if name in other and own[name].shape == other[name].shape]
    assert "connector.modality_projection.proj.weight" in same
    assert "vision_model.encoder.layers.0.mlp.fc1.weight" in same
    assert "lm_head.weight" in same
    for name in same:
        np.testing.assert_allclose(own[name], other[name], atol=1e-4, err_msg=name)
    for layer in ("text_model.layers.0", "text_model.layers.1"):
        parts = [other[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
        joined = own[f"{layer}.self_attn.qkv_proj.weight"]
        np.testing.assert_allclose(joined, np.concatenate(parts), atol=1e-4)
    mx.eval(vlm.model.parameters())
