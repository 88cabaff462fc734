"""A checkpoint and its card reach a hub on this machine in one commit, or it is said why not."""

import hashlib
import math
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from mlx_smolvlm.checkpoint.load import load_model
from mlx_smolvlm.checkpoint.provenance import PartSize, check_sums, measure_parts
from mlx_smolvlm.convert.card import format_model_card
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from tests.helpers import command, fake_hub
from tests.helpers import hf_folder as hf

CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\nbase_model:\n- owner/base\n---\n# Its own text\n"


@pytest.fixture
def hub():
    with fake_hub.running() as hub:
        yield hub


@pytest.fixture
def source(tmp_path) -> Path:
    folder = hf.make(tmp_path / "Some-VLM")
    (folder / "README.md").write_text(CARD)
    return folder


def run(*arguments, cwd: Path, hub=None, token: str = fake_hub.TOKEN, **changes: str):
    """The finished command, which knows `hub` alone."""
    environment = {
        "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9",
        "HF_TOKEN": token,
        "HF_HOME": str(cwd / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "MLX_SMOLVLM_CACHE": str(cwd / "cache"),
        "NO_PROXY": "*",
    }
    return command.run_text(*map(str, arguments), cwd=cwd, env={**environment, **changes})


def downloaded(files: dict[str, bytes], folder: Path) -> Path:
    """A folder with the files of a repository."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_convert_and_upload(source, hub, tmp_path):
    arguments = ("convert", source, "out", "--bits", "4", "--upload", "owner/Some-VLM-4bit")
    said = run(*arguments, "--private", cwd=tmp_path, hub=hub)
    assert said.returncode == 0, said.stderr
    assert said.stdout == f"{hub.url}/owner/Some-VLM-4bit/commit/{1:040x}\n"
    assert [line.split()[0] for line in said.stderr.splitlines()] == ["wrote", "uploading"]
    assert hub.private == {"owner/Some-VLM-4bit": True}
    assert len(hub.commits) == 1
    files = hub.repos["owner/Some-VLM-4bit"]
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: files[name] for name in made} == made
    assert set(files) - set(made) == {"README.md", ".gitattributes"}
    got = downloaded(files, tmp_path / "got")
    load_model(got)
    assert all(problem is None for _, problem in check_sums(got))
    assert b"Its own text" not in files["README.md"]


def test_what_was_verified_is_on_the_card_and_the_texts_stay_here(hub, tmp_path):
    source = hf.make_askable(tmp_path / "Some-VLM")
    text = tmp_path / "secret.txt"
    text.write_text("marzipan, " * 40)  # each passage that is shown holds it
    arguments = ("out", "--bits", "8", "--verify-texts", str(text), "--upload", "me/model")
    done = run("convert", str(source), *arguments, cwd=tmp_path, hub=hub)
    assert done.returncode == 0, done.stderr
    assert "marzipan" in (tmp_path / "out" / "verify.json").read_text()
    files = hub.repos["me/model"]
    assert "verify.png" in files
    assert "verify.json" not in files
    card = files["README.md"].decode()
    assert all(word in card for word in ("verify.png", "KL"))
    assert "marzipan" not in card


def test_a_second_upload_removes_the_first_ones_files(source, hub, tmp_path):
    out = convert_checkpoint(source, tmp_path / "out")
    assert run("convert", out, "--upload", "owner/m", cwd=tmp_path, hub=hub).returncode == 0
    files = hub.repos["owner/m"]
    files["model-00001-of-00002.safetensors"] = files["model.safetensors.index.json"] = b"old"
    files["sub/x.safetensors"] = files["notes.txt"] = b"theirs"
    said = run("convert", out, "--upload", "owner/m", cwd=tmp_path, hub=hub)
    assert said.returncode == 0, said.stderr
    assert "model-00001-of-00002.safetensors" not in files
    assert "model.safetensors.index.json" not in files
    assert files["sub/x.safetensors"] == files["notes.txt"] == b"theirs"
    assert len(hub.commits) == 2


def test_another_checkpoint_is_replaced_by_force_alone(source, hub, tmp_path):
    out = convert_checkpoint(source, tmp_path / "out")
    hub.repos["owner/base"] = {"config.json": b"{}", "model.safetensors": b"years of work"}
    hub.private["owner/base"] = False
    said = run("convert", out, "--upload", "owner/base", cwd=tmp_path, hub=hub)
    assert said.returncode == 1
    assert "owner/base holds a checkpoint of another format" in said.stderr
    assert "or use --force to replace it" in said.stderr
    assert hub.repos["owner/base"]["model.safetensors"] == b"years of work"
    assert hub.commits == []
    forced = run("convert", out, "--upload", "owner/base", "--force", cwd=tmp_path, hub=hub)
    assert forced.returncode == 0, forced.stderr


def test_a_folder_from_before_sums_gets_them(source, hub, tmp_path):
    out = convert_checkpoint(source, tmp_path / "out")
    for name in ("SHA256SUMS", "origin.json"):
        (out / name).unlink()
    (out / "private notes.txt").write_text("x")
    said = run("convert", out, "--upload", "owner/m", cwd=tmp_path, hub=hub)
    assert said.returncode == 0, said.stderr
    assert "states no licence" in said.stderr
    files = hub.repos["owner/m"]
    assert "private notes.txt" not in files
    sums = dict(reversed(line.split("  ")) for line in files["SHA256SUMS"].decode().splitlines())
    assert set(sums) == set(files) - {"README.md", ".gitattributes", "SHA256SUMS"}
    assert sums["config.json"] == hashlib.sha256(files["config.json"]).hexdigest()


def test_an_edited_template_is_published_with_its_own_sum(source, hub, tmp_path):
    out = convert_checkpoint(source, tmp_path / "out")
    template = out / "chat_template.jinja"
    template.write_text(template.read_text() + "{# edited #}")
    said = run("convert", out, "--upload", "owner/m", cwd=tmp_path, hub=hub)
    assert said.returncode == 0, said.stderr
    assert "chat_template.jinja was changed since its checksum was written" in said.stderr
    got = downloaded(hub.repos["owner/m"], tmp_path / "got")
    checked = dict(check_sums(got))
    assert checked["chat_template.jinja"] is None
    assert set(checked.values()) == {None}


def test_weights_that_differ_from_their_sum_are_not_published(source, hub, tmp_path):
    out = convert_checkpoint(source, tmp_path / "out")
    weights = out / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    said = run("convert", out, "--upload", "owner/m", cwd=tmp_path, hub=hub)
    assert (said.returncode, said.stdout) == (1, "")
    assert "model.safetensors differs from its sum" in said.stderr
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("path", "status", "match"),
    [
        ("whoami", 401, "does not accept the token: `hf auth login`"),
        ("whoami", 429, "asks to wait"),
        ("whoami", 500, "the hub refuses (asking who is logged in: 500"),
        ("repos/create", 403, "the token may not write there"),
        ("repos/create", 404, "no such owner or repository"),
        ("/tree/", 403, "the token may not write there"),
        ("preupload", 403, "the token may not write there"),
        ("objects/batch", 403, "the token may not write there"),
        ("/commit/", 401, "does not accept the token"),
        ("/commit/", 403, "the token may not write there"),
        ("/commit/", 404, "no such owner or repository"),
        ("/commit/", 412, "the hub refuses (uploading: 412"),
        ("validate-yaml", 400, "the hub"),
    ],
)
def test_each_refusal_of_the_hub_is_one_line(source, hub, tmp_path, path, status, match):
    hub.refuse[path] = status
    out = convert_checkpoint(source, tmp_path / "out")
    said = run("convert", out, "--upload", "owner/m", cwd=tmp_path, hub=hub)
    assert (said.returncode, said.stdout) == (1, "")
    last = said.stderr.splitlines()[-1]
    assert last.startswith("error: owner/m: ")
    assert match in last
    assert "Traceback" not in said.stderr
    assert fake_hub.TOKEN not in said.stderr
    assert hub.commits == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"token": "hf_wrong"}, "the hub does not accept the token"),
        ({"token": ""}, "nobody is logged in to the hub"),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ],
)
def test_without_a_login_nothing_is_converted(source, hub, tmp_path, changes, match):
    arguments = ("convert", source, "out", "--upload", "owner/m")
    said = run(*arguments, cwd=tmp_path, hub=hub, **changes)
    assert said.returncode == 1
    assert match in said.stderr
    assert said.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("--upload", "owner/m", "--offline"), 2, "--upload"),
        (("--private",), 2, "--private"),
        (("--upload", "no name"), 1, "give owner/name"),
        (("--upload", "../x"), 1, "give owner/name"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_first(source, tmp_path, hub, arguments, status, word):
    said = run("convert", source, "out", *arguments, cwd=tmp_path, hub=hub)
    assert said.returncode == status
    assert word in said.stderr
    assert hub.asked == []
    assert not (tmp_path / "out").exists()


# The card


def test_the_card_is_what_the_hub_reads(source, tmp_path):
    out = convert_checkpoint(source, tmp_path / "out", ConvertOptions(bits=4, vision_bits=16))
    text = format_model_card(out, "owner/made", "## Compared\nIt is close.")
    data = ModelCard(text).data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en"], "owner/base")
    assert (data.library_name, data.pipeline_tag) == ("mlx-smolvlm", "image-text-to-text")
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert {"mlx", "4-bit", "video-text-to-text"} <= set(data.tags)
    assert "# made\n" in text
    assert (
        text.index("## Precision")
        < text.index("## Compared\nIt is close.\n")
        < text.index("## Files")
    )
    assert "-m owner/made\n" in text
    rows = re.findall(r"^\| (\w+) \| (.*?) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|$", text, re.M)
    assert [row[0] for row in rows] == ["text", "vision", "connector", "embeddings", "all"]
    assert rows[0][1] == "4 bits, groups of 64, affine"
    assert rows[1][1] == "float32"
    assert rows[1][4] == "32.00"


def test_sizes_are_counted_from_the_shapes(source, tmp_path):
    """The weights of the source, whatever they are packed as; padding apart."""
    plain = measure_parts(convert_checkpoint(source, tmp_path / "plain"))
    packed = measure_parts(convert_checkpoint(source, tmp_path / "4", ConvertOptions(bits=4)))
    shapes = hf.shapes(hf.settings())
    total = sum(math.prod(shape) for shape in shapes.values())
    assert sum(size.weights for size in plain.values()) == total
    assert packed["text"].weights == plain["text"].weights
    assert plain["text"].bits_per_weight == 32
    # Matrices: 4 bits, and a scale and a bias of 32 bits for 64 of them; norms: 32 bits.
    norms = 5 * 64
    matrices = plain["text"].weights - norms
    assert packed["text"].nbytes == matrices * (4 + 2 * 32 / 64) / 8 + norms * 4
    sizes = [path.stat().st_size for path in (tmp_path / "4").glob("*.safetensors")]
    header = int.from_bytes(next((tmp_path / "4").glob("*.safetensors")).read_bytes()[:8], "little")
    assert sum(size.nbytes for size in packed.values()) == sum(sizes) - header - 8
    assert PartSize(0, 0).bits_per_weight == 0


def test_a_source_without_a_licence_is_said_to_be_unknown(tmp_path):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    text = format_model_card(out, "owner/made")
    card = ModelCard(text)
    assert card.data.license == "unknown"
    assert card.data.base_model is None
    assert "states no licence" in text
    assert "`s`, converted for mlx-smolvlm" in text


def test_a_card_cannot_be_broken_out_of(tmp_path):
    source = hf.make(tmp_path / "s")
    (source / "README.md").write_text(
        '---\nlicense: other\nlicense_name: "a: b # c"\nlicense_link: "x --- y"\n---\n'
    )
    text = format_model_card(convert_checkpoint(source, tmp_path / "out"), "owner/made")
    data = ModelCard(text).data
    assert (data.license_name, data.license_link) == ("a: b # c", "x --- y")
    assert data.library_name == "mlx-smolvlm"
