"""What lies in the cache is listed, and removed only where it is a checkpoint of the cache."""

import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from mlx_smolvlm.checkpoint.load import is_own, load_model
from mlx_smolvlm.checkpoint.provenance import measure_parts
from mlx_smolvlm.config import Quantization
from mlx_smolvlm.convert import model_cache as cached
from mlx_smolvlm.convert import source as convert_source
from mlx_smolvlm.convert.hub import ResolveOptions, resolve
from mlx_smolvlm.convert.model_cache import (
    find_models,
    list_cached_models,
    list_fetched_models,
    remove_model,
)
from mlx_smolvlm.convert.options import ConvertOptions
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import hf_folder as hf

REPO = "HuggingFaceTB/SmolVLM-256M-Instruct"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache, reached through a link, and a hub from which revision aaaa... can be fetched."""
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "cache"
    link.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(link))

    def snapshot(repo, offline=False, revision=None):
        folder = tmp_path / "snapshots" / (revision or "a" * 40)
        return folder if folder.exists() else hf.make(folder)

    monkeypatch.setattr(convert_source, "download", snapshot)
    return link


def states() -> dict[str, str]:
    return {model.name: model.state for model in list_cached_models()}


def test_conversions_are_listed_with_bits_origin_and_use(tmp_path, cache):
    assert list_cached_models() == []
    before = time.time()
    local = hf.make(tmp_path / "s")
    paths = {resolve(REPO), resolve(REPO, ResolveOptions(bits=4)), resolve(local)}
    models = {model.path: model for model in list_cached_models()}
    assert set(models) == paths
    four = next(model for model in models.values() if model.bits == 4)
    assert four.name == f"{REPO}/aaaaaaaaaaaa-4bit-v2"
    assert four.parts == {"text": 4, "vision": 8, "connector": 8, "embeddings": 8}
    assert (four.source, four.revision, four.state) == (REPO, "a" * 40, "whole")
    assert four.nbytes == sum(file.stat().st_size for file in four.path.iterdir())
    assert before - 5 < four.last_used_s <= time.time() + 5
    plain = next(model for model in models.values() if model.source == "s")
    assert (plain.bits, plain.parts["text"], plain.revision) == (16, 32, None)
    assert plain.name.startswith("local/s-")


def test_of_mixed_precisions_the_mean_is_listed(tmp_path, cache):
    kinds = (("text_model.layers.0.*", Quantization(8, 32, "affine")),)
    options = ConvertOptions(bits=2, vision_bits=16, group_size=32, overrides=kinds)
    folder = convert_checkpoint(hf.make(tmp_path / "s"), cache / "a--b" / "abc-2bit-v2", options)
    (model,) = list_cached_models()
    sizes = measure_parts(folder)
    assert model.parts == {part: round(one.bits_per_weight, 1) for part, one in sizes.items()}
    assert 2 < model.parts["text"] < 10
    assert model.parts["vision"] == 32


def test_each_use_is_noted_and_older_conversions_know_none(cache):
    path = resolve(REPO)
    (path / ".last-used").unlink()
    assert list_cached_models()[0].last_used_s is None
    resolve(REPO)
    os.utime(path / ".last-used", (1000, 1000))
    assert list_cached_models()[0].last_used_s == 1000
    resolve(REPO)
    assert list_cached_models()[0].last_used_s > 1000


def test_the_newest_conversion_wins_however_late_another_was_used(cache):
    old, new = resolve(f"owner/name@{'b' * 40}"), resolve(f"owner/name@{'c' * 40}")
    for path in (old, new):
        (path / ".revisions").write_text("")  # each was the newest commit once
    os.utime(old / "config.json", (1000, 1000))
    (old / ".last-used").unlink()  # or the folder's own time would not change
    resolve(f"owner/name@{'b' * 40}")
    assert resolve("owner/name") == new


@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_a_conversion_of_another_user_is_not_used(cache, give_away, name):
    path = resolve(REPO)
    give_away(path / name)
    advice = "set MLX_SMOLVLM_CACHE to another folder"
    if os.getuid() == 0:  # without root, the folder around it is another user's too
        advice += ", or, if you trust it, give this folder"
    with pytest.raises(CheckpointError, match=rf"Owned by another user, uid .*{advice}"):
        resolve(REPO)
    assert resolve(path) == path  # a folder that the user names is used


def test_a_model_folder_of_another_user_is_not_used(cache, give_away):
    path = resolve(REPO)
    give_away(path.parent)
    with pytest.raises(CheckpointError, match=r"Owned by another user, uid .*MLX_SMOLVLM_CACHE"):
        resolve(REPO)


def test_folders_of_models_are_for_their_owner_alone(tmp_path, monkeypatch):
    cache = tmp_path / "new" / "cache"
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(cache))
    umask = os.umask(0)
    try:
        parent = resolve(REPO).parent
    finally:
        os.umask(umask)
    assert [one.stat().st_mode & 0o777 for one in (cache.parent, cache, parent)] == [0o700] * 3


def test_what_is_not_whole_is_told_apart(tmp_path, cache):
    whole = resolve(REPO)
    parent = whole.parent
    damaged = Path(shutil.copytree(whole, parent / "aaaaaaaaaaaa-8bit-v2"))
    (damaged / "model.safetensors").write_bytes(b"cut")
    old = Path(shutil.copytree(whole, parent / "aaaaaaaaaaaa-source-v1"))
    values = json.loads((old / "config.json").read_text())
    hf.write_json(old / "config.json", values | {"format_version": 1})
    left, living = parent / ".x.11111111.partial", parent / ".x.22222222.partial"
    for path in (left, living):
        shutil.copytree(whole, path)  # killed before its last step
    (cache / "stray" / "broken-source-v2").mkdir(parents=True)
    (cache / "stray" / "notes").mkdir()
    (cache / "stray" / "notes" / "config.json").write_text("{}")
    (cache / "history").write_text("x")
    lock = os.open(living, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert {Path(name).name: state for name, state in states().items()} == {
        whole.name: "whole",
        damaged.name: "damaged",
        old.name: "outdated",
        left.name: "unfinished",
        living.name: "in progress",
    }
    for model in list_cached_models():
        if model.state == "in progress":
            with pytest.raises(CheckpointError, match="is being converted or used"):
                remove_model(model)
        elif model.state != "whole":
            remove_model(model)
    os.close(lock)
    assert sorted(states().values()) == ["unfinished", "whole"]  # its writer lives no more
    assert (cache / "stray" / "notes" / "config.json").exists()


def test_names_mean_what_the_list_says(cache, tmp_path):
    paths = [resolve(REPO), resolve(REPO, ResolveOptions(bits=4)), resolve(f"{REPO}x")]
    models = list_cached_models()

    def found(name: str) -> list[Path]:
        return sorted(model.path for model in find_models(name, models))

    assert found(REPO) == found("SmolVLM-256m") == sorted(paths[:2])
    assert found(f"{REPO}@{'a' * 40}") == sorted(paths[:2])
    assert found(f"{REPO}/aaaaaaaaaaaa-4bit-v2") == found(str(paths[1])) == paths[1:2]
    assert found(f"{paths[1]}/") == paths[1:2]
    for name in ("demo", "", "/", ".", "..", "HuggingFaceTB", REPO[:-1], f"{REPO}@b", f"{REPO}/a",
                 str(cache), str(paths[0].parent), str(paths[0] / "config.json"),
                 f"{REPO}/../../elsewhere", str(tmp_path)):  # fmt: skip
        message = re.escape(f"there is no checkpoint '{name}' in the cache {cache};")
        with pytest.raises(CheckpointError, match=message):
            find_models(name, models)


def test_a_removed_conversion_is_gone_and_others_stay(cache):
    one, other = resolve(REPO), resolve(REPO, ResolveOptions(bits=4))
    remove_model(find_models(str(one), list_cached_models())[0])
    assert not one.exists()
    load_model(other)
    remove_model(list_cached_models()[0])
    assert list(cache.iterdir()) == []  # the model's folder too
    load_model(resolve(REPO))


def test_of_a_link_the_link_alone_is_removed(cache, tmp_path):
    path = resolve(REPO)
    moved = path.rename(tmp_path / "big disk")
    path.symlink_to(moved, target_is_directory=True)
    assert resolve(REPO) == path
    remove_model(list_cached_models()[0])
    assert not os.path.lexists(path)
    load_model(moved)


def test_what_a_linked_model_folder_holds_is_left_alone(cache, tmp_path):
    parent = resolve(REPO).parent
    moved = parent.rename(tmp_path / "moved")
    parent.symlink_to(moved, target_is_directory=True)
    (model,) = list_cached_models()
    with pytest.raises(CheckpointError, match="is a link out of the cache"):
        remove_model(model)
    load_model(model.path)


def test_a_model_that_is_being_converted_is_not_removed(cache):
    path = resolve(REPO)
    lock = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(CheckpointError, match="is being converted or used; try again"):
        remove_model(list_cached_models()[0])
    os.close(lock)
    load_model(path)


def test_a_removal_that_is_killed_leaves_no_half_checkpoint(cache, monkeypatch):
    path = resolve(REPO)

    def killed(folder):
        (folder / "config.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(cached.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_model(list_cached_models()[0])
    monkeypatch.undo()
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(cache))
    assert not path.exists()
    (left,) = list_cached_models()
    assert left.state == "unfinished"
    remove_model(left)
    assert list(cache.iterdir()) == []


def test_a_disk_that_refuses_is_named(cache, monkeypatch):
    resolve(REPO)

    def refuse(_folder):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cached.shutil, "rmtree", refuse)
    with pytest.raises(CheckpointError, match="cannot be removed: Read-only file system"):
        remove_model(list_cached_models()[0])


def test_what_was_fetched_is_listed(tmp_path, monkeypatch):
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    assert list_fetched_models() == []
    source = hf.make(tmp_path / "s")
    ours = convert_checkpoint(source, tmp_path / "ours", ConvertOptions(bits=4))
    other = hf.make(tmp_path / "other", hf.settings(model_type="bert"))
    for name, made in (("owner/vlm", source), ("owner/ours", ours), ("owner/bert", other)):
        repo = folder / f"models--{name.replace('/', '--')}"
        snapshot = repo / "snapshots" / ("c" * 40)
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("c" * 40)
        (repo / "blobs").mkdir()
        snapshot.mkdir(parents=True)
        for file in made.iterdir():
            blob = Path(shutil.copy(file, repo / "blobs" / f"{file.name}-blob"))
            (snapshot / file.name).symlink_to(blob)
    one, two = list_fetched_models()
    assert (one.name, one.is_own, two.name, two.is_own) == ("owner/ours", True, "owner/vlm", False)
    assert two.revision == "c" * 40
    assert two.nbytes == sum(file.stat().st_size for file in source.iterdir())
    assert two.path == folder / "models--owner--vlm" / "snapshots" / ("c" * 40)
    assert is_own(one.path)
