"""The configuration of a checkpoint, as frozen dataclasses.

`Config.from_dict` reads the `config.json` of our own format and refuses missing and unknown
keys. The converter reads Hugging Face configurations. Derived numbers are properties here.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.records import read_record, read_value

FORMAT = "mlx-smolvlm"
FORMAT_VERSION = 2

MAX_SIZE = 2**24  # far above any real width, vocabulary, context or picture
DEMO_SOURCE = "demo_recipe"  # of the bundled demo, which demo_recipe/ trained
DEMO_FOLDER = Path(__file__).parent / "demo"
MAX_SOURCE_LENGTH = 1000  # characters of `Config.source`, which messages quote

PARTS = ("text", "vision", "connector", "embeddings")
DTYPE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
DTYPES = tuple(DTYPE_BITS)


@dataclass(frozen=True)
class VisionConfig:
    """The SigLIP vision encoder. `image_size` and `patch_size` are in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a tile; remaining pixels are ignored."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches per tile (P)."""
        return self.patch_grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TextConfig:
    """The SmolLM2 (Llama) decoder. `max_position_embeddings` is the context length in tokens."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool


@dataclass(frozen=True)
class ImageConfig:
    """How pictures are cut into tiles.

    A picture is resized so that its longer side is `longest_edge` pixels, then cut into tiles.
    `mean` and `std` normalize the channels, whose values are from 0 to 1.
    """

    longest_edge: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    do_image_splitting: bool


@dataclass(frozen=True)
class VideoConfig:
    """How frames are taken from videos.

    `fps` frames per second are taken, at most `max_frames`. If a video is too long for that,
    its first and last `skip_secs` seconds are left out. A frame is resized so that its longer
    side is `longest_edge` pixels, then to the size of a tile.
    """

    fps: float
    max_frames: int
    longest_edge: int
    skip_secs: float


@dataclass(frozen=True)
class Quantization:
    """How a weight matrix is quantized: the arguments of `mx.quantize`."""

    bits: int
    group_size: int
    mode: str


@dataclass(frozen=True)
class QuantizationConfig:
    """The quantization of each part of the model; None means float.

    `text` covers the decoder layers, `embeddings` the token embedding and the output head.
    `overrides` holds pairs (path, Quantization or None) for single modules; they take
    precedence over their part.
    """

    text: Quantization | None
    vision: Quantization | None
    connector: Quantization | None
    embeddings: Quantization | None
    overrides: tuple[tuple[str, Quantization | None], ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether any module is quantized."""
        usual = [getattr(self, part) for part in PARTS]
        return any(one is not None for one in (*usual, *(q for _, q in self.overrides)))

    def find(self, path: str) -> Quantization | None:
        """The quantization of the module at `path`, such as `text_model.layers.0.mlp.down_proj`."""
        for name, quantization in self.overrides:
            if name == path:
                return quantization
        quantization = getattr(self, find_part(path))
        return quantization if isinstance(quantization, Quantization) else None


def find_part(path: str) -> str:
    """The one of `PARTS` that the module or tensor at `path` belongs to.

    Raises:
        ValueError: The path is not one of this model.
    """
    if path.startswith(("text_model.embed_tokens", "lm_head")):
        return "embeddings"
    if path.startswith("text_model."):
        return "text"
    if path.startswith("vision_model."):
        return "vision"
    if path.startswith("connector."):
        return "connector"
    raise ValueError(f"'{path}' is not a module of this model")


@dataclass(frozen=True)
class Config:
    """The contents of `config.json`.

    `source` is where the weights came from: a hub id or the name of a folder. Any of
    `eos_token_ids` ends an answer. `dtype` is the type of the weights that are not quantized.
    """

    vision: VisionConfig
    text: TextConfig
    scale_factor: int
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    image: ImageConfig
    video: VideoConfig | None
    quantization: QuantizationConfig
    dtype: str
    source: str

    @property
    def image_seq_len(self) -> int:
        """Tokens per tile in the prompt (I)."""
        return self.vision.num_patches // self.scale_factor**2

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.vision.image_size

    @property
    def is_demo(self) -> bool:
        """Whether this is the bundled demo, or a conversion of it."""
        return self.source == DEMO_SOURCE

    @property
    def name(self) -> str:
        """The name of the model in messages: "demo", or `source`."""
        source, comma, rest = self.source.partition(",")  # of "demo_recipe, fine-tuned"
        return ("demo" if source == DEMO_SOURCE else source) + comma + rest

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Read `values`, the parsed `config.json` of our format.

        Raises:
            CheckpointError: The format or version differs, a key is missing or unknown, or a
                value is invalid.
        """
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f'config.json has no "format": "{FORMAT}"; convert the checkpoint first: '
                "mlx-smolvlm convert SOURCE DEST"
            )
        if values.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"config.json has format_version {shorten(values.get('format_version'))}, and this "
                f"version reads {FORMAT_VERSION}; convert the checkpoint again, or update "
                "mlx-smolvlm"
            )
        rest = {k: v for k, v in values.items() if k not in ("format", "format_version")}
        try:
            config = cls._read(rest)
        except ValueError as error:
            raise CheckpointError(f"config: {error}") from None
        config.check()
        return config

    @classmethod
    def _read(cls, values: dict[str, Any]) -> Config:
        """Read `values`; the file holds overrides as an object, not as pairs.

        Raises:
            ValueError: A key is missing or unknown, or a value has a wrong type.
        """
        parts = read_value(dict[str, Any], values.get("quantization"), "quantization")
        if "overrides" not in parts:
            raise ValueError("the key 'quantization.overrides' is missing")
        kind = dict[str, Quantization | None]
        overrides = read_value(kind, parts["overrides"], "quantization.overrides")
        rest = {key: value for key, value in parts.items() if key != "overrides"}
        config = read_record(cls, {**values, "quantization": rest})
        quantization = dataclasses.replace(config.quantization, overrides=tuple(overrides.items()))
        return dataclasses.replace(config, quantization=quantization)

    def to_dict(self) -> dict[str, Any]:
        """The contents of `config.json`; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        values["quantization"]["overrides"] = {
            name: quantization and dataclasses.asdict(quantization)
            for name, quantization in self.quantization.overrides
        }
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}

    def check(self) -> None:
        """Check that all values are possible.

        Raises:
            CheckpointError: A value is not; the message names the key and the value.
        """
        for prefix, part in (("vision", self.vision), ("text", self.text)):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                most = MAX_SIZE if field.type == "int" else 2**31
                if field.type in ("int", "float") and not 0 < value <= most:
                    raise CheckpointError(
                        f"config: {prefix}.{field.name} is {value}; "
                        f"it must be above 0 and at most {most}"
                    )
        vision, text, image, video = self.vision, self.text, self.image, self.video
        checks = (
            (
                vision.hidden_size % vision.num_attention_heads == 0,
                f"vision.hidden_size {vision.hidden_size} is no multiple of "
                f"vision.num_attention_heads {vision.num_attention_heads}",
            ),
            (
                text.num_attention_heads % text.num_key_value_heads == 0,
                f"text.num_attention_heads {text.num_attention_heads} is no multiple of "
                f"text.num_key_value_heads {text.num_key_value_heads}",
            ),
            (text.head_dim % 2 == 0, f"text.head_dim {text.head_dim} is odd"),
            (
                vision.patch_size <= vision.image_size,
                f"vision.patch_size {vision.patch_size} exceeds "
                f"vision.image_size {vision.image_size}",
            ),
            (
                self.scale_factor > 0 and vision.patch_grid % self.scale_factor == 0,
                f"scale_factor {self.scale_factor} does not divide the patch grid of "
                f"{vision.patch_grid}",
            ),
            (
                0 <= self.image_token_id < text.vocab_size,
                f"image_token_id {self.image_token_id} is outside the vocabulary of "
                f"{text.vocab_size}",
            ),
            (
                bool(self.eos_token_ids)
                and all(0 <= one < text.vocab_size for one in self.eos_token_ids),
                f"eos_token_ids is {shorten(self.eos_token_ids)}; it needs one or more ids "
                f"within the vocabulary of {text.vocab_size}, or no answer would end",
            ),
            (
                len(self.source) <= MAX_SOURCE_LENGTH,
                f"source has {len(self.source):,} characters; it must have at most "
                f"{MAX_SOURCE_LENGTH:,}",
            ),
            (self.dtype in DTYPES, f"dtype {shorten(self.dtype)} is none of {', '.join(DTYPES)}"),
            (
                0 < image.longest_edge <= MAX_SIZE,
                f"image.longest_edge is {image.longest_edge}; it must be from 1 to {MAX_SIZE}",
            ),
            (
                len(image.mean) == len(image.std) == 3
                and all(map(math.isfinite, image.mean + image.std))
                and 0 not in image.std,
                "image.mean and image.std need three numbers each, and no std may be 0",
            ),
            (
                video is None
                or (
                    all(
                        0 < value <= MAX_SIZE
                        for value in (video.fps, video.max_frames, video.longest_edge)
                    )
                    and 0 <= video.skip_secs < math.inf
                ),
                f"video.fps, video.max_frames and video.longest_edge must be above 0 and at most "
                f"{MAX_SIZE}, and video.skip_secs at least 0",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise CheckpointError(f"config: {message}")
