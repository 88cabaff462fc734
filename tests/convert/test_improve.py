"""Mixed precisions, tuned scales, calibration samples, and the options for them."""

import itertools
import json
import math
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_smolvlm import Sampling, load
from mlx_smolvlm.checkpoint.load import read_config
from mlx_smolvlm.checkpoint.provenance import PartSize, measure_parts
from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert.compare.observe import compare_predictions, get_head
from mlx_smolvlm.convert.open_model import FolderReader, SourceReader
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.quant.calibration import BUNDLED, read_samples
from mlx_smolvlm.convert.quant.dwq import (
    LearnOptions,
    Tunable,
    compute_text_loss,
    hold_back,
    learn,
    make_targets,
    make_tunable,
)
from mlx_smolvlm.convert.quant.gptq import GptqOptions
from mlx_smolvlm.convert.quant.improve import (
    BetterOptions,
    PrecisionChoice,
    choose_precisions,
    convert_better,
    find_budget,
    measure_choices,
)
from mlx_smolvlm.convert.quant.sensitivity import estimate_importance
from mlx_smolvlm.convert.run import convert_checkpoint, plan_checkpoint
from mlx_smolvlm.convert.source import open_source
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import better_cases as cases
from tests.helpers import command

kl_of = cases.kl_of

SHORT = Sampling(max_tokens=3)


def quiet(*_):
    """Progress that says nothing."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return cases.make_source(tmp_path_factory.mktemp("better") / "Some-VLM")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "read.txt"
    path.write_text(BUNDLED.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def plain(source):
    return SourceReader(open_source(source, True)).load()


def size_of(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


# The knapsack


def make_choices(seed, count=5):
    random = np.random.default_rng(seed)
    return {
        f"m{number}": [
            PrecisionChoice(Quantization(bits, 64, "affine"), int(b), float(d))
            for bits, b, d in zip(
                (2, 4, 8),
                np.cumsum(random.integers(50, 300, 3)),
                np.sort(random.random(3))[::-1],
                strict=True,
            )
        ]
        for number in range(count)
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all_that_fit_and_more_room_is_never_worse(seed):
    choices = make_choices(seed)
    last = np.inf
    for budget in range(500, 4500, 97):
        fitting = [
            sum(one.damage for one in combination)
            for combination in itertools.product(*choices.values())
            if sum(one.nbytes for one in combination) <= budget
        ]
        if not fitting:
            continue
        found = choose_precisions(choices, budget)
        total = sum(one.damage for one in found.values())
        assert sum(one.nbytes for one in found.values()) <= budget
        assert total == pytest.approx(min(fitting), abs=1e-12)
        assert total <= last
        last = total


# Sensitivity


def test_importance_is_the_mean_square_of_gradients_of_drawn_tokens(plain, texts):
    path, sample = "text_model.layers.1.mlp.down_proj", read_samples(plain, [texts])[0]
    found = estimate_importance(plain.model, [sample], [path], quiet)[path]
    module = plain.model.text_model.layers[1].mlp.down_proj
    weight, step, draws = module.weight, 1e-2, np.random.default_rng(0)
    logits = plain.model(plain.model.embed(sample.input_ids))[0, :-1]
    drawn = mx.random.categorical(logits, key=mx.random.key(0))

    def surprise(changed):
        module.weight = changed
        scores = plain.model(plain.model.embed(sample.input_ids))[0, :-1]
        logs = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
        module.weight = weight
        return -float(mx.take_along_axis(logs, drawn[:, None], -1).sum())

    row, block = (int(n) for n in draws.integers(0, found.shape))
    squares = []
    for column in range(32 * block, 32 * block + 32):
        bump = mx.zeros(weight.shape)
        bump[row, column] = step
        squares.append(((surprise(weight + bump) - surprise(weight - bump)) / (2 * step)) ** 2)
    expected = np.mean(squares) / (sample.input_ids.size - 1)
    assert float(found[row, block]) == pytest.approx(expected, rel=0.05)


def test_the_estimate_is_near_the_divergence_that_is_seen(source, plain, texts):
    plan = plan_checkpoint(open_source(source, True), ConvertOptions())
    choices = measure_choices(plan, plain.model, read_samples(plain, [texts]), quiet)
    for bits in (3, 4):
        q = Quantization(bits, 64, "affine")
        kinds = [("text_model.layers.*", q), ("lm_head", q), ("text_model.embed_tokens", q)]
        options = ConvertOptions(overrides=tuple(kinds))
        opened = open_source(source, True)
        rounded = SourceReader(opened, plan_checkpoint(opened, options)).load()
        estimate = sum(
            one.damage
            for path, many in choices.items()
            for one in many
            if one.quantization == q and path.startswith(("text_model", "lm_head"))
        )
        assert 0.5 < kl_of(plain, rounded) / estimate < 2


# Mixtures


def test_a_mixture_fits_loads_answers_and_beats_equal_bits(source, plain, texts, tmp_path):
    options = ConvertOptions(bits=4, embeddings_bits=4)
    uniform = convert_checkpoint(source, tmp_path / "uniform", options)
    steps = [s for s in plan_checkpoint(open_source(source, True), options).steps if s.target]
    weights = sum(sum(r for r, _ in s.entry.shapes) * s.entry.width for s in steps)
    bits = sum(s.nbytes(4) for s in steps) * 8 / weights
    target = BetterOptions(target_bits=bits, calibration=(texts,))
    found = convert_better(source, tmp_path / "mixed", ConvertOptions(), target, quiet)
    weights = [(f / "model.safetensors").stat().st_size for f in (uniform, found.folder)]
    assert weights[1] <= 1.03 * weights[0]  # float32 scales here, and a longer header
    assert found.mixture.bits_per_weight <= bits
    losses = [kl_of(plain, FolderReader(folder).load()) for folder in (uniform, found.folder)]
    assert losses[1] < 0.95 * losses[0]
    quantization = read_config(found.folder).quantization
    assert len({q for _, q in quantization.overrides}) > 1
    chosen = found.mixture.choices.items()
    assert all(quantization.find(path) == one.quantization for path, one in chosen)
    seen = [one.quantization.bits for path, one in chosen if path.startswith("vision_model")]
    assert set(seen) == {8}  # no pictures were there to tell what it needs
    assert (
        load(found.folder)
        .ask("Where is the star?", sampling=Sampling(max_tokens=3))
        .generation_tokens
        == 3
    )


def test_every_file_is_within_the_size_and_more_room_means_less_damage(source, texts, tmp_path):
    last = np.inf
    for kilobytes in (240, 280, 340):
        options = BetterOptions(target_bytes=kilobytes * 1000, calibration=(texts,))
        dest = tmp_path / str(kilobytes)
        found = convert_better(source, dest, ConvertOptions(dtype="bfloat16"), options, quiet)
        assert 0.7 * kilobytes < size_of(dest) / 1000 <= kilobytes
        assert found.mixture.damage <= last
        last = found.mixture.damage


@pytest.mark.parametrize("target", [{"target_bytes": 20_000}, {"target_bits": 2.1}])
def test_what_cannot_fit_is_refused_before_anything_is_measured(
    source, texts, tmp_path, monkeypatch, target
):
    def fail(*arguments):
        raise AssertionError("the source was loaded")

    monkeypatch.setattr(SourceReader, "load", fail)
    for calibration in ((texts,), ()):
        options = BetterOptions(**target, calibration=calibration)
        with pytest.raises(CheckpointError, match=r"does not fit .*; the smallest is "):
            convert_better(source, tmp_path / "out", ConvertOptions(), options, quiet)


def test_what_fits_only_with_pictures_to_measure_the_encoder_on_is_refused_too(
    source, plain, texts, tmp_path
):
    plan = plan_checkpoint(open_source(source, True), ConvertOptions())
    lines = tmp_path / "texts.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    lines.write_text(json.dumps(row) + "\n")
    least = min_bits(plan, has_pictures=True)
    target = BetterOptions(target_bits=least, calibration=(lines,))
    assert find_budget(plan, target, has_pictures=True) > 0
    with pytest.raises(CheckpointError, match="the smallest is "):
        convert_better(source, tmp_path / "out", ConvertOptions(), target, quiet)


def min_bits(plan, has_pictures):
    """The least target in bits a weight, as the refusal states it."""
    with pytest.raises(CheckpointError) as error:
        find_budget(plan, BetterOptions(target_bits=0.1), has_pictures)
    return float(str(error.value).split()[-4])


def test_what_cannot_fit_is_refused_with_the_smallest_size_that_then_fits(source, texts, tmp_path):
    options = BetterOptions(target_bytes=20_000, calibration=(texts,))
    with pytest.raises(CheckpointError, match=r"does not fit 0.02 MB; the smallest is 0.*MB") as e:
        convert_better(source, tmp_path / "out", ConvertOptions(), options, quiet)
    assert not (tmp_path / "out").exists()
    smallest = float(str(e.value).split()[-2])
    fits = BetterOptions(target_bytes=round(smallest * 1e6), calibration=(texts,))
    convert_better(source, tmp_path / "out", ConvertOptions(), fits, quiet)
    assert size_of(tmp_path / "out") <= smallest * 1e6


# Tuning


def test_tuning_lowers_the_loss_on_held_out_text_and_leaves_the_integers(
    source, plain, texts, tmp_path
):
    options = ConvertOptions(bits=3, embeddings_bits=3, vision_bits=3, connector_bits=3)
    rounded = convert_checkpoint(source, tmp_path / "rounded", options)
    how = LearnOptions(steps=40, picture_steps=2, rate=1e-2)
    better = BetterOptions(learn=how, calibration=(texts,))
    tuned = convert_better(source, tmp_path / "tuned", options, better, quiet).folder
    again = convert_better(source, tmp_path / "again", options, better, quiet).folder
    losses = [kl_of(plain, FolderReader(folder).load()) for folder in (rounded, tuned)]
    assert losses[1] < 0.9 * losses[0]
    arrays = [mx.load(str(f / "model.safetensors")) for f in (rounded, tuned, again)]
    assert arrays[0].keys() == arrays[1].keys()
    changed = set()
    for name, array in arrays[0].items():
        assert arrays[1][name].dtype == array.dtype
        assert mx.array_equal(arrays[1][name], arrays[2][name])  # the same seed, the same result
        if not mx.array_equal(array, arrays[1][name]):
            changed.add(name.rpartition(".")[2])
    assert changed == {"scales", "biases"}
    assert (
        load(tuned).ask("Where is the star?", sampling=Sampling(max_tokens=3)).generation_tokens
        == 3
    )


def test_pictures_tune_the_encoder_too(source, plain):
    opened = open_source(source, True)
    plan = plan_checkpoint(opened, ConvertOptions(bits=8, vision_bits=3, connector_bits=3))
    samples = [one for one in read_samples(plain) if one.pixel_values is not None]
    targets = make_targets(plain.model, samples, quiet)
    packed = SourceReader(opened, plan).load().model
    before = [
        mx.abs(packed.encode(s.pixel_values) - t).mean().item()
        for s, t in zip(samples, targets.image_embeds, strict=True)
    ]
    learned = learn(packed, targets, samples, LearnOptions(steps=1, picture_steps=30), quiet)
    assert {path.split(".")[0] for path in learned} == {"vision_model", "connector"}
    after = [
        mx.abs(packed.encode(s.pixel_values) - t).mean().item()
        for s, t in zip(samples, targets.image_embeds, strict=True)
    ]
    assert sum(after) < 0.9 * sum(before)


def test_steps_that_serve_no_sample_held_back_are_not_kept(source, plain, texts):
    opened = open_source(source, True)
    plan = plan_checkpoint(opened, ConvertOptions(bits=4))
    packed = SourceReader(opened, plan).load().model
    samples = read_samples(plain, [texts])[:5]
    targets = make_targets(plain.model, samples, quiet)
    twin = SourceReader(opened, plan).load().model
    before = {path: tunable.arrays for path, tunable in make_tunable(twin).items()}
    learned = learn(packed, targets, samples, LearnOptions(steps=3, rate=0.9), quiet)
    assert learned.keys() == before.keys()
    for path, arrays in learned.items():
        assert all(mx.array_equal(arrays[suffix], before[path][suffix]) for suffix in arrays)


@pytest.mark.parametrize("count", [2, 3, 8, 32, 400])
def test_few_samples_are_held_back_and_none_is_in_both(count):
    numbers = [3 * n for n in range(count)]
    held, rest = hold_back(numbers)
    assert sorted(held + rest) == numbers
    assert len(held) == max(1, min(16, count // 8))
    assert hold_back([5]) == ([5], [5])


def test_a_rate_moves_finer_matrices_by_no_more_steps():
    weight = mx.random.normal((4, 64), key=mx.random.key(0))
    moved = {}
    for bits in (2, 4, 6):
        linear = nn.Linear(64, 4, bias=False)
        linear.weight = weight
        tunable = Tunable(linear.to_quantized(64, bits))
        before = tunable.weight
        tunable.scale_change = mx.full((4, 1), 0.1)
        step = mx.abs(linear.to_quantized(64, bits).scales)
        moved[bits] = (mx.abs(tunable.weight - before).max(-1, keepdims=True) / step).max().item()
    assert moved[2] == pytest.approx(0.1 * 3, rel=1e-3)
    assert moved[4] == pytest.approx(0.1 * 15, rel=1e-3)
    assert moved[6] == pytest.approx(moved[4], rel=1e-3)


def test_the_loss_is_that_of_compare(source, plain, texts):
    opened = open_source(source, True)
    packed = SourceReader(opened, plan_checkpoint(opened, ConvertOptions(bits=3))).load().model
    samples = read_samples(plain, [texts])
    targets = make_targets(plain.model, samples, quiet)
    found = float(compute_text_loss(packed, samples, [None] * len(samples), targets, 0))
    hidden = packed.text_model(packed.embed(samples[0].input_ids))[0, :-1]
    heads = (targets.head, get_head(packed))
    expected = compare_predictions((targets.hidden[0], hidden), heads, samples[0].input_ids[1:])
    assert found == pytest.approx(float(expected.kl_nats.mean()), rel=1e-3)


# Calibration


def test_folders_and_datasets_are_read(plain, tmp_path):
    (tmp_path / "a.md").write_text("The star is red. The circle is blue.", encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    line = {"question": "What color is the star?", "answer": "red"}
    (tmp_path / "b.jsonl").write_text(json.dumps(line), encoding="utf-8")
    text, asked = read_samples(plain, [tmp_path])
    decode = plain.engine.prompt_builder.tokenizer.decode
    assert (text.start, decode(text.input_ids.tolist())) == (1, (tmp_path / "a.md").read_text())
    told = asked.input_ids[asked.start :].tolist()
    assert decode(told[:-1]) == "red"
    assert told[-1] == plain.config.eos_token_ids[0]
    with pytest.raises(
        CheckpointError, match=r"is not a calibration file or a folder of them; use \.txt"
    ):
        read_samples(plain, [tmp_path / "ignored.bin"])


# Options


@pytest.mark.parametrize(
    ("make", "values", "words"),
    [
        (BetterOptions, {"target_bits": 0.0}, "target_bits is 0.0; it must be a number above 0"),
        (BetterOptions, {"target_bits": math.inf}, "target_bits is inf"),
        (BetterOptions, {"target_bits": math.nan}, "target_bits is nan"),
        (BetterOptions, {"target_bytes": -5}, "target_bytes is -5"),
        (BetterOptions, {"target_bytes": 9, "target_bits": 4}, "exclude each other"),
        (LearnOptions, {"steps": 0}, "steps is 0; it must be a whole number of 1 or above"),
        (LearnOptions, {"steps": 2.5}, "steps is 2.5"),
        (LearnOptions, {"picture_steps": 0}, "picture_steps is 0"),
        (LearnOptions, {"rate": 0.0}, "rate is 0.0; it must be between 0 and 1"),
        (LearnOptions, {"rate": math.nan}, "rate is nan"),
        (LearnOptions, {"seed": -1}, "seed is -1; it must be a whole number of 0 or above"),
        (GptqOptions, {"damping": 0.0}, "damping is 0.0; it must be a number above 0"),
        (GptqOptions, {"damping": math.nan}, "damping is nan"),
        (GptqOptions, {"shrinks": ()}, "shrinks is (); it must hold numbers"),
        (GptqOptions, {"shrinks": (1.0, 1.5)}, "shrinks is (1.0, 1.5)"),
    ],
)
def test_options_out_of_range_are_refused(make, values, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make(**values)


# The command


def run(*arguments, cwd):
    cache = {"MLX_SMOLVLM_CACHE": str(cwd / "cache")}
    return command.run_text("convert", *map(str, arguments), cwd=cwd, env=cache)


def test_the_command_mixes_and_tunes_within_a_size(source, texts, tmp_path):
    arguments = ("--target-size", "0.3MB", "--dwq", "--dwq-steps", "2", "--calibration", texts)
    result = run(source, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    mixed, _, wrote = result.stderr.splitlines()
    assert "bits a weight in matrices, estimated KL" in mixed
    stored = sum(measure_parts(tmp_path / "Some-VLM-mlx-0.3mb-dwq").values(), PartSize(0, 0))
    assert f": {stored.bits_per_weight:.2f} bits a weight in all, 0.3 MB" in wrote
    folder = tmp_path / "Some-VLM-mlx-0.3mb-dwq"
    assert size_of(folder) <= 300_000
    load(folder)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--recipe", "tiny", "--target-bits", "4"), 2, "give one of --recipe"),
        (("--recipe", "tiny", "--bits", "4"), 2, "--recipe decides on precision"),
        (("--target-size", "0.2MB", "--mode", "mxfp4"), 2, "a target decides on precision"),
        (("--target-size", "0MB"), 2, "target_bytes is 0; it must be"),
        (("--target-bits", "inf"), 2, "target_bits is inf; it must be"),
        (("--target-size", "lots"), 2, "'lots' is not a size"),
        (("--calibration", "x.txt"), 2, "--calibration is for"),
        (("--recipe", "absent.toml"), 1, "none of tiny, balanced, quality"),
    ],
)
def test_options_that_make_no_sense(source, tmp_path, arguments, code, words):
    result = run(source, *arguments, cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert words in " ".join(result.stderr.replace("\u2502", " ").split())


@pytest.mark.parametrize("target", [("--target-size", "0MB"), ("--target-bits", "nan")])
def test_a_target_out_of_range_is_refused_before_the_source_is_fetched(tmp_path, target):
    result = run("nobody/no-model", *target, "--offline", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert target[0] in result.stderr
