"""Random models in transformers and in this package, with what both are asked about."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.smolvlm import SmolVLM, load, load_in_mlx

TOKENIZER = str(Path(__file__).with_name("tiny_tokenizer.json"))
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass
class Pair:
    """One random model in both libraries, and in ours also as MLX computes it on every system."""

    theirs: Any
    processor: Any
    ours: SmolVLM
    in_mlx: SmolVLM

    @property
    def both(self) -> tuple[SmolVLM, SmolVLM]:
        """Our two, which are alike except on Linux."""
        return self.ours, self.in_mlx


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
    ours = load(folder / "ours", dtype="float32")
    return Pair(model, processor, ours, load_in_mlx(folder / "ours", dtype="float32"))


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
