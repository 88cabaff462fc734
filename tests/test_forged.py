"""Saved conversations and cache files whose headers were forged: refused, or harmless."""

import contextlib
import copy
import json
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_smolvlm import (
    CacheOptions,
    CheckpointError,
    ContextError,
    Conversation,
    Sampling,
    SmolVLM,
    SmolVLMWarning,
    Video,
    load,
)
from mlx_smolvlm.conversation import KIND
from mlx_smolvlm.reuse.disk import OWN_FOLDER, read_state_file, write_state_file

SHORT = Sampling(max_tokens=2)
PICTURE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
FRAMES = np.random.default_rng(1).integers(0, 255, (3, 32, 32, 3), np.uint8)
VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 3, 640, 2**31, 2**63, -(2**70), 10**400, 1.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "\ud800", "video", "image", "user", "9" * 5000),
    *([], [[]], [0, 0, 0], [-1, 2], [10**9, 10**9], {}, {"type": "text"}, {"type": "video"}),
]


def unpack(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header of a file, our values in it, and the data."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["mlx-smolvlm"]), data[8 + length :]


def pack(path: Path, header: dict[str, Any], own: Any, data: bytes) -> None:
    """Write a file of these."""
    text = json.dumps({**header, "__metadata__": {"mlx-smolvlm": json.dumps(own)}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def places(values: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `values` with every key or index in it."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in list(items):
        yield values, key
        if isinstance(value, (dict, list)) and value:
            yield from places(value)


def forge(values: Any, chance: random.Random) -> None:
    """Change one to three places in `values`: another value, one that stands elsewhere, none."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        found = [*places(values)]
        near = [one for one in found if not (isinstance(one[1], int) and one[1] > 4)]
        if not near:
            return
        holder, key = chance.choice(near)
        kind = chance.random()
        if kind < 0.7:
            holder[key] = copy.deepcopy(chance.choice(VALUES))
        elif kind < 0.8:
            holder[key] = copy.deepcopy(chance.choice(found)[0])
        elif kind < 0.9 and isinstance(holder, list):
            holder.append(copy.deepcopy(chance.choice(VALUES)))
        else:
            del holder[key]


@pytest.fixture(scope="module")
def saved(tiny_video: SmolVLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "chat"
    chat = tiny_video.chat(system="Brief.", sampling=SHORT)
    chat.ask("What?", images=[PICTURE], videos=[Video(FRAMES, source_fps=1.0)])
    chat.ask("And?")
    chat.save(path)
    return path


def use(chat: Conversation) -> None:
    """All that a session does with a conversation that was loaded."""
    assert chat.context_used >= 0
    assert isinstance(chat.messages, list)
    chat.fork().undo()
    chat.ask("And now?")


def check(path: Path, vlm: SmolVLM) -> bool:
    """Whether the conversation at `path` is taken; then it can be used."""
    chat = vlm.chat(sampling=SHORT)
    try:
        chat.load(path)
    except CheckpointError:
        return False
    with contextlib.suppress(ContextError):  # a long one is as good as any
        use(chat)
    return True


@pytest.mark.parametrize("seed", range(5))
def test_a_forged_conversation_is_refused(
    saved: Path, tiny_video: SmolVLM, tmp_path: Path, seed: int
) -> None:
    chance, path = random.Random(seed), tmp_path / "chat"
    header, own, data = unpack(saved)
    pack(path, header, own, data)
    assert check(path, tiny_video)
    taken = 0
    for _ in range(100):
        tensors, values = copy.deepcopy(header), copy.deepcopy(own)
        forge(values["values"] if chance.random() < 0.8 else tensors, chance)
        pack(path, tensors, values, data)
        taken += check(path, tiny_video)
    assert taken < 20  # what cannot matter, such as another digest


def change(name: str, to: Any) -> Callable[[dict[str, Any]], None]:
    """Sets the value at a dotted `name`."""

    def apply(values: dict[str, Any]) -> None:
        holder: Any = values
        *path, last = [int(key) if key.isdigit() else key for key in name.split(".")]
        for key in path:
            holder = holder[key]
        holder[last] = to

    return apply


@pytest.mark.parametrize(
    ("name", "to"),
    [
        ("turns", None),
        ("turns", {"a": 1}),
        ("turns.0", []),
        ("turns.0.answer", 5),
        ("turns.0.answer", "\ud800"),
        ("turns.0.question", "What?"),
        ("turns.0.question.role", "assistant"),
        ("turns.0.question.content", []),
        ("turns.0.question.content.0.type", "text"),
        ("turns.0.question.content.2.text", 5),
        ("turns.0.media", []),
        ("turns.0.media.0.kind", "video"),
        ("turns.0.media.0.tensor", "layer.0"),
        ("turns.0.media.0.grid", [0, 4]),
        ("turns.0.media.0.grid", [-1, -4]),
        ("turns.0.media.0.grid", [2.0, 2.0]),
        ("turns.0.media.0.grid", [10**30, 10**30]),
        ("turns.0.media.1.timestamps_s", [0, 1, float("nan")]),
        ("turns.0.media.1.timestamps_s", []),
        ("turns.0.media.1.duration_s", -1e308),
        ("turns.0.media.1.duration_s", float("inf")),
        ("system", ["Brief."]),
        ("content", []),
        ("content.ids", None),
        ("content.ids.3", -1),
        ("content.ids.3", 640),
        ("content.ids.3", 2**31),
        ("content.ids.3", 1.0),
        ("content.ids.3", True),
        ("content.spans.0", [-5, 10, "x"]),
        ("content.spans.0", [10, 10, "x"]),
        ("content.spans.0", [10, 10**6, "x"]),
        ("content.spans.0", [0, 500, "x"]),
        ("content.spans.0", [10, 12, 5]),
        ("content.spans.0", [10, 12]),
    ],
)
def test_values_that_no_conversation_has(
    saved: Path, tiny_video: SmolVLM, tmp_path: Path, name: str, to: Any
) -> None:
    header, own, data = unpack(saved)
    change(name, to)(own["values"])
    pack(tmp_path / "chat", header, own, data)
    with pytest.raises(CheckpointError):
        tiny_video.chat().load(tmp_path / "chat")


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F32", [], 4),
        ("F64", [1], 8),
        ("F8_E4M3", [8], 8),
        ("F32", [0, 2**31], 0),
        ("F32", [10**400, 0], 0),
        ("F32", [1] * 200 + [2], 8),  # NumPy aborts the process
    ],
)
def test_tensors_that_no_conversation_has(
    saved: Path, tiny_video: SmolVLM, tmp_path: Path, dtype: str, shape: list[int], nbytes: int
) -> None:
    header, own, _ = unpack(saved)
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    header = {"x": entry, "__metadata__": header["__metadata__"]}
    pack(tmp_path / "chat", header, own, b"\0" * nbytes)
    with pytest.raises(CheckpointError):
        tiny_video.chat().load(tmp_path / "chat")


@pytest.mark.parametrize("to", [mx.int32, mx.bool_, mx.complex64])
@pytest.mark.parametrize("name", ["media.0", "layer.0"])
def test_tensors_of_another_type(
    saved: Path, tiny_video: SmolVLM, tmp_path: Path, name: str, to: mx.Dtype
) -> None:
    digest = tiny_video.engine.checkpoint_digest
    tensors, values = read_state_file(saved, KIND, digest)
    write_state_file(
        tmp_path / "chat", KIND, digest, {**tensors, name: tensors[name].astype(to)}, values
    )
    with pytest.raises(CheckpointError):
        tiny_video.chat().load(tmp_path / "chat")


@pytest.mark.parametrize("seed", range(2))
def test_a_forged_cache_file_does_no_harm(
    tiny_folder: Path, tiny: SmolVLM, tmp_path: Path, seed: int
) -> None:
    vlm = load(tiny_folder, cache=CacheOptions(folder=tmp_path, memory_bytes=0))
    vlm.ask("What?", images=[PICTURE], sampling=SHORT)
    [path] = (tmp_path / OWN_FOLDER).glob("*.safetensors")
    header, own, data = unpack(path)
    chance = random.Random(seed)
    for _ in range(60):
        tensors, values = copy.deepcopy(header), copy.deepcopy(own)
        forge(chance.choice([tensors, values, values["values"], values["values"]]), chance)
        for other in path.parent.glob("*.safetensors"):
            other.unlink()
        pack(path, tensors, values, data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SmolVLMWarning)
            vlm.ask("And this?", images=[PICTURE], sampling=SHORT)
