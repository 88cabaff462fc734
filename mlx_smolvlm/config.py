"""What a checkpoint states about itself, as frozen values.

`Config.from_dict` reads the `config.json` of our own format and refuses any
missing or unknown key. Hugging Face configurations are read by the converter.
A number that follows from others is a property here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mlx_smolvlm.errors import CheckpointError, shorten
from mlx_smolvlm.records import read_record, read_value

FORMAT = "mlx-smolvlm"
FORMAT_VERSION = 2

LARGEST = 2**24  # no width, vocabulary, context or picture comes near
LONGEST_SOURCE = 1000  # characters; it is part of messages

PARTS = ("text", "vision", "connector", "embeddings")
DTYPE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
DTYPES = tuple(DTYPE_BITS)


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP encoder. `image_size` and `patch_size` are in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a tile; a remainder in pixels is not read."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a tile (P)."""
        return self.patch_grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class TextConfig:
    """SmolLM2 (Llama) decoder. `max_position_embeddings` is the context in tokens."""

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
    """How a picture becomes tiles.

    `longest_edge` is the side, in pixels, that a picture is resized to before it
    is cut into tiles; `mean` and `std` are of one channel in the range 0..1.
    """

    longest_edge: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    do_image_splitting: bool


@dataclass(frozen=True)
class VideoConfig:
    """How a video becomes frames.

    `fps` frames a second are taken, `max_frames` at most; of a video that is longer than
    those, the first and last `skip_secs` seconds are left out. `longest_edge` is the side,
    in pixels, that a frame is resized to before it is squashed to a tile.
    """

    fps: float
    max_frames: int
    longest_edge: int
    skip_secs: float


@dataclass(frozen=True)
class Quantization:
    """How a weight matrix is packed: `mx.quantize`'s mode, bits and group size."""

    bits: int
    group_size: int
    mode: str


@dataclass(frozen=True)
class QuantizationConfig:
    """Quantization of each part; None is float.

    `text` holds the decoder layers, `embeddings` the token embedding and the
    output head. `overrides` names single modules by path, as pairs
    (path, Quantization or None), and wins over the part.
    """

    text: Quantization | None
    vision: Quantization | None
    connector: Quantization | None
    embeddings: Quantization | None
    overrides: tuple[tuple[str, Quantization | None], ...] = ()

    @property
    def is_quantized(self) -> bool:
        """Whether any module is."""
        usual = [getattr(self, part) for part in PARTS]
        return any(one is not None for one in (*usual, *(q for _, q in self.overrides)))

    def find(self, path: str) -> Quantization | None:
        """Quantization of the module at `path`, such as `text_model.layers.0.mlp.down_proj`."""
        for name, quantization in self.overrides:
            if name == path:
                return quantization
        quantization = getattr(self, find_part(path))
        return quantization if isinstance(quantization, Quantization) else None


def find_part(path: str) -> str:
    """Which of `PARTS` the module or tensor at `path` belongs to."""
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
    """Everything that `config.json` states.

    `source` says where the weights came from (a hub id or a folder's name);
    `eos_token_ids` end an answer; `dtype` is the type of the weights that are
    not quantized.
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
        """Tokens of a tile in the prompt (I)."""
        return self.vision.num_patches // self.scale_factor**2

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.vision.image_size

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Configuration in `values`, the parsed `config.json` of our format.

        Raises:
            CheckpointError: Another format or version, a key missing or unknown,
                or a value that no model can have.
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
        """The configuration in `values`, in which overrides are an object instead of pairs.

        Raises:
            ValueError: A key is missing or unknown, or a value of the wrong type.
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
        """Refuse sizes that no model can have.

        Raises:
            CheckpointError: It names the key and the value.
        """
        for prefix, part in (("vision", self.vision), ("text", self.text)):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                most = LARGEST if field.type == "int" else 2**31
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
            (len(self.source) <= LONGEST_SOURCE, f"source has {len(self.source)} characters"),
            (self.dtype in DTYPES, f"dtype {shorten(self.dtype)} is none of {', '.join(DTYPES)}"),
            (
                0 < image.longest_edge <= LARGEST,
                f"image.longest_edge is {image.longest_edge}; it must be from 1 to {LARGEST}",
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
                        0 < value <= LARGEST
                        for value in (video.fps, video.max_frames, video.longest_edge)
                    )
                    and 0 <= video.skip_secs < math.inf
                ),
                f"video.fps, video.max_frames and video.longest_edge must be above 0 and at most "
                f"{LARGEST}, and video.skip_secs at least 0",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise CheckpointError(f"config: {message}")
