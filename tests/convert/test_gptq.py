"""GPTQ of a whole model, and the command for it."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm import Sampling, load
from mlx_smolvlm.convert.open_model import FolderReader, SourceReader
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.quant.calibration import BUNDLED, read_samples
from mlx_smolvlm.convert.quant.gptq import EMBEDDINGS, GptqOptions, compensate, compensate_model
from mlx_smolvlm.convert.quant.improve import BetterOptions, convert_better
from mlx_smolvlm.convert.run import convert_checkpoint, plan_checkpoint
from mlx_smolvlm.convert.source import open_source
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import better_cases as cases
from tests.helpers import command

LOW = ConvertOptions(bits=3, embeddings_bits=3, vision_bits=3, connector_bits=3)
SHORT = Sampling(max_tokens=3)
BETTER = BetterOptions(gptq=GptqOptions())


def quiet(*_):
    """Progress that says nothing."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return cases.make_source(tmp_path_factory.mktemp("gptq") / "Some-VLM")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied") / "Tied-VLM"
    return cases.make_source(folder, tie_word_embeddings=True, text__tie_word_embeddings=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "read.txt"
    path.write_text(BUNDLED.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def load_plain(source):
    return SourceReader(open_source(source, True)).load()


@pytest.mark.parametrize("name", ["source", "tied"])
def test_predictions_lie_nearer_than_rounded_ones_at_the_same_size(name, request, texts, tmp_path):
    source = request.getfixturevalue(name)
    rounded = convert_checkpoint(source, tmp_path / "rounded", LOW)
    better = BetterOptions(gptq=GptqOptions(), calibration=(texts,))
    found = convert_better(source, tmp_path / "gptq", LOW, better, quiet).folder
    plain = load_plain(source)
    assert ("lm_head" in plain.model) == (name == "source")
    losses = [cases.kl_of(plain, FolderReader(folder).load()) for folder in (rounded, found)]
    assert losses[1] < 0.7 * losses[0]
    arrays = [mx.load(str(folder / "model.safetensors")) for folder in (rounded, found)]
    kinds = [{k: (a.shape, a.dtype) for k, a in one.items()} for one in arrays]
    assert kinds[0] == kinds[1]
    fitted = "text_model.embed_tokens.weight"  # only where it is the head too
    assert mx.array_equal(arrays[0][fitted], arrays[1][fitted]) == (name == "source")
    reply = load(found).ask("Where is the star?", sampling=SHORT)
    assert reply.generation_tokens == 3


def test_pictures_make_the_encoder_better_and_the_result_is_the_same_again(source, tmp_path):
    folders = [convert_better(source, tmp_path / name, LOW, BETTER, quiet).folder for name in "ab"]
    arrays = [mx.load(str(folder / "model.safetensors")) for folder in folders]
    assert all(mx.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    plain, found = load_plain(source), FolderReader(folders[0]).load()
    opened = open_source(source, True)
    rounded = SourceReader(opened, plan_checkpoint(opened, LOW)).load()
    errors = np.zeros(2)
    for sample in read_samples(plain):
        if sample.pixel_values is not None:
            true = plain.model.encode(sample.pixel_values)
            for number, other in enumerate((rounded, found)):
                errors[number] += float(
                    ((other.model.encode(sample.pixel_values) - true) ** 2).sum()
                )
    assert errors[1] < 0.7 * errors[0]


def test_what_is_compensated_is_what_is_written_and_unpacks_to_what_came_before(source, texts):
    opened = open_source(source, True)
    plan, plain = plan_checkpoint(opened, LOW), load_plain(source)
    samples = read_samples(plain, [texts])[:4]
    head = plain.model.lm_head.weight
    done = compensate_model(plan, plain.model, samples, GptqOptions(), quiet)
    assert mx.array_equal(plain.model.lm_head.weight, head)  # others still hold on to it
    texts_only = {s.entry.path for s in plan.steps if s.target and "vision" not in s.entry.path}
    assert done.keys() == texts_only - {EMBEDDINGS, "connector.modality_projection.proj"}
    better = SourceReader(opened, plan.replace_arrays(done))
    for path, arrays in done.items():
        stored = better.read_matrix(path).arrays
        assert all(mx.array_equal(stored[suffix], arrays[suffix]) for suffix in arrays)


def test_a_later_layer_is_fitted_to_inputs_from_the_rounded_ones(source, texts):
    opened, path = open_source(source, True), "text_model.layers.1.mlp.down_proj"
    plan, plain = plan_checkpoint(opened, LOW), load_plain(source)
    samples = read_samples(plain, [texts])[:4]
    weight = plain.model.text_model.layers[1].mlp.down_proj.weight
    done = compensate_model(plan, plain.model, samples, GptqOptions(), quiet)
    earlier = {p: a for p, a in done.items() if p not in (path, "lm_head")}
    model = SourceReader(opened, plan.replace_arrays(earlier)).load().model
    layer, seen = model.text_model.layers[1].mlp, []
    gate_up = layer.gate_up_proj

    def note(x):
        gate, up = mx.split(gate_up(x), 2, axis=-1)
        seen.append((gate * mx.sigmoid(gate) * up)[0])
        return mx.concatenate([gate, up], axis=-1)

    layer.gate_up_proj = note
    for sample in samples:
        model.text_model(model.embed(sample.input_ids))
    inputs = mx.concatenate(seen)
    q = plan.config.quantization.find(path)
    expected = compensate(weight, inputs.T @ inputs, q, mx.float32)
    same = mx.array_equal(expected["scales"], done[path]["scales"])
    close = mx.abs(expected["scales"] - done[path]["scales"]).max() / expected["scales"].max()
    assert same or close < 1e-3
    assert (expected["weight"] == done[path]["weight"]).astype(mx.float32).mean() > 0.9


def test_eight_bits_and_what_is_packed_already_stay_as_they_are(source, texts, tmp_path):
    better = BetterOptions(gptq=GptqOptions(), calibration=(texts,))
    options = ConvertOptions(bits=4)  # 8 for embeddings, head and encoder
    found = convert_better(source, tmp_path / "gptq", options, better, quiet).folder
    rounded = convert_checkpoint(source, tmp_path / "rounded", options)
    a, b = (mx.load(str(folder / "model.safetensors")) for folder in (found, rounded))
    changed = {name.rpartition(".")[0] for name in a if not mx.array_equal(a[name], b[name])}
    assert changed
    assert all(name.startswith("text_model.layers.") for name in changed)


def test_nothing_to_do_is_said_before_any_work(source, tmp_path):
    with pytest.raises(CheckpointError, match="fewer than 8 bits; ask for fewer, such as 4"):
        convert_better(source, tmp_path / "out", ConvertOptions(bits=8), BETTER, quiet)
    assert not (tmp_path / "out").exists()


def test_the_command_mixes_compensates_and_tunes(source, texts, tmp_path):
    arguments = ["--target-bits", "6", "--gptq", "--dwq", "--dwq-steps", "2"]
    arguments += ["--calibration", str(texts)]
    cache = {"MLX_SMOLVLM_CACHE": str(tmp_path / "cache")}
    result = command.run_text("convert", str(source), *arguments, cwd=tmp_path, env=cache)
    assert result.returncode == 0, result.stderr
    assert load(tmp_path / "Some-VLM-mlx-6bits-gptq-dwq").ask("Hello?", sampling=SHORT).text
