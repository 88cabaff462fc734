"""A real training does what its settings say: every step is compared with numpy's."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_smolvlm.checkpoint.load import build_model, load_model, read_config
from mlx_smolvlm.checkpoint.lora import load_adapter, read_adapter_config, save_adapter
from mlx_smolvlm.config import Quantization, QuantizationConfig
from mlx_smolvlm.errors import TrainingError
from mlx_smolvlm.smolvlm import load, load_in_mlx
from mlx_smolvlm.train.batches import BatchLoader, EmbeddingCache, MediaOptions
from mlx_smolvlm.train.dataset import Example
from mlx_smolvlm.train.finetune import Tuning
from mlx_smolvlm.train.loop import Loop, LoopOptions, Schedule
from mlx_smolvlm.train.loss import answer_loss, checkpointed_loss
from mlx_smolvlm.train.parameters import fuse, start_adapter
from mlx_smolvlm.train.settings import LoraSettings, read_settings
from tests.helpers import tuning_cases as cases


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a dataset in data."""
    cases.make_dataset(tmp_path / "data")
    return tmp_path


def open_tuning(work: Path, model: Path, out: str = "out", **changes: Any) -> Tuning:
    """A training that has made no step."""
    return Tuning(read_settings(cases.write_config(work, model, **changes)), work / out)


def run(tuning: Tuning) -> None:
    """Make every step."""
    try:
        for _ in tuning.run():
            pass
    finally:
        tuning.close()


# What the optimizer does


OPTIMIZER = {
    "rate": 0.02,
    "schedule": "cosine",
    "warmup": 2,
    "floor": 0.3,
    "weight_decay": 0.5,
    "clip": 0.05,
}
STEPS, ACCUMULATE = 5, 2
NAME = "connector.modality_projection.proj.weight"


def expected_rates() -> list[float]:
    """A line up to the rate, then a cosine down to the floor."""
    rate, warmup, floor = (OPTIMIZER[name] for name in ("rate", "warmup", "floor"))
    rates = [rate * (step + 1) / (warmup + 1) for step in range(warmup)]
    for step in range(STEPS - warmup):
        share = step / (STEPS - warmup)
        rates.append(rate * (floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2))
    return rates


def train_by_hand(tuning: Tuning) -> tuple[np.ndarray, list[float]]:
    """The trained matrix after every step, by AdamW in float64, and each gradient's norm."""
    model, loader = tuning.vlm.model, tuning._loader
    weight = np.array(dict(tree_flatten(model.parameters()))[NAME], np.float64)
    mean, square, norms = np.zeros_like(weight), np.zeros_like(weight), []
    differentiate = nn.value_and_grad(model, answer_loss)
    for step, rate in enumerate(expected_rates()):
        gradient, count = np.zeros_like(weight), 0
        for part in range(ACCUMULATE):
            batch = loader.load_batch(step * ACCUMULATE + part)
            _, found = differentiate(model, batch)
            gradient += np.array(dict(tree_flatten(found))[NAME], np.float64)
            count += batch.targets.size
        gradient /= count
        norms.append(float(np.linalg.norm(gradient)))
        gradient *= min(1, OPTIMIZER["clip"] / (norms[-1] + 1e-6))
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        weight *= 1 - rate * OPTIMIZER["weight_decay"]
        moved = mean / (1 - 0.9 ** (step + 1))
        weight -= rate * moved / (np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8)
        model.load_weights([(NAME, mx.array(weight.astype(np.float32)))], strict=False)
    tuning.close()
    return weight, norms


def test_a_run_makes_the_steps_of_adamw(tiny_folder: Path, work: Path) -> None:
    changes: dict[str, Any] = {f"optimizer__{name}": value for name, value in OPTIMIZER.items()}
    changes |= {"method": "full", "parts": ["connector"], "steps": STEPS}
    changes |= {"accumulate": ACCUMULATE, "seed": 3}
    expected, norms = train_by_hand(open_tuning(work, tiny_folder, "by-hand", **changes))
    run(open_tuning(work, tiny_folder, **changes))
    found = dict(tree_flatten(load_model(work / "out" / "model").parameters()))[NAME]
    before = np.array(dict(tree_flatten(load_model(tiny_folder).parameters()))[NAME])
    assert np.abs(expected - before).max() > 0.01
    np.testing.assert_allclose(np.array(found), expected, atol=2e-5)
    log = [json.loads(line) for line in (work / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["rate"] for line in log] == pytest.approx(expected_rates())
    assert [line["norm"] for line in log] == pytest.approx(norms, rel=1e-3)
    assert min(norms) > OPTIMIZER["clip"]


def test_layers_are_computed_twice_only_if_asked(
    tiny_folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = nn.utils.checkpoint

    def count(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
        calls.append(module)
        return real(module, function)

    monkeypatch.setattr(nn.utils, "checkpoint", count)
    for is_asked in (False, True):
        calls.clear()
        changes: dict[str, Any] = {"steps": 1, "accumulate": 3, "checkpoint_gradients": is_asked}
        changes["parts"] = ["text"]
        run(open_tuning(work, tiny_folder, f"out-{is_asked}", **changes))
        layers = len(load_model(tiny_folder).text_model.layers)
        assert len(calls) == (3 * layers if is_asked else 0)


# Dropout


class Mask(nn.Module):
    """A dropout whose gradient shows which numbers it kept."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.dropout = mx.ones((64,)), nn.Dropout(0.5)

    def __call__(self) -> mx.array:
        kept: mx.array = self.dropout(self.weight)
        return kept


def test_every_batch_of_every_step_drops_others() -> None:
    def loss(trainee: Mask, batch: int) -> tuple[mx.array, mx.array]:
        return trainee().sum(), mx.array(1.0)

    def masks(accumulate: int) -> list[np.ndarray]:
        options = LoopOptions(Schedule(0.0, 4), accumulate, seed=5)
        loop = Loop(Mask(), loss, nn_optimizer(), lambda number: number, options)
        found = []
        for step in range(3):
            loop.step = step
            found.append(np.array(loop.compute_gradient()[2]["weight"]) * accumulate)
        return found

    single, again, double = masks(1), masks(1), masks(2)
    for one, same in zip(single, again, strict=True):
        np.testing.assert_array_equal(one, same)
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert 10 < (single[first] != single[second]).sum() < 54
    for sums, one in zip(double, single, strict=True):
        assert set(sums.tolist()) == {0.0, 2.0, 4.0}  # dropped by both, one or neither
        assert (sums >= one).all()


def nn_optimizer() -> Any:
    import mlx.optimizers as optim

    return optim.SGD(0.0)


def test_checkpointed_layers_drop_by_layer_and_batch(
    tiny_folder: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "steps": 2,
        "accumulate": 2,
        "checkpoint_gradients": True,
        "lora__dropout": 0.5,
    }
    changes["parts"] = ["text"]
    tuning = open_tuning(work, tiny_folder, **changes)
    seeds: list[int] = []
    real = mx.random.seed
    monkeypatch.setattr(mx.random, "seed", lambda seed: (seeds.append(seed), real(seed))[1])
    run(tuning)
    steps = [seed for seed in seeds if seed in (1_000_003, 1_000_004)]
    layers = [seed for seed in seeds if seed not in steps]
    assert steps == [1_000_003, 1_000_004]
    count = len(tuning.vlm.model.text_model.layers)
    # Each layer of each batch has a seed of its own, once forward and once for the gradient.
    assert set(Counter(layers).values()) == {2}
    assert len(layers) == 2 * 4 * count


def test_other_batches_and_layers_are_dropped_differently(tiny_folder: Path, work: Path) -> None:
    vlm = load_in_mlx(tiny_folder)
    config = start_adapter(vlm.model, ("text",), LoraSettings(rank=4, dropout=0.5), "a test")
    modules = dict(vlm.model.named_modules())
    for path in config.modules:
        modules[path].lora_b = modules[path].lora_b + 0.05
    vlm.model.train()
    tuning = open_tuning(work, tiny_folder)
    batch = tuning._loader.load_batch(0)
    tuning.close()
    losses = [
        checkpointed_loss(vlm.model, replace(batch, seed=seed))[0].item() for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-4


def test_held_out_answers_are_judged_without_dropout(tiny_folder: Path, work: Path) -> None:
    cases.make_dataset(work / "data", 4, "valid")
    tuning = open_tuning(work, tiny_folder, steps=3, lora__dropout=0.9, optimizer__rate=0.05)
    run(tuning)
    log = [json.loads(line) for line in (work / "out" / "log.jsonl").read_text().splitlines()]
    vlm = load_in_mlx(tiny_folder)
    load_adapter(vlm.model, work / "out" / "adapter", vlm.config.source)
    assert tuning._valid is not None
    loader, batches = tuning._valid
    fresh = BatchLoader(vlm, loader._select_examples, batches, MediaOptions(), EmbeddingCache(vlm))
    pairs = [answer_loss(vlm.model, fresh.load_batch(number)) for number in range(batches)]
    batch = fresh.load_batch(0)
    fresh.close()
    mean = sum(value.item() for value, _ in pairs) / sum(count.item() for _, count in pairs)
    assert log[-1]["valid_loss"] == pytest.approx(mean, abs=1e-5)
    vlm.model.train()
    dropped, _ = answer_loss(vlm.model, batch)
    vlm.model.eval()
    whole, _ = answer_loss(vlm.model, batch)
    assert abs(dropped.item() - whole.item()) > 1e-3


# Adapters


def save_random_adapter(folder: Path, model_folder: Path, parts: tuple[str, ...]) -> Path:
    """An adapter whose matrices all matter."""
    model = load_model(model_folder)
    lora = LoraSettings(rank=4, scale=3.0, dropout=0.5)
    config = start_adapter(model, parts, lora, read_config(model_folder).source)
    modules = dict(model.named_modules())
    rng = np.random.default_rng(0)
    for path in config.modules:
        shape = modules[path].lora_b.shape
        modules[path].lora_b = mx.array(rng.normal(size=shape).astype(np.float32) * 0.1)
    save_adapter(model, folder, config)
    return folder


def test_a_loaded_adapter_adds_its_scaled_product(tiny_folder: Path, tmp_path: Path) -> None:
    folder = save_random_adapter(tmp_path / "adapter", tiny_folder, ("text", "connector"))
    config = read_adapter_config(folder)
    arrays: Any = mx.load(str(folder / "adapters.safetensors"))
    vlm, plain = load_in_mlx(tiny_folder), load_model(tiny_folder)
    load_adapter(vlm.model, folder, vlm.config.source)
    bases = dict(plain.named_modules())
    for path, module in vlm.model.named_modules():
        if path not in config.modules:
            continue
        a, b = (np.array(arrays[f"{path}.{name}"], np.float64) for name in ("lora_a", "lora_b"))
        x = np.random.default_rng(1).normal(size=(3, a.shape[0]))
        own = x @ np.array(bases[path].weight, np.float64).T
        if "bias" in bases[path]:
            own += np.array(bases[path].bias)
        expected = own + 3.0 * (x @ a) @ b
        found = module(mx.array(x.astype(np.float32)))  # also: nothing is dropped
        np.testing.assert_allclose(np.array(found), expected, atol=1e-4)
        assert np.abs(expected - own).max() > 0.1
    assert not any(module.training for _, module in vlm.model.named_modules())


def test_a_fused_checkpoint_keeps_other_overrides(tiny_folder: Path, tmp_path: Path) -> None:
    eight = Quantization(8, 32, "affine")
    kept, adapted = "text_model.layers.0.mlp.down_proj", "connector.modality_projection.proj"
    config = read_config(tiny_folder)
    quantization = QuantizationConfig(
        None, None, None, None, overrides=((adapted, eight), (kept, eight))
    )
    config = replace(config, quantization=quantization)
    whole = dict(tree_flatten(load_model(tiny_folder).parameters()))
    for path in (kept, adapted):
        packed = mx.quantize(whole.pop(f"{path}.weight"), 32, 8)
        names = ("weight", "scales", "biases")
        whole |= {f"{path}.{name}": array for name, array in zip(names, packed, strict=True)}
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    (base / "config.json").write_text(json.dumps(config.to_dict()))
    mx.save_safetensors(str(base / "model.safetensors"), whole)
    assert {path for path, _ in tree_flatten(build_model(config).parameters())} == set(whole)
    adapter = save_random_adapter(tmp_path / "adapter", base, ("connector",))
    fused = read_config(fuse(base, adapter, tmp_path / "fused")).quantization
    assert fused.find(kept) == eight
    assert fused.find(adapted) is None
    load(tmp_path / "fused")


# Data


def test_rows_that_share_their_first_picture_are_told_apart(tiny_folder: Path, work: Path) -> None:
    names = [work / f"{i}.png" for i in range(3)]
    for i, path in enumerate(names):
        cases.noise(40, 40, i).save(path)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
    ]

    def example(*images: Path) -> Example:
        return replace(template, images=images, messages=messages)

    vlm = load(tiny_folder)
    tuning = open_tuning(work, tiny_folder)
    template = tuning._loader._select_examples(0)[0]
    tuning.close()
    rows = [example(names[0], names[1]), example(names[0], names[2])]
    loader = BatchLoader(vlm, lambda number: [rows[number]], 2, MediaOptions(), EmbeddingCache(vlm))
    found = [np.array(loader.load_batch(number).image_embeds) for number in (0, 1)]
    loader.close()
    for number, row in enumerate(rows):
        expected = vlm.encode_images([str(path) for path in row.images])
        np.testing.assert_allclose(found[number], np.array(expected), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_a_training_does_not_go_on_with_other_pictures(tiny_folder: Path, work: Path) -> None:
    tuning = open_tuning(work, tiny_folder, steps=2)
    run(tuning)
    picture = work / "data" / "train1-0.png"
    with picture.open("ab") as file:
        file.write(b"another end")
    with pytest.raises(TrainingError, match="the data changed"):
        open_tuning(work, tiny_folder, steps=2)


def test_datasets_are_mixed_by_their_weights(tiny_folder: Path, work: Path) -> None:
    cases.make_dataset(work / "more", 3)
    path = cases.write_config(work, tiny_folder, steps=40, batch_size=4)
    text = path.read_text().split("\n[[data]]")[0]
    for name, weight in (("data", 1.0), ("more", 3.0)):
        text += f'\n[[data]]\npath = "{name}"\nweight = {weight}\n'
    path.write_text(text)
    tuning = Tuning(read_settings(path), work / "out")
    drawn = [one for number in range(40) for one in tuning._loader._select_examples(number)]
    tuning.close()
    often = Counter((one.file.parent.name, one.where) for one in drawn)
    totals = Counter(one.file.parent.name for one in drawn)
    assert totals["more"] / totals["data"] == pytest.approx(3, rel=0.1)
    for name, size in (("data", 6), ("more", 3)):
        counts = [count for (folder, _), count in often.items() if folder == name]
        assert len(counts) == size
        assert max(counts) - min(counts) <= 1
