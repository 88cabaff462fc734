"""GGUF files: what is read equals what MLX reads, and no damaged file does more than be refused."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm.convert import gguf_file
from mlx_smolvlm.convert.gguf import _reorder_rows, unpack_gguf
from mlx_smolvlm.convert.gguf_file import decode_tensor, open_gguf
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.convert.source import open_source
from mlx_smolvlm.errors import CheckpointError
from tests.helpers import gguf_cases as cases


def read(path: Path) -> dict[str, mx.array]:
    """The arrays of the file at `path`, named as `mx.load` names them."""
    arrays = {}
    with open_gguf(path) as file:
        for name, info in file.tensors.items():
            for suffix, array in decode_tensor(info.type, info.shape, file.read(info)).items():
                arrays[f"{name.removesuffix('weight')}{suffix}"] = array
    return arrays


def data_of(array: mx.array) -> bytes:
    """Its bytes, every nan the same: a nan's bits are nobody's business."""
    values = np.array(array)
    if values.dtype.kind == "f":
        values[np.isnan(values)] = np.nan
    return values.tobytes()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q6_K"])
def test_arrays_are_those_that_mlx_reads(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    count = 33 * 512 // cases.TYPES[kind][1] * cases.TYPES[kind][2]
    tensor = ("a.weight", kind, (33, 512), rng.integers(0, 256, count, np.uint8).tobytes())
    other = cases.tensor("b.weight", "F32", (7,), rng)
    path = tmp_path / "m.gguf"
    path.write_bytes(cases.gguf([], [tensor, other]))
    expected: Any = mx.load(str(path), format="gguf")
    got = read(path)
    assert got.keys() == expected.keys()
    for name, array in got.items():
        assert (array.dtype, array.shape) == (expected[name].dtype, expected[name].shape)
        assert data_of(array) == data_of(expected[name])


def q4_k(block: bytes) -> list[float]:
    """A block as the C code of ggml unpacks it, which MLX 0.32 does not do."""
    d, least = np.frombuffer(block[:4], np.float16).astype(np.float32)
    packed, numbers, result = block[4:16], block[16:], []
    for group in range(8):
        if group < 4:
            scale, low = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            low = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        for byte in numbers[group // 2 * 32 : group // 2 * 32 + 32]:
            number = byte >> 4 if group % 2 else byte & 15
            result.append(np.float16(d * scale * number - least * low))
    return result


def test_q4_k_and_bf16(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = bytearray(rng.integers(0, 256, 3 * 144, np.uint8).tobytes())
    for start in range(0, len(data), 144):
        data[start : start + 4] = np.array([0.03, 0.01], np.float16).tobytes()
    expected = [q4_k(bytes(data[start : start + 144])) for start in range(0, len(data), 144)]
    got = decode_tensor("Q4_K", (3, 256), bytes(data))["weight"]
    np.testing.assert_array_equal(np.array(got), np.array(expected))
    floats = mx.array(rng.normal(size=(4, 8)).astype(np.float32)).astype(mx.bfloat16)
    stored = np.array(floats.view(mx.uint16)).tobytes()
    assert mx.array_equal(decode_tensor("BF16", (4, 8), stored)["weight"], floats).item()


def test_rows_that_llama_cpp_pairs_are_half_a_head_apart(tmp_path: Path) -> None:
    rows = mx.arange(16).reshape(8, 2)  # two heads of four rows, two numbers each
    turned = _reorder_rows(tmp_path, "q", rows, 2)
    assert turned[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]
    assert turned[:, 1].tolist() == [1, 5, 3, 7, 9, 13, 11, 15]


def test_metadata_of_every_type(tmp_path: Path) -> None:
    entries = [(f"n{kind}", kind, 1) for kind in cases.LETTERS]
    entries += [(f"a{kind}", 9, (kind, [1, 0, 1])) for kind in cases.LETTERS]
    entries += [("text", 8, "é\n"), ("texts", 9, (8, ["", "b"])), ("none", 9, (4, []))]
    path = tmp_path / "m.gguf"
    path.write_bytes(cases.gguf(entries, []))
    with open_gguf(path) as file:
        metadata = file.metadata
    for kind in cases.LETTERS:
        assert metadata[f"n{kind}"] == 1
        assert metadata[f"a{kind}"].tolist() == [1, 0, 1]
    assert (metadata["n7"], type(metadata["n6"]), type(metadata["n4"])) == (True, float, int)
    assert (metadata["text"], metadata["texts"]) == ("é\n", ["", "b"])
    assert metadata["none"].tolist() == []


def test_no_native_reader_sees_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("mx.load was called")

    path = cases.write_model(tmp_path / "m.gguf")
    monkeypatch.setattr(mx, "load", load)
    (tmp_path / "out").mkdir()
    unpack_gguf(path, tmp_path / "out")


TENSOR = ("t", "F32", (8,), b"\0" * 32)
ENTRIES = 16  # where the number of metadata entries stands


def patched(data: bytes, at: int, number: int, size: int = 8) -> bytes:
    return data[:at] + number.to_bytes(size, "little") + data[at + size :]


def lies() -> dict[str, tuple[bytes, str]]:
    """Files that are not what they state, and what is said of each."""
    entry = ("key", 4, 1)
    whole = cases.gguf([entry], [TENSOR])
    kind = whole.index(b"key") + 3
    name = whole.index(cases.string("t"), kind)
    count = name + 9
    texts = cases.gguf([("key", 9, (8, ["a"]))], [])
    inner = texts.index(b"key") + 7
    other = ("u", "F32", (8,), b"\0" * 32)
    return {
        "entries": (patched(whole, ENTRIES, 10**9), "states 1,000,000,000 metadata entries"),
        "tensors": (patched(whole, 8, 2**64 - 1), "states 18,446,744,073,709,551,615 tensors"),
        "magic": (b"GGML" + whole[4:], "does not begin with 'GGUF'"),
        "version": (patched(whole, 4, 1, 4), "its version is 1"),
        "big-endian": (patched(whole, 4, 3 << 24, 4), "its version is 50331648"),
        "key": (patched(whole, 24, 2**63), "a text of 9,223,372,036,854,775,808 bytes"),
        "type": (patched(whole, kind, 13, 4), "a value of type 13"),
        "name": (patched(whole, name, 2**40), "a text of 1,099,511,627,776 bytes"),
        "dimensions": (patched(whole, count, 5, 4), "'t' has 5 dimensions"),
        "no dimensions": (patched(whole, count, 0, 4), "'t' has 0 dimensions"),
        "side": (patched(whole, count + 4, 2**62), "'t' has the dimensions"),
        "empty": (patched(whole, count + 4, 0), "'t' has the dimensions"),
        "longer": (patched(whole, count + 4, 16), "'t' ends at byte 160 of 128"),
        "tensor type": (patched(whole, count + 12, 13, 4), "'t' is of type Q5_K; F32, F16, Q4_0"),
        "unknown type": (patched(whole, count + 12, 999, 4), "of type number 999"),
        "offset": (patched(whole, count + 16, 32), "overlap or leave gaps at 't'"),
        "unaligned": (patched(whole, count + 16, 1), "overlap or leave gaps at 't'"),
        "offset, far": (patched(whole, count + 16, 2**64 - 32), "overlap or leave gaps"),
        "cut": (whole[:-1], "'t' ends at byte"),
        "header cut": (whole[:40], "cut off or damaged"),
        "array": (patched(texts, inner, 9, 4), "an array of type 9"),
        "texts": (patched(texts, inner + 4, 10**9), "more than 2,097,152 texts"),
        "texts, few": (patched(texts, inner + 4, 2), "cut off or damaged|is not UTF-8"),
        "not UTF-8": (cases.gguf([("key", 8, b"\xff")], []), "is not UTF-8"),
        "surrogate": (cases.gguf([("key", 8, b"\xed\xa0\x80")], []), "is not UTF-8"),
        "same key": (cases.gguf([entry, entry], []), "'key' twice"),
        "same tensor": (cases.gguf([], [TENSOR, TENSOR]), "the tensor 't' twice"),
        "overlap": (
            cases.gguf([], [TENSOR, other]).replace(b"\x20" + b"\0" * 7, b"\0" * 8),
            "overlap or leave gaps",
        ),
        "alignment": (cases.gguf([("general.alignment", 4, 48)], []), "its alignment is 48"),
        "block": (cases.gguf([], [("t", "Q4_0", (31,), b"\0" * 18)]), "dimensions .31., type Q4_0"),
    }


@pytest.mark.parametrize("name", lies())
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    data, reason = lies()[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"m\.gguf cannot be read as GGUF: .*{reason}"):
        convert_checkpoint(path, tmp_path / "out")


def test_a_large_header_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "LARGEST_HEADER", 100)
    path = tmp_path / "m.gguf"
    path.write_bytes(cases.gguf([("key", 9, (0, [0] * 200))], []))
    with pytest.raises(CheckpointError, match="its header is larger than 100 bytes"):
        convert_checkpoint(path, tmp_path / "out")


def test_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    path = cases.write_model(tmp_path / "m.gguf")
    with open_gguf(path) as file:
        os.truncate(path, 20_000)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            file.read(file.tensors["output_norm.weight"])


def changed(key: str, content: Any) -> bytes:
    """The small model with another value of the same type under `key`."""
    entries = [(k, kind, content if k == key else v) for k, kind, v in cases.model_entries()]
    return bytes(cases.gguf(entries, cases.model_tensors()))


TOKENS = next(v[1] for k, _, v in cases.model_entries() if k.endswith("tokens"))


@pytest.mark.parametrize(
    ("key", "content", "reason"),
    [
        ("llama.embedding_length", 2**31, "no usable llama.embedding_length .2147483648."),
        ("llama.embedding_length", 2**23, "state a width of 8388608"),
        ("llama.block_count", 2**23, "more layers than there are tensors"),
        ("llama.attention.head_count", 0, "no usable llama.attention.head_count"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "no usable .*epsilon .nan."),
        ("llama.rope.dimension_count", 32, "rope rotates 32 of 64"),
        ("general.architecture", "a" * 10**5, "is a 'a+.{,60} model"),
        ("tokenizer.ggml.pre", "\n" * 10**5, "has a tokenizer of kind 'gpt2'"),
        ("tokenizer.ggml.eos_token_id", 10**9, "the end token is 1000000000"),
        ("tokenizer.ggml.tokens", (8, TOKENS[:-1]), "tokenizer is damaged"),
        ("tokenizer.ggml.tokens", (8, [*TOKENS[:-1], "a"]), "different texts"),
        ("tokenizer.ggml.merges", (8, ["t h e"]), "tokenizer is damaged"),
        ("tokenizer.ggml.merges", (8, ["nothing here"]), "tokenizer is damaged"),
        ("tokenizer.ggml.token_type", (5, [1]), "tokenizer is damaged"),
    ],
)
def test_metadata_that_no_model_has(key: str, content: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(changed(key, content))
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    with pytest.raises(CheckpointError, match=reason) as caught:
        convert_checkpoint(path, tmp_path / "out")
    assert len(str(caught.value).removeprefix(str(path))) < 500
    assert mx.get_peak_memory() - held < 10 * 10**6


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("chat_template.jinja", b"\xff", "is not UTF-8 text"),
        ("tokenizer.json", b"{}", "damaged added_tokens"),
        ("tokenizer.json", b'{"added_tokens": [{"id": "1"}]}', "damaged added_tokens"),
        ("tokenizer.json", b'{"added_tokens": 5}', "damaged added_tokens"),
    ],
)
def test_files_beside_it_that_are_damaged(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    path = cases.write_model(tmp_path / "m.gguf")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        convert_checkpoint(path, tmp_path / "out")


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """`data` with a bit, a number or some bytes changed, or cut; mostly within the header."""
    header, result = 6500, bytearray(data)
    how = rng.integers(4)
    if how == 0:
        for at in rng.integers(0, header, rng.integers(1, 5)):
            result[at] ^= 1 << rng.integers(8)
    elif how == 1:
        at, size = int(rng.integers(header)), int(rng.choice([4, 8]))
        number = int(rng.choice([0, 1, 31, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**62]))
        result[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
    elif how == 2:
        for at in rng.integers(0, len(data), rng.integers(1, 200)):
            result[at] = rng.integers(256)
    else:
        result = result[: rng.integers(len(data))]
    return bytes(result)


def test_mutated_files_are_refused_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "between").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "between"))
    data = cases.write_model(tmp_path / "m.gguf").read_bytes()
    messages: list[str] = []
    for seed in range(120):
        (tmp_path / "m.gguf").write_bytes(mutated(data, np.random.default_rng(seed)))
        try:
            convert_checkpoint(tmp_path / "m.gguf", tmp_path / str(seed))
        except CheckpointError as error:
            messages.append(str(error).replace(str(tmp_path), ""))
        except Exception as error:
            pytest.fail(f"{seed}: {type(error).__name__}: {error}")
    assert 40 < len(messages) < 115
    assert max(map(len, messages)) < 500
    assert list((tmp_path / "between").iterdir()) == []


# The temporary folder


@pytest.fixture
def between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for the system's temporary directory."""
    folder = tmp_path / "between"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_what_a_killed_reader_left_goes_and_what_others_use_stays(
    tmp_path: Path, between: Path
) -> None:
    path = cases.write_model(tmp_path / "m.gguf")
    first = open_source(path)
    assert stat.S_IMODE(first.folder.stat().st_mode) == 0o700
    dead = between / f".mlx-smolvlm-{os.geteuid()}.0123abcd.partial"
    shutil.copytree(first.folder, dead)
    second = open_source(path)
    assert sorted(between.iterdir()) == sorted([first.folder, second.folder])
    del first, second
    assert list(between.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, CheckpointError])
def test_whatever_ends_the_reading_leaves_nothing(
    tmp_path: Path, between: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = cases.write_model(tmp_path / "m.gguf")

    def stop(*_: object) -> None:
        assert len(list(between.iterdir())) == 1
        raise error

    monkeypatch.setattr("mlx_smolvlm.convert.gguf._write_json", stop)
    with pytest.raises(error):
        open_source(path)
    assert list(between.iterdir()) == []


def test_no_room_to_unpack_is_one_line(
    tmp_path: Path, between: Path, file_limit: Callable[[int], None]
) -> None:
    path = cases.write_model(tmp_path / "m.gguf")
    file_limit(50_000)
    with pytest.raises(
        CheckpointError, match=r"m\.gguf cannot be unpacked .*: File too large; make"
    ):
        open_source(path)
    assert list(between.iterdir()) == []
