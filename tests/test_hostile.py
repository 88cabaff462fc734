"""Files that lie, in a source or in a folder of ours, are refused before memory is taken."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_smolvlm.checkpoint.headers import load_tensors, read_header, read_headers
from mlx_smolvlm.checkpoint.load import load_model
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import hf_folder as hf

# As they stand in a file, since some are no values of Python's.
VALUES = ["0", "-1", "1", "3", "2147483648", "16777216", "1073741824", "9" * 30, "1e308", "1e999",
          "NaN", "-Infinity", "0.5", '"64"', '""', "true", "null", "[]", "[64]", "{}", '{"a": 1}',
          "[" * 50 + "]" * 50]  # fmt: skip


def leaves(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON value, and of the objects and lists around it."""
    if path:
        yield path
    if isinstance(values, dict):
        for key in values:
            yield from leaves(values[key], (*path, key))
    elif isinstance(values, list) and values:
        yield from leaves(values[0], (*path, 0))


def with_value(text: str, path: tuple[Any, ...], value: str) -> str:
    """The JSON `text` with the raw `value` at `path`."""
    values = json.loads(text)
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "@@"
    return json.dumps(values).replace('"@@"', value)


def assert_refused_or_fine(file: Path, run: Any) -> int:
    """How many values, each at every place of `file`, make `run` raise our error; none else may."""
    text, refused = file.read_text(), 0
    mx.reset_peak_memory()
    held = mx.get_active_memory()  # by other tests
    for path in leaves(json.loads(text)):
        for value in VALUES:
            file.write_text(with_value(text, path, value))
            try:
                run()
            except CheckpointError:
                refused += 1
            except Exception as error:
                pytest.fail(f"{file.name} {path} {value[:30]}: {type(error).__name__}: {error}")
    file.write_text(text)
    assert mx.get_peak_memory() - held < 50 * 10**6
    return refused


@pytest.mark.parametrize(
    ("name", "least"), [("config.json", 400), ("preprocessor_config.json", 100),
                        ("generation_config.json", 5), ("chat_template.json", 5)],
)  # fmt: skip
def test_no_value_of_a_source_does_more_than_be_refused(tmp_path, monkeypatch, name, least):
    from mlx_smolvlm.convert import run
    from mlx_smolvlm.convert.options import ConvertOptions
    from mlx_smolvlm.convert.source import Source

    source = hf.make(tmp_path / "s")
    plan = lambda: run.plan_checkpoint(Source(source, "s"), ConvertOptions())  # noqa: E731
    assert assert_refused_or_fine(source / name, plan) > least


def test_no_value_of_our_folder_does_more_than_be_refused(tmp_path):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    assert assert_refused_or_fine(out / "config.json", lambda: load_model(out)) > 400


def test_a_picture_as_large_as_a_city_is_refused(tmp_path):
    out = convert_checkpoint(hf.make(tmp_path / "s"), tmp_path / "out")
    values = json.loads((out / "config.json").read_text())
    for part, key in (
        ("image", "longest_edge"),
        ("video", "longest_edge"),
        ("video", "max_frames"),
    ):
        changed = json.loads(json.dumps(values))
        changed[part][key] = 2**24 + 1
        hf.write_json(out / "config.json", changed)
        with pytest.raises(CheckpointError, match=f"{part}.{key}"):
            load_model(out)


def safetensors(path: Path, header: dict[str, Any], nbytes: int) -> None:
    """A file with that header and so many bytes of data."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * nbytes)


def entry(start: int, end: int) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "nbytes", "match"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "overlap or leave gaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlap or leave gaps"),
        ({"a": entry(0, 8), "b": entry(9, 12)}, 12, "overlap or leave gaps"),
        ({"a": entry(4, 8)}, 8, "overlap or leave gaps"),
        ({"a": entry(0, 8)}, 9, "1 bytes follow the last tensor"),
        ({"a": entry(0, 8)}, 7, "is cut off"),
        ({"a": {"dtype": "U8", "shape": [2**62, 8], "data_offsets": [0, 8]}}, 8, "is damaged"),
        ({"a": {"dtype": "U8", "shape": [0, 2**70], "data_offsets": [0, 0]}}, 8, "is damaged"),
        ({"a": {"dtype": "U8", "shape": [0, 2**31], "data_offsets": [0, 0]}}, 0, "is damaged"),
        ({"a": {"dtype": "U8", "shape": [1] * 9, "data_offsets": [0, 1]}}, 1, "is damaged"),
        ({"a": {"dtype": "U8", "shape": {}, "data_offsets": [0, 1]}}, 1, "is damaged"),
        ({"a": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}, 1, "is damaged"),
        ({"a": entry(0, 1), "__metadata__": {"a": 5}}, 1, "damaged safetensors header"),
        ({"a": entry(0, 1), "__metadata__": [5]}, 1, "damaged safetensors header"),
        ({"a" * 10**5: 5}, 0, "^.{,400}$"),
        ({"a": {"dtype": "U8", "shape": [8.0], "data_offsets": [0, 8]}}, 8, "is damaged"),
        ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, 1, "is damaged"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [8, 0]}}, 8, "is damaged"),
        ({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0]}}, 8, "is damaged"),
    ],
)  # fmt: skip
def test_headers_that_lie_are_refused(tmp_path, header, nbytes, match):
    safetensors(tmp_path / "x.safetensors", header, nbytes)
    with pytest.raises(CheckpointError, match=match):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": %s, "a": %s}',
        '{"a": {"shape": [9], "shape": [1], "dtype": "U8", "data_offsets": [0, 1]}}',
        '{"a": %s, "__metadata__": {"a": "1", "a": "2"}}',
        "{" * 10**5,
        b"\xff\xfe{\0}\0",
        b'{"\xed\xa0\x80": 5}',
    ],
    ids=["tensors", "shapes", "texts", "nested", "UTF-16", "surrogate"],
)
def test_headers_that_two_readers_could_take_in_two_ways_are_refused(tmp_path, text):
    data = text if isinstance(text, bytes) else text.replace("%s", json.dumps(entry(0, 1))).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + b"\0")
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        read_header(tmp_path / "x.safetensors")


def test_a_pipe_is_no_safetensors_file(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="Not a regular file"):
        read_header(tmp_path / "x.safetensors")


def test_a_type_that_mlx_does_not_have_is_named(tmp_path):
    header = {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}
    safetensors(tmp_path / "x.safetensors", header, 8)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*F64"):
        load_tensors(tmp_path / "x.safetensors")


def test_headers_that_do_not_lie_are_read(tmp_path):
    header = {"b": entry(0, 8), "a": entry(8, 9), "__metadata__": {"format": "pt"}}
    header["none"] = {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}
    safetensors(tmp_path / "x.safetensors", header, 9)
    assert set(read_header(tmp_path / "x.safetensors")) == {"a", "b", "none"}


def test_a_huge_header_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 40 * 2**30))
        file.truncate(41 * 2**30)  # sparse: no disk is used
    with pytest.raises(CheckpointError, match="has a header of 42949672960 bytes"):
        read_header(path)
    with path.open("r+b") as file:
        file.write(struct.pack("<Q", 2**63))
    with pytest.raises(CheckpointError, match="is cut off"):
        read_header(path)


NAMES = [
    *("a\0b.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", "", "./x.safetensors"),
    *(".safetensors/..", "sub\\..\\x.safetensors", "C:\\x.safetensors", "~/x.safetensors"),
    *(5, None, ["a"], {}),
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_in_an_index_leaves_the_folder(tmp_path, name):
    source = hf.make(tmp_path / "s", shards=2)
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.text_model.norm.weight"] = name
    path.write_text(json.dumps(index))
    match = r"not a file in this folder|is missing|puts it in|half a surrogate"
    with pytest.raises(CheckpointError, match=match):
        read_headers(source)


@pytest.mark.parametrize("index", [[], "x", 5, None, {"weight_map": []}, {"weight_map": {}}, {}])
def test_an_index_that_is_none_is_named(tmp_path, index):
    source = hf.make(tmp_path / "s", shards=2)
    hf.write_json(source / "model.safetensors.index.json", index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_headers(source)


@pytest.mark.parametrize("name", ["model.bin", "w.pt", "w.pth", "w.ckpt", "w.pkl", "m.gguf"])
def test_pickles_are_never_opened(tmp_path, name):
    source = hf.make(tmp_path / "s")
    (source / "model.safetensors").unlink()
    (source / name).write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    match = (
        r"no other format|GGUF" if name == "m.gguf" else "refused, ask its author for safetensors"
    )
    with pytest.raises(CheckpointError, match=match):
        convert_checkpoint(source, tmp_path / "out")
    whole = (
        "cannot be read as GGUF" if name == "m.gguf" else "is not a safetensors checkpoint, and no"
    )
    with pytest.raises(CheckpointError, match=whole):
        convert_checkpoint(source / name, tmp_path / "out")


def test_a_name_in_another_case_is_no_way_past(tmp_path):
    source = hf.make(tmp_path / "s")
    (source / "model.safetensors").rename(source / "model.BIN")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        convert_checkpoint(source, tmp_path / "out")


def test_files_that_mlx_cannot_read_are_refused_before_anything_is_written(tmp_path):
    """A tied head is compared with the embeddings early: its type must have been looked at."""
    values = hf.settings(tie_word_embeddings=True)
    tensors = hf.weights(values)
    tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"]
    source = hf.make(tmp_path / "s", values, tensors)
    path = source / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"I32"'))
    with pytest.raises(CheckpointError, match="is stored as I32"):
        convert_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
