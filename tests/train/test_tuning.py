"""Training of checkpoints: tokens, gradients, adapters, and going on after a stop."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_smolvlm.checkpoint.load import build_model, load_model, read_config
from mlx_smolvlm.checkpoint.lora import load_adapter, read_adapter_config
from mlx_smolvlm.config import Quantization, QuantizationConfig
from mlx_smolvlm.errors import CheckpointError, DatasetError, SmolVLMWarning, TrainingError
from mlx_smolvlm.generate.sampling import Sampling
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.smolvlm import SmolVLM, load, load_in_mlx
from mlx_smolvlm.train.batches import (
    BatchLoader,
    EmbeddingCache,
    MediaOptions,
    build_row,
    measure_media,
    open_media,
)
from mlx_smolvlm.train.dataset import read_dataset
from mlx_smolvlm.train.finetune import Tuning
from mlx_smolvlm.train.loss import Batch, answer_loss, checkpointed_loss, compute_hidden_states
from mlx_smolvlm.train.parameters import freeze_other_parts, start_adapter
from mlx_smolvlm.train.settings import LoraSettings, read_settings
from tests.helpers import tuning_cases as cases


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a dataset in data."""
    cases.make_dataset(tmp_path / "data")
    cases.make_dataset(tmp_path / "data", 4, "valid")
    return tmp_path


@pytest.fixture(scope="module")
def packed_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with its decoder, connector and embeddings in 4 bits."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    shutil.copytree(tiny_folder, folder)
    four = Quantization(4, 32, "affine")
    config = read_config(tiny_folder)
    config = replace(config, quantization=QuantizationConfig(four, None, four, four))
    empty, whole = build_model(config), dict(tree_flatten(load_model(tiny_folder).parameters()))
    weights: dict[str, mx.array] = {}
    for path, module in empty.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            arrays = mx.quantize(whole.pop(f"{path}.weight"), 32, 4)
            names = ("weight", "scales", "biases")
            weights |= {f"{path}.{n}": a for n, a in zip(names, arrays, strict=True)}
    mx.save_safetensors(str(folder / "model.safetensors"), {**whole, **weights})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def tune(
    work: Path, model: Path, out: str = "out", steps: int | None = None, **changes: Any
) -> Path:
    """The folder of a training that was run, or stopped after `steps`."""
    tuning = Tuning(read_settings(cases.write_config(work, model, **changes)), work / out)
    try:
        for event in tuning.run():
            if event.report is not None and event.report.step == steps:
                break
    finally:
        tuning.close()
    return work / out


def batch_of(vlm: SmolVLM, seed: int = 0) -> Batch:
    """Two rows of unlike length, one with a picture of five tiles."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 600, (2, 48)).astype(np.int32)
    tokens = 5 * vlm.config.image_seq_len
    ids[0, 3 : 3 + tokens] = vlm.config.image_token_id
    ids[1, 20:] = 0
    places = np.array([45, 46, 48 + 10, 48 + 18], np.int32)
    pixels = rng.normal(size=(5, 32, 32, 3)).astype(np.float32)
    return Batch(ids, places, ids.reshape(-1)[places + 1], pixels, None, seed)


def gradients(model: Any, loss: Any, batch: Batch) -> dict[str, np.ndarray]:
    """The gradient of every trained parameter."""
    mx.random.seed(0)
    _, found = nn.value_and_grad(model, loss)(model, batch)
    return {name: np.array(array) for name, array in tree_flatten(found)}


# Tokens


def test_training_sees_the_tokens_that_ask_prefills(tiny: SmolVLM, work: Path) -> None:
    eos = tiny.config.eos_token_ids[0]
    for example in read_dataset(work / "data"):
        media = open_media(tiny, example, MediaOptions())
        row = build_row(tiny.engine.prompt_builder, example, media)
        assert np.array_equal(
            build_row(
                tiny.engine.prompt_builder, example, measure_media(tiny, example, MediaOptions())
            ).ids,
            row.ids,
        )
        prompt = tiny.engine.make_prompt(example.prompt, media).input_ids
        assert np.array_equal(row.ids[: prompt.size], prompt)
        reply = tiny.ask(
            example.prompt,
            images=[str(path) for path in example.images],
            sampling=Sampling(max_tokens=1),
        )
        assert reply.prompt_tokens == prompt.size
        # The targets are the answers and their ends, of every turn, and nothing else.
        runs = np.split(row.ids, np.flatnonzero(np.diff(row.is_target.astype(int))) + 1)
        said = [runs[i] for i in range(1, len(runs), 2)]
        answers = [m["content"][0]["text"] for m in example.messages if m["role"] == "assistant"]
        assert all(run[-1] == eos for run in said)
        assert [tiny.engine.prompt_builder.tokenizer.decode(run[:-1].tolist()) for run in said] == [
            f" {answer}" for answer in answers
        ]


def test_a_template_that_begins_answers_otherwise_is_refused(tiny: SmolVLM, work: Path) -> None:
    template = (tiny.path / "chat_template.jinja").read_text().replace("'Assistant:'", "'Bot:'")
    builder = PromptBuilder(tiny.path / "tokenizer.json", template, tiny.config)
    example = read_dataset(work / "data")[0]
    with pytest.raises(DatasetError, match=r"train\.jsonl:1: .* does not write message 2 as an"):
        build_row(builder, example, measure_media(tiny, example, MediaOptions()))


def test_embeddings_are_kept_within_a_bound(
    tiny: SmolVLM, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = read_dataset(work / "data")
    whole = EmbeddingCache(tiny)
    loader = BatchLoader(tiny, lambda number: examples, 1, MediaOptions(), whole)
    expected = loader.load_batch(0)
    loader.close()
    assert expected.image_embeds is not None
    limit = expected.image_embeds.nbytes // 2
    monkeypatch.setattr("mlx_smolvlm.train.batches.CACHE_BYTES", limit)
    bounded = EmbeddingCache(tiny)
    loader = BatchLoader(tiny, lambda number: examples, 3, MediaOptions(), bounded)
    for number in range(3):  # some known, some forgotten since
        found = loader.load_batch(number)
        assert mx.array_equal(found.image_embeds, expected.image_embeds)
        assert 0 < bounded.nbytes <= limit
    loader.close()
    assert whole.nbytes == 2 * limit


def test_an_example_that_is_too_long(tiny_folder: Path, work: Path) -> None:
    message = r"train\.jsonl:\d: it takes \d+ tokens, but the limit is 60"
    with pytest.raises(DatasetError, match=message):
        tune(work, tiny_folder, max_tokens=60)
    tuning = Tuning(
        read_settings(cases.write_config(work, tiny_folder, max_tokens=60, too_long="skip")),
        work / "out",
    )
    assert 0 < tuning.skipped_count < 10
    tuning.close()
    with pytest.raises(DatasetError, match=r"no example of .* fits"):
        tune(work, tiny_folder, max_tokens=2, too_long="skip")


def test_a_picture_that_is_none(tiny_folder: Path, work: Path) -> None:
    (work / "data" / "train1-0.png").write_text("none")
    with pytest.raises(DatasetError, match=r"train\.jsonl:2: .*train1-0\.png.* is not a picture"):
        tune(work, tiny_folder)


# The loss


@pytest.mark.parametrize("loss", [answer_loss, checkpointed_loss])
def test_a_later_token_changes_nothing_before_it(tiny_folder: Path, loss: Any) -> None:
    vlm = load_in_mlx(tiny_folder)
    start_adapter(vlm.model, ("text", "vision"), LoraSettings(rank=4), "a test")
    vlm.model.train()
    batch = batch_of(vlm)
    before = np.array(compute_hidden_states(vlm.model, batch))
    for place in (25, 40, 46):
        ids = batch.input_ids.copy()
        ids[0, place] = (ids[0, place] + 17) % 600
        after = np.array(compute_hidden_states(vlm.model, replace(batch, input_ids=ids)))
        np.testing.assert_array_equal(after[0, :place], before[0, :place])
        np.testing.assert_array_equal(after[1], before[1])
        assert np.abs(after[0, place:] - before[0, place:]).max() > 1e-3
    # Nor do a label's own token or those behind it change its loss' inputs: each target alone.
    first = replace(batch, places=batch.places[:1], targets=batch.targets[:1])
    ids = batch.input_ids.copy()
    ids[0, 46:] = 7
    told, changed = (
        loss(vlm.model, one)[0].item() for one in (first, replace(first, input_ids=ids))
    )
    assert told == changed


def test_each_target_is_predicted_from_the_token_before_it(tiny: SmolVLM, work: Path) -> None:
    """The loss of a batch is that of each row alone, with the logits of every place."""
    examples = read_dataset(work / "data")[:4]
    expected, count = 0.0, 0
    for example in examples:
        media = open_media(tiny, example, MediaOptions())
        row = build_row(tiny.engine.prompt_builder, example, media)
        logits = np.array(
            tiny.model(tiny.model.embed(row.ids, tiny.engine.encode(media)))[0], np.float64
        )
        for place in np.flatnonzero(row.is_target):
            before = logits[place - 1]
            expected += np.log(np.exp(before).sum()) - before[row.ids[place]]
            count += 1
    loader = BatchLoader(tiny, lambda number: examples, 1, MediaOptions(), EmbeddingCache(tiny))
    total, targets = answer_loss(tiny.model, loader.load_batch(0))
    loader.close()
    assert targets.item() == count
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_padding_changes_nothing(tiny: SmolVLM) -> None:
    batch = batch_of(tiny)
    wide = np.zeros((2, 96), np.int32)
    wide[:, :48] = batch.input_ids
    places = batch.places + 48 * (batch.places >= 48)
    padded = replace(batch, input_ids=wide, places=places.astype(np.int32))
    own, other = (answer_loss(tiny.model, one)[0].item() for one in (batch, padded))
    assert own == pytest.approx(other, abs=1e-5)


def test_gradients_of_adapters_against_finite_differences(tiny_folder: Path) -> None:
    vlm = load_in_mlx(tiny_folder)
    config = start_adapter(
        vlm.model, ("text", "vision", "connector", "embeddings"), LoraSettings(rank=2), "a test"
    )
    rng = np.random.default_rng(0)
    modules = dict(vlm.model.named_modules())
    for path in config.modules:  # else every lora_a would have no gradient
        shape = modules[path].lora_b.shape
        modules[path].lora_b = mx.array(rng.normal(size=shape).astype(np.float32) * 0.05)
    batch = batch_of(vlm)
    found = gradients(vlm.model, answer_loss, batch)
    assert len(found) == 2 * len(config.modules)
    values = {name: np.array(a) for name, a in tree_flatten(vlm.model.trainable_parameters())}

    def loss_at(moves: dict[str, np.ndarray], h: float) -> float:
        moved = [(n, mx.array((values[n] + h * m).astype(np.float32))) for n, m in moves.items()]
        vlm.model.load_weights(moved, strict=False)
        value: float = answer_loss(vlm.model, batch)[0].item()
        vlm.model.load_weights([(n, mx.array(values[n])) for n in moves], strict=False)
        return value

    for name in found:  # along the gradient itself, where the change is largest
        norm = float(np.linalg.norm(found[name]))
        assert norm > 1e-4, name
        way, h = {name: found[name] / norm}, 2e-2 if norm < 1 else 5e-3
        slope = (
            8 * (loss_at(way, h) - loss_at(way, -h)) - loss_at(way, 2 * h) + loss_at(way, -2 * h)
        )
        assert slope / (12 * h) == pytest.approx(norm, rel=0.02, abs=2e-3), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_are_computed_twice_give_the_same_gradient(
    tiny_folder: Path, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load_in_mlx(tiny_folder)
    lora = LoraSettings(rank=4, dropout=dropout)
    config = start_adapter(vlm.model, ("text", "vision"), lora, "a test")
    modules = dict(vlm.model.named_modules())
    for path in config.modules:
        modules[path].lora_b = modules[path].lora_b + 0.05
    vlm.model.train()
    batch = batch_of(vlm)
    twice = gradients(vlm.model, checkpointed_loss, batch)
    if dropout:  # the same seeds, but nothing computed twice
        monkeypatch.setattr(nn.utils, "checkpoint", lambda module, run: run)
        once = gradients(vlm.model, checkpointed_loss, batch)
    else:
        once = gradients(vlm.model, answer_loss, batch)
    assert twice.keys() == once.keys()
    for name, own in twice.items():
        np.testing.assert_allclose(own, once[name], atol=1e-5 * max(1, np.abs(own).max()))


# Parts and precision


@pytest.mark.parametrize("part", ["text", "vision", "connector", "embeddings"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_only_what_is_asked_for_changes(
    tiny_folder: Path, work: Path, part: str, method: str
) -> None:
    prefixes = {
        "text": ("text_model.layers.", "text_model.norm."),
        "vision": ("vision_model.",),
        "connector": ("connector.",),
        "embeddings": ("text_model.embed_tokens.", "lm_head."),
    }[part]
    before = dict(tree_flatten(load_model(tiny_folder).parameters()))
    changes = {"method": method, "parts": [part], "steps": 2}
    out = tune(work, tiny_folder, **changes)
    if method == "full":
        after = dict(tree_flatten(load_model(out / "model").parameters()))
        assert after.keys() == before.keys()
        changed = {name for name in after if not mx.array_equal(after[name], before[name])}
        assert changed == {name for name in before if name.startswith(prefixes)}
    else:
        config = read_adapter_config(out / "adapter")
        matrices = {n.removesuffix(".weight") for n, a in before.items() if a.ndim == 2}
        never = {
            "vision_model.embeddings.patch_embedding",
            "vision_model.embeddings.position_embedding",
        }
        assert set(config.modules) == {n for n in matrices - never if f"{n}.".startswith(prefixes)}
        arrays: Any = mx.load(str(out / "adapter" / "adapters.safetensors"))
        moved = {n: float(mx.abs(a).max()) for n, a in arrays.items() if n.endswith("lora_b")}
        assert all(moved.values()), moved


def test_a_quantized_base_stays_as_it_is(packed_folder: Path, work: Path) -> None:
    tuning = Tuning(read_settings(cases.write_config(work, packed_folder)), work / "out")
    model = tuning.vlm.model
    is_base = {n: np.array(a) for n, a in tree_flatten(model.parameters()) if "lora_" not in n}
    for _ in tuning.run():
        pass
    tuning.close()
    after = dict(tree_flatten(model.parameters()))
    for name, array in is_base.items():
        np.testing.assert_array_equal(np.array(after[name]), array)
    kinds = {type(m.linear) for _, m in model.named_modules() if "linear" in m}
    assert kinds == {nn.QuantizedLinear}
    log = [json.loads(line) for line in (work / "out" / "log.jsonl").read_text().splitlines()]
    losses = [line["valid_loss"] for line in log if "valid_loss" in line]
    assert losses[-1] < losses[0]


def test_full_training_of_a_quantized_part_is_refused(packed_folder: Path, work: Path) -> None:
    with pytest.raises(TrainingError, match="is quantized to 4 bits, and method full"):
        tune(work, packed_folder, method="full")
    model = load_model(packed_folder)
    freeze_other_parts(model, ("vision",))
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert names
    assert all(name.startswith("vision_model.") for name in names)


# Adapters


@pytest.mark.parametrize("base", ["tiny_folder", "packed_folder"])
def test_the_fused_checkpoint_answers_as_base_and_adapter(
    base: str, work: Path, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(base)
    parts = ["text", "vision", "connector", "embeddings"]
    config = cases.write_config(work, folder, parts=parts, steps=3, optimizer__rate=0.03)
    tuning = Tuning(read_settings(config), work / "out")
    for _ in tuning.run():
        pass
    fused = load(tuning.fuse())
    tuning.close()
    adapted, plain = load(folder, adapter=work / "out" / "adapter"), load(folder)
    assert adapted.engine.checkpoint_digest != plain.engine.checkpoint_digest
    batch = batch_of(plain)
    own, other, trained, without = (
        np.array(vlm.model.head(compute_hidden_states(vlm.model, batch)))
        for vlm in (fused, adapted, tuning.vlm, plain)
    )
    np.testing.assert_allclose(own, other, atol=1e-4)
    np.testing.assert_allclose(trained, other, atol=1e-5)
    assert np.abs(own - without).max() > 0.1
    modules = [m for _, m in fused.model.named_modules()]
    assert not any(isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding) for m in modules)


def test_an_adapter_that_does_not_fit_is_refused(
    tiny_folder: Path, packed_folder: Path, work: Path
) -> None:
    adapter = tune(work, tiny_folder, steps=2) / "adapter"
    load(packed_folder, adapter=adapter)  # another precision of the same weights
    with pytest.raises(CheckpointError, match="other weights; load the checkpoint"):
        load("demo", adapter=adapter)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        load(tiny_folder, adapter=work)
    model = load_model(tiny_folder)
    with pytest.warns(SmolVLMWarning, match="was trained on tests/tiny, and the checkpoint is of"):
        load_adapter(model, adapter, "somewhere/else")
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text())
    for change, reason in (
        ({"rank": 3}, "has the shape .* wants"),
        ({"rank": "3"}, "rank must be a whole number, not '3'"),
        ({"rank": 0}, "rank is 0; it must be from 1 to 4096"),
        ({"rank": 10**400}, "rank must be a whole number, not inf"),
        ({"rank": 10**9}, "rank is 1000000000; it must be"),
        ({"scale": 10**400}, "scale is inf; it must be"),
        ({"scale": math.inf}, "scale is inf; it must be"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be"),
        ({"dropout": math.nan}, "dropout is nan; it must be"),
        ({"base": ["x"]}, "base must be a text"),
        ({"base_signature": 5}, "base_signature must be a list of numbers, not 5"),
        ({"base_signature": ["x"]}, "base_signature must be a number, not 'x'"),
        ({"base_signature": []}, "other weights; load the checkpoint"),
        ({"base_signature": [math.nan] * 64}, "other weights; load the checkpoint"),
        ({"modules": [["x"]]}, "modules must be a text"),
        ({"modules": values["modules"][:1] * 2}, "modules names one twice"),
        ({"modules": ["x" * 10**5]}, "changes 'x{,100}, which this checkpoint does not have"),
        ({"modules": ["text_model.layers.9.mlp.down_proj"]}, "changes 'text_model.layers.9"),
        ({"modules": values["modules"][1:]}, "has the shape .* wants None"),
        ({"format_version": 9}, "is not an adapter"),
        ({"alpha": 9}, "'alpha' is not known"),
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(CheckpointError, match=reason) as caught:
            load(tiny_folder, adapter=adapter)
        assert len(str(caught.value)) < 1000


# Going on


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__dropout": 0.2, "accumulate": 2, "checkpoint_gradients": True},
        {"method": "full", "parts": ["vision", "text"]},
    ],
    ids=["lora", "full"],
)
def test_a_training_that_goes_on_equals_one_that_was_not_stopped(
    tiny_folder: Path, work: Path, changes: dict[str, Any]
) -> None:
    whole = tune(work, tiny_folder, "whole", **changes)
    tune(work, tiny_folder, "parts", steps=3, **changes)  # saved after step 2
    parts = tune(work, tiny_folder, "parts", **changes)
    states: list[Any] = [mx.load(str(out / "state.safetensors")) for out in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        assert mx.array_equal(array, states[1][name]), name
    for name in ("adapter/adapters", "model/model"):
        files = [out / f"{name}.safetensors" for out in (whole, parts)]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_bytes() == files[1].read_bytes()
    logs = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text]
        for text in ((out / "log.jsonl").read_text().splitlines() for out in (whole, parts))
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == list(range(7))


def test_other_settings_data_or_weights_are_refused(tiny_folder: Path, work: Path) -> None:
    out = tune(work, tiny_folder, steps=2)
    with pytest.raises(TrainingError, match=r"whose lora was .*rank.*; choose another folder"):
        tune(work, tiny_folder, lora__rank=5)
    with pytest.raises(TrainingError, match="whose seed was 1, and now it is 2"):
        tune(work, tiny_folder, seed=2)
    (out / "mine.txt").write_text("")
    with pytest.raises(TrainingError, match=r"holds 'mine.txt'"):
        tune(work, tiny_folder)
    (out / "mine.txt").unlink()
    twin = Tuning(read_settings(cases.write_config(work, tiny_folder)), out)
    with pytest.raises(TrainingError, match="another training is writing"):
        tune(work, tiny_folder)
    twin.close()
    model = load_model(tiny_folder)
    model.text_model.norm.weight = model.text_model.norm.weight * 2
    other = work / "other"
    shutil.copytree(tiny_folder, other)
    mx.save_safetensors(str(other / "model.safetensors"), dict(tree_flatten(model.parameters())))
    state = out / "state.safetensors"
    arrays, notes = mx.load(str(state), return_metadata=True)
    settings = json.loads(notes["settings"]) | {"model": str(other)}
    mx.save_safetensors(str(state), arrays, {**notes, "settings": json.dumps(settings)})
    with pytest.raises(TrainingError, match="the checkpoint changed"):
        tune(work, other)
    mx.save_safetensors(str(state), arrays, notes)
    cases.make_dataset(work / "data", 7)
    with pytest.raises(TrainingError, match="the data changed"):
        tune(work, tiny_folder)


@pytest.mark.parametrize("limit", [0, 5_000, 60_000])
def test_a_full_disk_is_one_line_and_loses_nothing(
    tiny_folder: Path, work: Path, file_limit: Callable[[int], None], limit: int
) -> None:
    """Too little room for the log, for the adapter, and for the state."""
    out = tune(work, tiny_folder, steps=2)
    tuning = Tuning(read_settings(cases.write_config(work, tiny_folder)), out)
    kept = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    file_limit(limit)
    name = {0: "log.jsonl", 5_000: "adapters.safetensors", 60_000: "state.safetensors"}[limit]
    with pytest.raises(
        TrainingError, match=rf"{name} cannot be written: File too large; .*goes on"
    ):
        for _ in tuning.run():
            pass
    tuning.close()
    assert len(kept) == 2
    old = {path: path.read_bytes() for path in kept}
    assert [path.name for path in kept if old[path] != kept[path]] == (
        ["adapters.safetensors"] if limit == 60_000 else []
    )


def test_a_state_that_is_cut_off(tiny_folder: Path, work: Path) -> None:
    (work / "out").mkdir()
    (work / "out" / "state.safetensors").write_text("x")
    with pytest.raises(TrainingError, match=r"the state .* is cut .* 1 bytes; remove it to start"):
        tune(work, tiny_folder)


def test_a_model_whose_name_no_file_can_have(work: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model 'xxx"):
        Tuning(read_settings(cases.write_config(work, "x" * 300)), work / "out", offline=True)


def test_sizes_of_media_are_told_apart(tiny_folder: Path, work: Path) -> None:
    """Two files of 1 and 23 bytes are other media than two of 12 and 3."""
    tuning = Tuning(read_settings(cases.write_config(work, tiny_folder)), work / "run")
    paths = [work / "a", work / "b"]
    file = work / "rows.jsonl"
    file.write_text("{}")
    example = SimpleNamespace(file=file, images=paths, videos=())
    digests = []
    for sizes in ((1, 23), (12, 3)):
        for path, size in zip(paths, sizes, strict=True):
            path.write_bytes(bytes(size))
        digests.append(tuning._compute_identity([[example]])["data"])  # type: ignore[list-item]
    tuning.close()
    assert digests[0] != digests[1]
