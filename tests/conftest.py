"""Fixtures that several test files share."""

import atexit
import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx_smolvlm  # noqa: F401  (before mlx.core, so that it loads OpenBLAS)

# isort: split
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_smolvlm.config import (
    Config,
    ImageConfig,
    QuantizationConfig,
    TextConfig,
    VideoConfig,
    VisionConfig,
)
from mlx_smolvlm.convert.hub import DEMO, resolve
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.model.text import TextModel
from mlx_smolvlm.prompt.builder import PromptBuilder
from mlx_smolvlm.smolvlm import SmolVLM, load, load_in_mlx

# No test, and no command that one runs, sees the models of the developer's cache.
CACHE = tempfile.mkdtemp(prefix="mlx-smolvlm-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ["MLX_SMOLVLM_CACHE"] = CACHE

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def tiny_config(layers: int = 2) -> Config:
    """A configuration that a test computes with in milliseconds."""
    return Config(
        vision=VisionConfig(64, 128, layers, 2, 32, 8, 1e-6),
        text=TextConfig(64, 96, layers, 4, 2, 16, 1e4, 1e-5, 640, 512, False),
        scale_factor=2,
        image_token_id=638,
        eos_token_ids=(639,),
        image=ImageConfig(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), True),
        video=None,
        quantization=QuantizationConfig(None, None, None, None),
        dtype="float32",
        source="tests/tiny",
    )


def randomize(model: Model, seed: int = 0) -> Model:
    """`model` with weights large enough that every layer matters."""
    key = mx.random.key(seed)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        noise = mx.random.normal(value.shape, key=own)
        if "norm" in name and name.endswith("weight"):
            weights.append((name, 1 + 0.1 * noise))
        else:
            weights.append((name, noise / (value.shape[-1] ** 0.5 if value.ndim > 1 else 10)))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """A function that makes a file or folder another user's; without root, all of them."""

    def give(path: Path) -> None:
        if os.getuid() == 0:
            os.chown(path, 12345, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)

    return give


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of this package's format, with random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    config = tiny_config()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    # 640 tokens of the recipe as it once was: a change of the recipe leaves these networks alone.
    shutil.copy(
        Path(__file__).with_name("helpers") / "tiny_tokenizer.json", folder / "tokenizer.json"
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    weights = dict(tree_flatten(randomize(Model(config), seed=1).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> SmolVLM:
    """A loaded model with random weights."""
    return load(tiny_folder)


@pytest.fixture(scope="session")
def tiny_in_mlx(tiny_folder: Path) -> SmolVLM:
    """The same model, which computes in MLX also on Linux."""
    return load_in_mlx(tiny_folder)


@pytest.fixture(scope="session", params=["tiny", "tiny_in_mlx"])
def network(request: pytest.FixtureRequest) -> Model:
    """The network of `tiny`, as it is and in MLX."""
    vlm: SmolVLM = request.getfixturevalue(request.param)
    return vlm.model


@pytest.fixture(scope="session")
def wide() -> Model:
    """A network with random weights and heads as wide as the real ones, 64; two share one."""
    config = tiny_config()
    text = replace(config.text, num_hidden_layers=3, head_dim=64, max_position_embeddings=4096)
    return randomize(Model(replace(config, text=text)))


@pytest.fixture(scope="session")
def tiny_video_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a checkpoint for videos, with a context of 1,024 tokens."""
    folder = tmp_path_factory.mktemp("tiny-video") / "model"
    shutil.copytree(tiny_folder, folder)
    config = tiny_config()
    config = replace(
        config,
        video=VideoConfig(fps=1.0, max_frames=64, longest_edge=32, skip_secs=1.0),
        text=replace(config.text, max_position_embeddings=1024),
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.fixture(scope="session")
def tiny_video(tiny_video_folder: Path) -> SmolVLM:
    """A loaded model for videos with random weights."""
    return load(tiny_video_folder)


@pytest.fixture(scope="session")
def demo_builder() -> PromptBuilder:
    """Prompts of the recipe."""
    from demo_recipe.run import load_builder

    return load_builder(resolve(DEMO))


@pytest.fixture
def file_limit() -> Iterator[Callable[[int], None]]:
    """Bounds the bytes of every file that is written from then on, as a full disk would.

    The system refuses what is more with "File too large".
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def fed(tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of tokens of each forward pass of the decoder."""
    counts: list[int] = []
    decoder = type(tiny.model.text_model)
    forward = decoder.__call__

    def counting(self: TextModel, inputs_embeds: mx.array, *others: object) -> mx.array:
        counts.append(inputs_embeds.shape[1])
        return forward(self, inputs_embeds, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "__call__", counting)
    return counts
