"""`convert --verify` and `compare`: a conversion is compared, and the result is written."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from PIL import Image
from tokenizers import Tokenizer

from mlx_smolvlm.checkpoint.load import load_model
from mlx_smolvlm.cli import app
from mlx_smolvlm.cli.compare import ComparisonInputs
from mlx_smolvlm.convert.compare import CompareOptions, Comparison
from mlx_smolvlm.convert.compare.measure import (
    VERIFY_FILE,
    VERIFY_PLOT,
    format_verification,
    read_verification,
    verify_conversion,
)
from mlx_smolvlm.convert.open_model import FolderReader, SourceReader
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.convert.source import open_source
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import command
from tests.helpers import hf_folder as hf

TEXT = "The ferry leaves the island at seven, long before the shops open."
FEW = CompareOptions(texts=(TEXT,), max_tokens=2)


def make_source(folder: Path, dtype: mx.Dtype = mx.bfloat16, **changes: int) -> Path:
    """A small Hugging Face folder that can be asked questions."""
    values = hf.askable_settings(**changes)
    return hf.make_askable(folder, values, hf.weights(values, dtype))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("verify") / "Some-VLM")


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    return convert_checkpoint(source, source.parent / "packed", ConvertOptions(bits=4))


@pytest.fixture(scope="module")
def found(source: Path, packed: Path) -> Comparison:
    assert read_verification(packed) is None
    assert format_verification(packed) is None
    return verify_conversion(source, packed, FEW)


def test_what_is_kept_is_what_was_found(packed: Path, found: Comparison) -> None:
    assert read_verification(packed) == found
    assert (found.reference.name, found.other.name) == ("Some-VLM", "packed")
    assert {m.path for m in found.matrices if m.bits == 4} == {
        m.path for m in found.matrices if m.path.startswith("text_model.layers")
    }
    assert all(0 < m.relative_error < 0.2 for m in found.matrices)
    text = (packed / VERIFY_FILE).read_text(encoding="utf-8")
    assert str(packed.parent) not in text  # no word of where it was made
    section = format_verification(packed)
    assert section is not None
    assert f"]({VERIFY_PLOT})" in section
    with Image.open(packed / VERIFY_PLOT) as picture:
        assert picture.format == "PNG"
    load_model(packed)  # more files do no harm
    assert not list(packed.glob(".*"))


@pytest.mark.parametrize(
    "text", ['{"peak_memory_gb": 1}', '{"peak_memory_gb": []}', "[]", "{", '{"reference": 1}']
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / VERIFY_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=VERIFY_FILE):
        read_verification(tmp_path)


@pytest.mark.parametrize(
    "part",
    [None, [], [1], {"tokens": 1}, {"name": "a", "nbytes": 1, "bits_per_weight": 1, "more": 0}],
)
def test_a_part_of_other_fields_is_refused(found: Comparison, tmp_path: Path, part: object) -> None:
    (tmp_path / VERIFY_FILE).write_text(json.dumps(found.to_dict()))
    assert read_verification(tmp_path) == found
    (tmp_path / VERIFY_FILE).write_text(json.dumps(found.to_dict() | {"other": part}))
    with pytest.raises(CheckpointError, match="verify the checkpoint again"):
        read_verification(tmp_path)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_the_source_in_memory_is_the_converted_one(tmp_path: Path, dtype: mx.Dtype) -> None:
    folder = make_source(tmp_path / "s", dtype)
    opened = SourceReader(open_source(folder))
    written = FolderReader(convert_checkpoint(folder, tmp_path / "out"))
    assert opened.config == written.config
    assert opened.nbytes == written.nbytes
    ids = Tokenizer.from_file(hf.TOKENIZER).encode(TEXT).ids
    models = [one.load().model for one in (opened, written)]
    logits = [model(model.embed(mx.array(ids))) for model in models]  # type: ignore[arg-type]
    assert logits[0].dtype == mx.float32  # whatever the weights are
    assert mx.array_equal(*logits).item()
    assert models[0].encode(mx.zeros((1, 24, 24, 3))).dtype == mx.float32
    weight = models[0].text_model.layers[0].mlp.down_proj.weight
    assert weight.dtype == dtype
    path = "text_model.layers.1.self_attn.qkv_proj"
    one, other = (x.read_matrix(path) for x in (opened, written))
    assert mx.array_equal(one.get_rows(3, 9), other.get_rows(3, 9)).item()


def test_a_packed_source_is_unpacked(source: Path, tmp_path: Path) -> None:
    values = json.loads((source / "config.json").read_text())
    tensors = hf.mlx_vlm_weights(hf.weights(values, mx.bfloat16))
    name = "language_model.layers.0.mlp.down_proj"
    weight = tensors.pop(f"{name}.weight")
    arrays = mx.quantize(weight, 64, 4)
    tensors |= {
        f"{name}.{s}": a for s, a in zip(("weight", "scales", "biases"), arrays, strict=True)
    }
    folder = make_source(tmp_path / "s")
    hf.write_json(folder / "config.json", values | {"quantization": {"bits": 4, "group_size": 64}})
    hf.write_weights(folder, tensors)
    matrix = SourceReader(open_source(folder)).read_matrix("text_model.layers.0.mlp.down_proj")
    assert matrix.quantization is None
    assert mx.array_equal(matrix.arrays["weight"], mx.dequantize(*arrays, 64, 4)).item()


def test_the_source_is_never_doubled(tmp_path: Path) -> None:
    # Weights in bfloat16 stay so; float32 has only what is a vector, and the embeddings.
    sizes = {"text__hidden_size": 256, "text__intermediate_size": 2048, "text__head_dim": 64}
    folder = make_source(tmp_path / "s", text__num_hidden_layers=8, **sizes)
    opened = SourceReader(open_source(folder))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    vlm = opened.load()
    vlm.model(vlm.model.embed(mx.array([1, 2, 3])))  # type: ignore[arg-type]
    grown = mx.get_peak_memory() - before
    assert opened.nbytes > 20e6
    assert grown < 1.25 * opened.nbytes
    del vlm
    packed = convert_checkpoint(folder, tmp_path / "packed", ConvertOptions(bits=4))
    held = mx.get_active_memory()  # by other tests
    peak = verify_conversion(folder, packed, FEW).peak_memory_gb * 1e9 - held
    # Each answer starts MLX's own count anew; the last ones are of the packed weights. Beside the
    # weights there are activations, which compiled functions hold until they are evaluated.
    assert opened.nbytes < peak < 1.6 * opened.nbytes


# The command line


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return command.run_text(*arguments, cwd=cwd, timeout_s=120)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").write_text(" \n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "pictures").mkdir()
    Image.new("RGB", (30, 20), "red").save(folder / "pictures" / "red.png")
    Image.new("RGB", (30, 20), "blue").save(folder / "pictures" / "blue.JPG", "JPEG")
    (folder / "pictures" / "notes.txt").write_text("none")
    (folder / "broken").mkdir()
    (folder / "broken" / "a.png").write_text("no picture")
    (folder / "none").mkdir()
    return folder


def test_convert_and_verify(source: Path, samples: Path, tmp_path: Path) -> None:
    given = ("--verify-texts", samples / "text.txt", "--verify-pictures", samples / "pictures")
    result = run("convert", source, "out", "--bits", "8", *given, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("reference ")
    assert "weights, vision" in result.stdout
    wrote, kept = result.stderr.splitlines()
    assert wrote.startswith("wrote out: 8 bits in the decoder, ")
    assert kept == f"wrote out/{VERIFY_FILE} and {VERIFY_PLOT}"
    found = read_verification(tmp_path / "out")
    assert found is not None
    assert [one.picture for one in found.answers] == ["blue.JPG", "red.png", None]
    assert found.texts is not None
    assert found.texts.tokens == len(Tokenizer.from_file(hf.TOKENIZER).encode(TEXT).ids) - 1

    again = run("convert", source, "out", "--bits", "8", "--force", cwd=tmp_path)
    assert again.returncode == 0
    assert again.stdout == ""
    assert read_verification(tmp_path / "out") is None  # it was of the replaced one


def test_convert_verifies_on_its_own_samples(source: Path, tmp_path: Path) -> None:
    result = run("convert", source, "out", "--verify", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "texts, KL                             0 nats" in result.stdout
    found = read_verification(tmp_path / "out")
    assert found is not None
    assert [one.picture for one in found.answers][:2] == ["page", "chart"]


def test_compare(packed: Path, samples: Path, source: Path, tmp_path: Path) -> None:
    given = ("--texts", samples / "text.txt", "--pictures", samples / "pictures")
    more = ("--question", "What?", "--max-tokens", "2", "--detail", "high")
    files = ("--json", "found.json", "--plot", "found.png")
    result = run("compare", packed, packed, *given, *more, *files, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0].startswith(
        f"reference                             {packed}"
    )
    values = json.loads((tmp_path / "found.json").read_text())
    assert values["texts"]["top_1_agreement"] == 1
    assert [one["question"] for one in values["answers"]][:2] == ["What?", "What?"]
    assert values["features"][0]["vectors"] > 2 * 16  # several tiles a picture
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--texts", "absent.txt"), 2, ("absent.txt", "No such file")),
        (("--texts", "empty.txt"), 2, ("empty.txt is empty",)),
        (("--texts", "bytes.txt"), 2, ("bytes.txt is not UTF-8",)),
        (("--pictures", "absent"), 2, ("absent is not a folder",)),
        (("--pictures", "none"), 2, ("none has no pictures", ".jpeg")),
        (("--max-tokens", "0"), 2, ("--max-tokens", "is 0")),
        (("--limit", "0"), 2, ("--limit", "is 0")),
        (("--detail", "fine"), 2, ("--detail", "'fine'")),
        (("--json", "absent/a.json"), 2, ("--json", "no folder absent")),
        (("--plot", "absent/a.png"), 2, ("--plot", "no folder absent")),
        ((), 1, ("there is no model '/none'",)),
    ],
)
def test_compare_refuses(
    arguments: tuple[str, ...], status: int, words: tuple[str, ...], samples: Path
) -> None:
    # The checkpoints do not exist: options are looked at first.
    result = run("compare", "/none", "/none", *arguments, cwd=samples)
    assert (result.returncode, result.stdout) == (status, ""), result.stderr
    for word in words:
        assert word in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_broken_picture_is_named(packed: Path, samples: Path) -> None:
    result = run("compare", packed, packed, "--pictures", "broken", cwd=samples)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "a.png" in result.stderr
    assert result.stderr.count("\n") == 1


def test_wrong_samples_are_refused_before_converting(
    source: Path, samples: Path, tmp_path: Path
) -> None:
    result = run("convert", source, "out", "--verify-texts", "absent.txt", cwd=tmp_path)
    assert result.returncode == 2
    assert not (tmp_path / "out").exists()


# What is read of the source


OPENED: list[str] = []  # paths in the order in which they were opened; see `opened`
noting = False


def note(event: str, args: tuple) -> None:
    if noting and event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        OPENED.append(os.fsdecode(args[0]))


sys.addaudithook(note)  # hooks cannot be removed


@pytest.fixture
def opened(monkeypatch):
    """Paths of the files that Python opens, or that MLX is told to load."""
    global noting
    load = mx.load
    monkeypatch.setattr(
        mx, "load", lambda path, **kw: (OPENED.append(str(path)), load(path, **kw))[1]
    )
    OPENED.clear()
    noting = True
    yield OPENED
    noting = False


@pytest.mark.parametrize(
    ("kind", "options"),
    [("one file", []), ("one file", ["--bits", "4"]), ("own", ["--recipe", "tiny"]),
     ("shards", ["--verify"]), ("own", ["--bits", "8", "--verify"]),
     ("one file", ["--bits", "3", "--gptq", "--dwq", "--dwq-steps", "2",
                   "--calibration", "text.txt"])],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:3]),
)  # fmt: skip
def test_a_conversion_opens_each_file_of_its_source_once(
    tmp_path, monkeypatch, opened, kind, options
):
    folder = make_source(tmp_path / "s")
    if kind == "shards":
        (folder / "model.safetensors").unlink()
        values = json.loads((folder / "config.json").read_text())
        hf.write_weights(folder, hf.weights(values), shards=3)
    elif kind == "own":
        folder = convert_checkpoint(folder, tmp_path / "floats")
    hf.write_json(folder / "tokenizer_config.json", {})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "text.txt").write_text(TEXT)
    few = replace(FEW, pictures=(("grey", Image.new("RGB", (9, 9), "grey")),))
    monkeypatch.setattr(ComparisonInputs, "make_options", lambda _samples: few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mlx-smolvlm", "convert", str(folder), "out", *options])
    opened.clear()
    with pytest.raises(SystemExit) as leaving:
        app.main()
    assert not leaving.value.code
    inside = Counter(os.path.basename(one) for one in opened if one.startswith(f"{folder}/"))
    assert {"config.json", "tokenizer.json"} < set(inside)
    assert set(inside.values()) == {1}, inside
    assert (tmp_path / "out" / "verify.json").exists() == ("--verify" in options)
