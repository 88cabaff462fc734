"""What `bench` runs of this package, and random weights."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import random_checkpoint
from mlx_smolvlm.bench import models, random_model
from mlx_smolvlm.bench.measure import find_view
from mlx_smolvlm.bench.models import make_random_model, open_model
from mlx_smolvlm.bench.worker import Worker, make_picture
from mlx_smolvlm.checkpoint.load import read_config
from mlx_smolvlm.convert.hub import ALIASES, resolve
from mlx_smolvlm.errors import CheckpointError


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(str(resolve("demo")))


def test_every_request_is_computed_and_timed(worker: Worker) -> None:
    assert set(worker.ready) == {"import_s", "load_s"}
    config = worker.vlm.config
    vision = worker.answer({"do": "vision", "tiles": 5, "side": config.tile_size})
    assert vision["seconds"] > 0
    assert len(vision["sample"]) == 8
    text = worker.answer({"do": "text", "prompt": 20, "tokens": 4})
    assert len(text["ids"]) == 5
    assert text["prefill_s"] > 0
    assert text["decode_s"] > 0
    view = vars(find_view(config, 5))
    assert worker.answer({"do": "preprocess", **view, "seed": 1})["tiles"] == 5
    turns = worker.answer({"do": "turns", **view, "seed": 1, "tokens": 2})
    assert turns["encoded"] == [5, 0]  # the second turn has no new picture
    assert min(turns["first_s"], turns["second_s"]) > 0
    graph = worker.answer({"do": "graph", "prompt": 8, "repeat": 3})
    assert len(graph["seconds"]) == 3
    memory = worker.answer({"do": "memory"})
    assert memory["resident"] > 10**7


def test_a_memory_limit_is_kept() -> None:
    limited = Worker(str(resolve("demo")), 4 * 10**9)
    assert limited.vlm.engine.guard is not None


def test_pictures_differ_by_their_seed() -> None:
    one, same, other = (np.asarray(make_picture(50, 40, seed)) for seed in (1, 1, 2))
    assert one.shape == (40, 50, 3)
    assert (one == same).all()
    assert (one != other).any()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of two layers, for the demo's vocabulary."""
    vision, text, factor = random_model.SIZES["256m"]
    vision = replace(vision, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    vision = replace(vision, num_attention_heads=2, image_size=64)
    text = replace(text, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    text = replace(text, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    monkeypatch.setitem(
        random_model.SIZES, "256m", (vision, replace(text, vocab_size=1500), factor)
    )


@pytest.mark.usefixtures("tiny")
def test_random_weights_are_made_once_and_answer(tmp_path: Path) -> None:
    model = make_random_model("256m", (16, 4), tmp_path)
    assert list(model.folders) == ["16 bits", "4 bits"]
    config = read_config(model.folders["4 bits"])
    assert config.quantization.text is not None
    assert config.quantization.text.bits == 4
    assert model.config.text == random_model.SIZES["256m"][1]
    assert model.get_source() == tmp_path / "256m-hf"
    packed = Worker(str(model.folders["4 bits"])).answer({"do": "text", "prompt": 9, "tokens": 3})
    assert len(packed["ids"]) == 4
    reply = Worker(str(model.folders["16 bits"])).vlm.ask("What?", make_picture(90, 60, 0))
    assert reply.image_tiles > 1
    weights = tmp_path / "256m-hf" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert make_random_model("256m", (16, 4), tmp_path).folders == model.folders
    assert weights.stat().st_mtime_ns == before
    (tmp_path / "256m-hf" / "config.json").write_text("{}")  # of another version, or unfinished
    other = make_random_model("256m", (16,), tmp_path)
    assert weights.stat().st_mtime_ns != before
    assert other.folders["16 bits"] != model.folders["16 bits"]


@pytest.mark.usefixtures("tiny")
def test_random_weights_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_model, "SHARD_BYTES", 10**6)
    model = make_random_model("256m", (), tmp_path)
    index = json.loads((model.get_source() / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_random_checkpoint_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results: list[Exception | Path] = [CheckpointError("disk full"), tmp_path]

    def convert(source: Path, dest: Path) -> Path:
        assert not (source / "chat_template.jinja").exists()
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(random_checkpoint, "convert_checkpoint", convert)
    with pytest.raises(CheckpointError, match="disk full"):
        random_checkpoint.make_random_checkpoint(tmp_path, resolve("demo"))
    assert random_checkpoint.make_random_checkpoint(tmp_path, resolve("demo")) == tmp_path


@pytest.mark.usefixtures("tiny")
def test_a_folder_that_bench_did_not_make_is_kept(tmp_path: Path) -> None:
    theirs = tmp_path / "256m-hf" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("years of work")
    with pytest.raises(CheckpointError, match=r"256m-hf is not a model that bench made.*--work"):
        make_random_model("256m", (), tmp_path)
    assert theirs.read_text() == "years of work"


def test_peers_need_a_checkpoint_of_hugging_face(tmp_path: Path) -> None:
    model = open_model("demo", (), tmp_path)
    assert list(model.folders) == [""]
    with pytest.raises(CheckpointError, match="demo is not a checkpoint in Hugging Face's format"):
        model.get_source()
    packed = open_model("demo", (8,), tmp_path)
    quantization = read_config(packed.folders["8 bits"]).quantization.text
    assert quantization is not None
    assert quantization.bits == 8


@pytest.mark.usefixtures("tiny")
def test_models_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    sources = [make_random_model("256m", (), tmp_path / name).get_source() for name in "ab"]
    work = tmp_path / "work"

    def convert(source: Path) -> Path:
        (folder,) = open_model(str(source), (16,), work).folders.values()
        return folder

    first, second = map(convert, sources)
    assert first.name.startswith("256m-hf-16-")
    assert first != second
    assert convert(sources[0]) == first
    weights = sources[0] / "model.safetensors"
    os.utime(weights, (1, 1))  # as if trained again
    assert convert(sources[0]) not in (first, second)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What `bench` downloads; a folder in Hugging Face's format, and its conversion is cached."""
    calls: list[tuple[object, ...]] = []

    def download(*arguments: object) -> Path:
        calls.append(arguments)
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    monkeypatch.setattr(models, "download", download)
    monkeypatch.setattr(models, "resolve", lambda model, options: resolve("demo"))
    return calls


def test_peers_get_the_source_of_an_alias_and_of_a_revision(
    downloads: list[tuple[object, ...]], tmp_path: Path
) -> None:
    model = open_model("SmolVLM2-256M", (), tmp_path, for_peers=True)
    assert model.get_source() == tmp_path
    open_model("owner/name@v1", (), tmp_path, True, for_peers=True)
    assert downloads == [(ALIASES["smolvlm2-256m"], False, None), ("owner/name", True, "v1")]


def test_a_cached_conversion_needs_no_download(
    downloads: list[tuple[object, ...]], tmp_path: Path
) -> None:
    model = open_model("owner/name", (), tmp_path, offline=True)
    assert model.folders == {"": resolve("demo")}
    assert downloads == []
