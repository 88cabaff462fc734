"""What prompts have in common, kept on disk: found again, bounded, never trusted blindly."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_smolvlm import (
    CacheOptions,
    CheckpointError,
    Reply,
    Sampling,
    SmolVLM,
    SmolVLMWarning,
    load,
)
from mlx_smolvlm.reuse.disk import OWN_FOLDER, digest_checkpoint, write_state_file

SHORT = Sampling(max_tokens=4)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 64, 3), np.uint8))


def run(
    model: Path, folder: Path, question: str = "What?", picture: Image.Image = PICTURE
) -> Reply:
    """The answer of a new run that keeps its cache in `folder`."""
    vlm = load(model, cache=CacheOptions(folder=folder))
    return vlm.ask(question, images=[picture], sampling=SHORT)


def files(folder: Path) -> list[Path]:
    """The files of states in `folder`."""
    return sorted(folder.glob("*/*.safetensors"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "a cache" / "folder"


def test_a_second_run_goes_on_from_the_first(
    tiny_folder: Path, tiny: SmolVLM, folder: Path
) -> None:
    tiny.engine.memory.clear()
    cold = tiny.ask("Where is it?", images=[PICTURE], sampling=SHORT)
    first = run(tiny_folder, folder)
    assert (first.cached_tokens, first.encoded_tiles) == (0, 5)
    same = run(tiny_folder, folder)
    assert (same.cached_tokens, same.encoded_tiles) == (same.prompt_tokens - 1, 0)
    assert same.token_ids == first.token_ids
    other = run(tiny_folder, folder, "Where is it?")
    assert other.encoded_tiles == 0
    assert other.cached_tokens > 5 * 4
    assert other.token_ids == cold.token_ids
    assert len(files(folder)) == 1  # the second question adds too little for a file


def test_another_picture_is_another_content(tiny_folder: Path, folder: Path) -> None:
    run(tiny_folder, folder)
    reply = run(tiny_folder, folder, picture=OTHER)
    assert reply.encoded_tiles == 5
    assert reply.cached_tokens < 7  # up to the first placeholder
    assert len(files(folder)) == 2


def test_a_longer_prompt_replaces_what_it_holds(tiny_folder: Path, folder: Path) -> None:
    vlm = load(tiny_folder, cache=CacheOptions(folder=folder))
    chat = vlm.chat(sampling=SHORT)
    chat.ask("What?", images=[PICTURE])
    kept = files(folder)
    text = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What"}]}]
    vlm.ask(text, images=[PICTURE], sampling=SHORT)
    assert files(folder) == kept
    chat.ask("And what else is there to be seen in it, if one looks at it for long enough?")
    assert len(files(folder)) == 1 or files(folder)[0] not in kept


def test_another_checkpoint_does_not_use_it(
    tiny_folder: Path, folder: Path, tmp_path: Path
) -> None:
    run(tiny_folder, folder)
    twin = Path(shutil.copytree(tiny_folder, tmp_path / "twin"))
    assert run(twin, folder).encoded_tiles == 0  # the same bytes are the same checkpoint
    weights = mx.load(str(twin / "model.safetensors"))
    assert isinstance(weights, dict)
    name = sorted(weights)[0]
    weights[name] = weights[name] + 0.01
    mx.save_safetensors(str(twin / "model.safetensors"), weights)
    assert run(twin, folder).encoded_tiles == 5
    assert len(files(folder)) == 2


def test_the_digest_of_a_checkpoint_is_remembered_by_size_and_time(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo = tmp_path / "checkpoints.json"
    digest = digest_checkpoint(tiny_folder, memo)
    assert digest == digest_checkpoint(tiny_folder)
    values = json.loads(memo.read_text())
    values[str(tiny_folder.resolve())][1] = "ab" * 32
    memo.write_text(json.dumps(values))
    assert digest_checkpoint(tiny_folder, memo) == "ab" * 32
    twin = Path(shutil.copytree(tiny_folder, tmp_path / "twin"))
    assert digest_checkpoint(twin, memo) == digest
    (twin / "README.md").write_text("What it can do is written here once it was judged.")
    assert digest_checkpoint(twin, memo) == digest
    (twin / "more.json").write_text("{}")
    assert digest_checkpoint(twin, memo) != digest
    os.utime(tiny_folder / "config.json", ns=(1, 1))
    assert digest_checkpoint(tiny_folder, memo) == digest
    memo.write_text("not json")
    assert digest_checkpoint(tiny_folder, memo) == digest
    with pytest.raises(CheckpointError):
        digest_checkpoint(tmp_path / "none")


def damages(path: Path) -> Iterator[tuple[str, bytes]]:
    """Ways in which the file at `path` may be spoilt."""
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-10] ^= 4
    yield "flipped bit", bytes(flipped)
    yield "cut", data[: len(data) // 2]
    yield "empty", b""
    yield "text", b"hello " * 100
    yield "other kind", data.replace(b'\\"prefix\\"', b'\\"prefiX\\"')
    yield "other version", data.replace(b'\\"version\\": 1', b'\\"version\\": 2')
    yield "ids that are none", data.replace(b'\\"ids\\": [1,', b'\\"ids\\": {1,')
    yield "huge header", (2**62).to_bytes(8, "little") + data[8:]


def test_an_adapter_is_part_of_the_digest(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters.safetensors").write_bytes(b"one")
    without = digest_checkpoint(tiny_folder)
    first = digest_checkpoint(tiny_folder, adapter=tmp_path)
    (tmp_path / "adapters.safetensors").write_bytes(b"two")
    second = digest_checkpoint(tiny_folder, adapter=tmp_path)
    assert len({without, first, second}) == 3


def test_spoilt_files_are_passed_over_with_one_warning(tiny_folder: Path, folder: Path) -> None:
    first = run(tiny_folder, folder)
    [path] = files(folder)
    for name, contents in damages(path):
        assert contents != path.read_bytes(), name
        for other in files(folder):
            other.unlink()
        path.write_bytes(contents)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reply = run(tiny_folder, folder)
        assert (reply.encoded_tiles, reply.token_ids) == (5, first.token_ids), name
        assert [one.category for one in caught] == [SmolVLMWarning], name
        assert str(path) in str(caught[0].message)


def test_a_foreign_file_of_another_shape_is_passed_over(tiny_folder: Path, folder: Path) -> None:
    run(tiny_folder, folder)
    [path] = files(folder)
    from mlx_smolvlm.reuse.disk import read_state_file

    digest = digest_checkpoint(tiny_folder)
    _, values = read_state_file(path, "prefix", digest)
    for tensors in ({"x": mx.zeros((3,))}, {"layer.0": mx.zeros((1, 2, 3, 4))}):
        write_state_file(path, "prefix", digest, tensors, values)
        with pytest.warns(SmolVLMWarning, match="layer 0 are missing or of another shape"):
            assert run(tiny_folder, folder).encoded_tiles == 5


def test_the_folder_is_bounded(tiny_folder: Path, folder: Path) -> None:
    run(tiny_folder, folder)
    each = files(folder)[0].stat().st_size
    options = CacheOptions(folder=folder, folder_bytes=int(2.5 * each))
    for number in range(4):
        vlm = load(tiny_folder, cache=options)
        pixels = np.full((48, 64, 3), 40 * number, np.uint8)
        vlm.ask("What?", images=[pixels], sampling=SHORT)
        os.utime(files(folder)[-1])
    assert len(files(folder)) == 2
    assert not [path for path in folder.rglob("*") if "part" in path.name]


def test_what_was_used_last_is_kept(tiny_folder: Path, folder: Path) -> None:
    run(tiny_folder, folder)
    [old] = files(folder)
    run(tiny_folder, folder, picture=OTHER)
    [other] = [path for path in files(folder) if path != old]
    for path, when in ((old, 1000), (other, 2000)):
        os.utime(path, (when, when))
    run(tiny_folder, folder)  # uses the old one
    options = CacheOptions(folder=folder, folder_bytes=int(2.5 * old.stat().st_size))
    vlm = load(tiny_folder, cache=options)
    vlm.ask("What?", images=[np.zeros((48, 64, 3), np.uint8)], sampling=SHORT)
    assert old.exists()
    assert not other.exists()


def test_a_folder_that_cannot_be_used(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cache folder .* cannot be used"):
        run(tiny_folder, tmp_path / "file" / "sub")


def test_a_file_of_another_user_is_not_used(
    tiny_folder: Path, folder: Path, give_away: Callable[[Path], None]
) -> None:
    run(tiny_folder, folder)
    vlm = load(tiny_folder, cache=CacheOptions(folder=folder))
    give_away(files(folder)[0])
    with pytest.warns(SmolVLMWarning, match="is not used: .* Owned by another user, uid") as caught:
        reply = vlm.ask("What?", images=[PICTURE], sampling=SHORT)
    assert (reply.cached_tokens, reply.encoded_tiles) == (0, 5)
    assert len(caught) == 1


def test_a_digest_that_another_user_noted_is_not_used(
    tiny_folder: Path, tmp_path: Path, give_away: Callable[[Path], None]
) -> None:
    memo = tmp_path / "checkpoints.json"
    digest = digest_checkpoint(tiny_folder, memo)
    values = json.loads(memo.read_text())
    values[str(tiny_folder.resolve())][1] = "ab" * 32
    memo.write_text(json.dumps(values))
    give_away(memo)
    assert digest_checkpoint(tiny_folder, memo) == digest


def test_a_folder_of_another_user_is_refused(
    tiny_folder: Path, folder: Path, give_away: Callable[[Path], None]
) -> None:
    run(tiny_folder, folder)
    give_away(folder / OWN_FOLDER)
    with pytest.raises(CheckpointError, match=r"Owned by another user, uid .* choose another"):
        run(tiny_folder, folder)


def test_the_folder_is_for_its_owner_alone(tiny_folder: Path, folder: Path) -> None:
    own = folder / OWN_FOLDER
    umask = os.umask(0)
    try:
        run(tiny_folder, folder)
        made = [one.stat().st_mode & 0o777 for one in (folder.parent, folder, own)]
        assert made == [0o700] * 3
        own.chmod(0o777)  # as an earlier version made it
        assert run(tiny_folder, folder).encoded_tiles == 0
        assert own.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(umask)


def test_no_room_stops_no_answer(
    tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_smolvlm.reuse.disk.os.replace", full)
    with pytest.warns(SmolVLMWarning, match="No space left"):
        reply = run(tiny_folder, folder)
    assert reply.generation_tokens == 4
    assert not list(folder.rglob("*.safetensors"))


def test_short_prompts_make_no_files(tiny_folder: Path, folder: Path) -> None:
    load(tiny_folder, cache=CacheOptions(folder=folder)).ask("Hi", sampling=SHORT)
    assert files(folder) == []


def test_what_a_killed_run_leaves_is_not_read_and_goes(tiny_folder: Path, folder: Path) -> None:
    run(tiny_folder, folder)
    part = files(folder)[0].with_name(f".{'ab' * 8}.part.safetensors")
    part.write_bytes(b"half a file")
    run(tiny_folder, folder, picture=OTHER)  # without a warning
    assert part.exists()  # it may be another run's, which is writing it now
    os.utime(part, (1, 1))
    run(tiny_folder, folder, "And what is it that can be seen over there, on the left?", PICTURE)
    run(tiny_folder, folder, picture=Image.new("RGB", (64, 48)))
    assert not part.exists()


def test_only_files_of_the_cache_are_removed(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    own = folder / OWN_FOLDER
    run(tiny_folder, folder)
    [first] = files(folder)
    name = first.name
    foreign = [
        folder / "my-model" / "model.safetensors",
        folder / "model.safetensors",
        folder / name,
        folder / "my-model" / name,
        own / "model.safetensors",
        own / "sub" / name,
        own / name.replace("prefix", "suffix"),
        own / name[:-13],
        own / f".{'ab' * 8}.part.mine.txt",
        own / ".mine.part",
        own / name.replace(name[-40:-12], "0" * 28),  # its name, and not its header
        own / name.replace(name[7:23], "0" * 16),  # its name and header, of another checkpoint
    ]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"of the user" * 100_000)
    foreign[-1].write_bytes(first.read_bytes())
    whole = Path(shutil.copy(first, tmp_path / "whole"))
    (own / f"{name[:-44]}{'1' * 32}.safetensors").symlink_to(whole)
    (own / f".{'cd' * 8}.part").symlink_to(foreign[0])
    (own / f"{name[:-44]}{'2' * 32}.safetensors").mkdir()
    for path in sorted(folder.rglob("*")):
        os.utime(path, (1, 1))
    before = {path for path in folder.rglob("*") if path != first}
    options = CacheOptions(folder=folder, folder_bytes=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SmolVLMWarning)  # of the file without its header
        load(tiny_folder, cache=options).ask("And?", images=[OTHER], sampling=SHORT)
    assert not first.exists()
    assert {path for path in folder.rglob("*") if path in before} == before
    assert foreign[0].read_bytes().startswith(b"of the user")


def test_links_in_the_cache_are_not_followed(tiny_folder: Path, folder: Path) -> None:
    run(tiny_folder, folder)
    mine, own = folder / "mine", folder / OWN_FOLDER
    mine.write_text("mine")
    tag = (own / "CACHEDIR.TAG").read_bytes()
    for name in ("checkpoints.json", "CACHEDIR.TAG"):
        (own / name).unlink()
        (own / name).symlink_to(mine)
    with pytest.raises(CheckpointError, match="not a cache of mlx-smolvlm"):  # the tag is not ours
        run(tiny_folder, folder)
    (own / "CACHEDIR.TAG").unlink()
    (own / "CACHEDIR.TAG").write_bytes(tag)
    run(tiny_folder, folder)
    assert mine.read_text() == "mine"
    assert not (own / "checkpoints.json").is_symlink()


def test_the_folder_is_marked_for_backup_programs(tiny_folder: Path, folder: Path) -> None:
    run(tiny_folder, folder)
    tag = (folder / OWN_FOLDER / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    assert os.listdir(folder) == [OWN_FOLDER]
    [path] = files(folder)
    assert path.stat().st_mode & 0o077 == 0  # what was asked is its owner's


@pytest.mark.parametrize("kind", ["folder", "link", "link to a cache", "file", "dangling"])
def test_what_has_the_name_of_the_cache_is_refused(
    tiny_folder: Path, folder: Path, kind: str
) -> None:
    own, mine = folder / OWN_FOLDER, folder / "mine"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("mine")
    if kind == "folder":
        mine.rename(own)
    elif kind == "file":
        own.write_text("mine")
    elif kind == "link to a cache":
        run(tiny_folder, folder / "other")
        own.symlink_to(folder / "other" / OWN_FOLDER)
    else:
        own.symlink_to(mine if kind == "link" else folder / "none")
    with pytest.raises(CheckpointError, match=r"choose another( folder)?$"):
        run(tiny_folder, folder)
    kept = own if kind == "folder" else mine
    assert os.listdir(kept) == ["thesis.txt"]
    assert not (folder / "none").exists()


def test_a_cache_that_is_removed_meanwhile_is_made_again(tiny_folder: Path, folder: Path) -> None:
    vlm = load(tiny_folder, cache=CacheOptions(folder=folder))
    shutil.rmtree(folder)
    vlm.ask("What?", images=[PICTURE], sampling=SHORT)
    assert len(files(folder)) == 1
    assert run(tiny_folder, folder).encoded_tiles == 0


@pytest.mark.parametrize("memo", ["5", "[]", "[" * 100_000, '{"FOLDER": [STAMP, "../../../x"]}'])
def test_remembered_digests_are_not_trusted(tiny_folder: Path, tmp_path: Path, memo: str) -> None:
    path = tmp_path / "checkpoints.json"
    digest = digest_checkpoint(tiny_folder, path)
    stamp = json.dumps(json.loads(path.read_text())[str(tiny_folder.resolve())][0])
    path.write_text(memo.replace("FOLDER", str(tiny_folder.resolve())).replace("STAMP", stamp))
    assert digest_checkpoint(tiny_folder, path) == digest


def test_hidden_files_are_no_part_of_a_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(tiny_folder, tmp_path / "twin"))
    (twin / ".last-used").touch()
    assert digest_checkpoint(twin) == digest_checkpoint(tiny_folder)
