"""Every stage of the network against transformers, through the converter, in float32.

Random models are saved in the Hugging Face layout, with processor and tokenizer,
converted, loaded, and compared from the picture to the 32nd token.
"""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

torch = pytest.importorskip("torch")

from transformers import (  # noqa: E402
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from mlx_smolvlm.convert.run import convert_checkpoint  # noqa: E402
from mlx_smolvlm.generate import prefill  # noqa: E402
from mlx_smolvlm.image import open_image, tiles  # noqa: E402
from mlx_smolvlm.sampling import Sampling  # noqa: E402
from mlx_smolvlm.smolvlm import SmolVLM, load  # noqa: E402


def load_recorder() -> ModuleType:
    path = Path(__file__).with_name("recorder.py")
    spec = importlib.util.spec_from_file_location("recorder", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


recorder = load_recorder()

PIXELS, STATES = 1e-5, 1e-4
TOKENIZER = str(Path(__file__).parents[1] / "tiny_tokenizer.json")
NEW_TOKENS = 32

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass
class Pair:
    """One random model in both libraries."""

    theirs: Any
    processor: Any
    ours: SmolVLM


@dataclass(frozen=True)
class Case:
    """What a random model looks like; the names are those of the Hugging Face configuration."""

    idefics3: bool
    vision: dict[str, int]
    text: dict[str, Any]
    scale_factor: int
    longest_edge: int


CASES = {
    # 32 x 32 patches, scale 4, three query heads a key head, as SmolVLM-256M
    "256M": Case(
        True,
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 512, "patch_size": 16},
        {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "head_dim": 32,
         "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 49280,
         "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
         "tie_word_embeddings": False},
        4, 1024,
    ),
    # 27 x 27 patches with 6 pixels over, heads of 72, scale 3, an MLP that 32 does not divide
    "SO400M": Case(
        False,
        {"hidden_size": 144, "intermediate_size": 208, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 384, "patch_size": 14},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32,
         "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 700,
         "rope_parameters": {"rope_type": "default", "rope_theta": 130000.0},
         "tie_word_embeddings": False},
        3, 768,
    ),
    # tied head, another vocabulary, scale 2
    "tied": Case(
        True,
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 1, "image_size": 64, "patch_size": 8},
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 641,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
         "tie_word_embeddings": True},
        2, 256,
    ),
}  # fmt: skip


def make_pair(case: Case, folder: Path) -> Pair:
    tokenizer = Tokenizer.from_file(TOKENIZER)
    special = {name: tokenizer.token_to_id(name) for name in ("<image>", "<end_of_utterance>")}
    make_config = Idefics3Config if case.idefics3 else SmolVLMConfig
    make_model = (
        Idefics3ForConditionalGeneration if case.idefics3 else SmolVLMForConditionalGeneration
    )
    config = make_config(
        vision_config=case.vision,
        text_config={"model_type": "llama", "rms_norm_eps": 1e-5, "pad_token_id": 0,
                     "max_position_embeddings": 4096, **case.text},
        scale_factor=case.scale_factor,
        image_token_id=special["<image>"],
        tie_word_embeddings=case.text["tie_word_embeddings"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = make_model(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.1 * torch.randn_like(value))
            else:
                fan_in = value[0].numel() if value.ndim > 1 else 100
                value.copy_(torch.randn_like(value) / fan_in**0.5)
    model.generation_config.eos_token_id = special["<end_of_utterance>"]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder / "hf")
    processor = make_processor(case, tokenizer)
    processor.save_pretrained(folder / "hf")
    convert_checkpoint(folder / "hf", folder / "ours")
    return Pair(model, processor, load(folder / "ours", dtype="float32"))


def make_processor(case: Case, tokenizer: Any) -> Any:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|im_end|>", chat_template=TEMPLATE
    )
    seq_len = (case.vision["image_size"] // case.vision["patch_size"]) ** 2 // case.scale_factor**2
    arguments = {
        "size": {"longest_edge": case.longest_edge},
        "max_image_size": {"longest_edge": case.vision["image_size"]},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    if case.idefics3:
        pictures = Idefics3ImageProcessorPil(**arguments)
        return Idefics3Processor(pictures, fast, image_seq_len=seq_len, chat_template=TEMPLATE)
    pictures = SmolVLMImageProcessorPil(**arguments)
    return IdeficsLike(pictures, fast, seq_len)


class IdeficsLike:
    """SmolVLM's picture processor behind Idefics3's prompts, which are the same.

    SmolVLM's own processor wants a video processor, and that wants torchvision.
    """

    def __init__(self, pictures: Any, tokenizer: Any, seq_len: int) -> None:
        self.pictures = pictures
        self.inner = Idefics3Processor(
            Idefics3ImageProcessorPil(**{key: getattr(pictures, key) for key in (
                "size", "max_image_size", "image_mean", "image_std")}),
            tokenizer, image_seq_len=seq_len, chat_template=TEMPLATE,
        )  # fmt: skip

    def __call__(self, **arguments: Any) -> Any:
        inputs = self.inner(**arguments)
        if arguments.get("images"):
            own = self.pictures(arguments["images"], return_tensors="pt")
            inputs["pixel_values"] = own["pixel_values"]
        return inputs

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self.inner.apply_chat_template(messages, **options)

    def save_pretrained(self, folder: Path) -> None:
        self.inner.save_pretrained(folder)


@pytest.fixture(scope="module", params=sorted(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.set_num_threads(2)
    return make_pair(CASES[request.param], tmp_path_factory.mktemp("pair"))


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of coarse and fine detail."""
    rng = np.random.default_rng(width * 7919 + height)
    small = rng.integers(0, 255, (-(-height // 8), -(-width // 8), 4), np.uint8)
    picture = Image.fromarray(small, "RGBA").resize((width, height))
    return picture.convert("RGBA").convert(mode) if mode != "RGBA" else picture


def rotated(orientation: int) -> Image.Image:
    """A JPEG that has to be turned."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    noise(90, 40).save(file, "JPEG", exif=exif, quality=95)
    return Image.open(file)


def deep() -> Image.Image:
    """A gray picture of 16 bits."""
    values = np.random.default_rng(0).integers(0, 65535, (50, 60), np.uint16)
    return Image.fromarray(values)


PICTURES = {
    "1x1": lambda: noise(1, 1),
    "1 wide": lambda: noise(1, 200),
    "1 high": lambda: noise(300, 1),
    "panorama": lambda: noise(900, 90),
    "portrait": lambda: noise(301, 517),
    "one tile": lambda: noise(512, 512),
    "two tiles": lambda: noise(1024, 512),
    "384 multiple": lambda: noise(768, 384),
    "odd": lambda: noise(333, 217),
    "larger": lambda: noise(2050, 1500),
    "square": lambda: noise(64, 64),
    "odd portrait": lambda: noise(127, 255),
    "RGBA": lambda: noise(80, 60, "RGBA"),
    "palette": lambda: noise(80, 61, "P"),
    "gray": lambda: noise(61, 80, "L"),
    "16 bits": deep,
    "CMYK": lambda: noise(70, 50, "CMYK"),
    "EXIF": lambda: rotated(6),
}


def prompt(images: int) -> list[dict[str, Any]]:
    """A conversation with pictures between texts."""
    content: list[dict[str, str]] = []
    for number in range(images):
        content += [{"type": "image"}, {"type": "text", "text": f"Picture {number + 1}. "}]
    content.append({"type": "text", "text": "What do you see?"})
    return [{"role": "user", "content": content}]


def theirs_inputs(pair: Pair, messages: list[dict[str, Any]], pictures: list[Image.Image]) -> Any:
    text = pair.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return pair.processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")


def assert_close(ours: mx.array, theirs: Any, tolerance: float, name: str) -> None:
    ours, theirs = np.array(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape, name
    difference = np.abs(ours - theirs).max()
    assert difference <= tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("name", PICTURES)
def test_pixel_values(pair: Pair, name: str) -> None:
    picture = open_image(PICTURES[name]())
    ours = tiles(picture, pair.ours.config)
    inputs = theirs_inputs(pair, prompt(1), [picture])
    pixels = inputs["pixel_values"][0].permute(0, 2, 3, 1).numpy()
    assert ours.pixel_values.shape == pixels.shape
    assert np.abs(ours.pixel_values - pixels).max() <= PIXELS
    ids = pair.ours.engine.prompt_builder.build(prompt(1), [ours.grid])
    assert ids.tolist() == inputs["input_ids"][0].tolist()


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("odd",),
        ("portrait", "RGBA"),
        ("1x1", "EXIF", "panorama"),
        ("square", "gray", "CMYK", "palette"),
    ],
    ids=lambda names: f"{len(names)} pictures",
)
def test_every_stage_and_the_answer(pair: Pair, names: tuple[str, ...]) -> None:
    pictures = [open_image(PICTURES[name]()) for name in names]
    messages = prompt(len(names))
    inputs = theirs_inputs(pair, messages, pictures)
    inputs = {key: inputs[key] for key in ("input_ids", "pixel_values") if key in inputs}
    with torch.no_grad(), recorder.recorded(pair.theirs) as seen:
        logits = pair.theirs(**inputs).logits
    model = pair.ours.model

    image_embeds = None
    if pictures:
        pixel_values = np.concatenate([tiles(p, pair.ours.config).pixel_values for p in pictures])
        x = model.vision_model.embeddings(mx.array(pixel_values))
        assert_close(x, seen["patch embedding"], STATES, "patch embedding")
        for number, layer in enumerate(model.vision_model.encoder.layers):
            x = layer(x)
            assert_close(x, seen[f"encoder layer {number}"], STATES, f"encoder layer {number}")
        x = model.vision_model.post_layernorm(x)
        assert_close(x, seen["post_layernorm"], STATES, "post_layernorm")
        image_embeds = model.connector(x)
        assert_close(image_embeds, seen["connector"], STATES, "connector")
        whole = pair.ours.encode_images(pictures)
        assert whole is not None
        assert mx.abs(whole - image_embeds).max().item() <= STATES

    input_ids = inputs["input_ids"][0].numpy()
    embeds = model.embed(input_ids, image_embeds)
    assert_close(embeds, seen["merged embeddings"], STATES, "merged embeddings")
    positions = mx.array([0] * (model.text_model.rotated_rows + model.text_model.still_rows))
    x = embeds
    for number, layer in enumerate(model.text_model.layers):
        x = layer(x, positions, None)
        assert_close(x, seen[f"decoder layer {number}"], STATES, f"decoder layer {number}")
    assert_close(model.text_model.norm(x), seen["norm"], STATES, "norm")
    assert_close(model(embeds), logits, STATES, "logits")

    with torch.no_grad():
        answer = pair.theirs.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = answer[0, input_ids.size :].tolist()
    reply = pair.ours.ask(messages, images=pictures, sampling=Sampling(max_tokens=NEW_TOKENS))
    assert reply.token_ids == expected

    # Random weights like to repeat a token, so the cache is also tried with random ones.
    forced = np.random.default_rng(0).integers(3, 600, NEW_TOKENS)
    inputs["input_ids"] = torch.tensor([[*input_ids.tolist(), *forced.tolist()]])
    with torch.no_grad():
        theirs = pair.theirs(**inputs).logits[0, input_ids.size :]
    cache = model.make_cache()
    prefill(model, embeds, cache)
    ours = mx.stack([model.step(mx.array([token_id]), cache) for token_id in forced.tolist()])
    assert_close(ours, theirs, STATES, "decoded logits")
