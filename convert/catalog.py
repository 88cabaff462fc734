"""The published models: their sizes, and what each of them is good at."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_smolvlm.config import (
    DTYPE_BITS,
    Config,
    ImageConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)
from mlx_smolvlm.convert.fit import count_weight_bytes
from mlx_smolvlm.convert.hub import ALIASES
from mlx_smolvlm.convert.options import FLOAT_BITS

_SMALL_VISION = VisionConfig(768, 3072, 12, 12, 512, 16, 1e-6)
_LARGE_VISION = VisionConfig(1152, 4304, 27, 16, 384, 14, 1e-6)
_VOCABULARY, _CONTEXT = 49280, 8192

# Of each size: encoder, decoder (layers, width, MLP, heads, heads of keys and values, width of a
# head, base of the rotation, ...), and how many patches along a side become one token.
SIZES: dict[str, tuple[VisionConfig, TextConfig, int]] = {
    "256m": (
        _SMALL_VISION,
        TextConfig(576, 1536, 30, 9, 3, 64, 1e5, 1e-5, _VOCABULARY, _CONTEXT, False),
        4,
    ),
    "500m": (
        _SMALL_VISION,
        TextConfig(960, 2560, 32, 15, 5, 64, 1e5, 1e-5, _VOCABULARY, _CONTEXT, False),
        4,
    ),
    "2.2b": (
        _LARGE_VISION,
        TextConfig(2048, 8192, 24, 32, 32, 64, 1.3e5, 1e-5, _VOCABULARY, _CONTEXT, False),
        3,
    ),
}


@dataclass(frozen=True)
class PublishedModel:
    """A model on the hub.

    Attributes:
        alias: Its name in `ALIASES`, which has its hub id.
        size: One of `SIZES`.
        dtype: The type in which its weights are stored.
        purpose: What it is good at, in a few words.
        text: Its decoder, if it is not that of `size`.
    """

    alias: str
    size: str
    dtype: str
    purpose: str
    text: TextConfig | None = None

    @property
    def config(self) -> Config:
        """Its configuration, with no more than what sizes and memory follow from."""
        vision, text, scale_factor = SIZES[self.size]
        half = (0.5, 0.5, 0.5)
        return Config(
            vision=vision,
            text=self.text or text,
            scale_factor=scale_factor,
            image_token_id=0,
            eos_token_ids=(0,),
            image=ImageConfig(4 * vision.image_size, half, half, True),
            video=None,
            quantization=QuantizationConfig(None, None, None, None),
            dtype=self.dtype,
            source=ALIASES[self.alias],
        )

    @property
    def download_bytes(self) -> int:
        """Size of its weights on the hub."""
        return self.count_disk_bytes(FLOAT_BITS)

    def count_disk_bytes(self, bits: int) -> int:
        """Size of its weights after a conversion to 16, 8 or 4 bits."""
        return count_weight_bytes(self.config, bits, DTYPE_BITS[self.dtype] // 8)


MODELS = {
    one.alias: one
    for one in (
        PublishedModel("smolvlm-256m", "256m", "bfloat16", "photographs; the smallest download"),
        PublishedModel("smolvlm-500m", "500m", "bfloat16", "photographs, print in them"),
        PublishedModel(
            "smolvlm-2.2b",
            "2.2b",
            "bfloat16",
            "photographs, documents, several pictures",
            replace(SIZES["2.2b"][1], vocab_size=49155, max_position_embeddings=16384),
        ),
        PublishedModel("smolvlm2-256m", "256m", "float32", "photographs, short clips"),
        PublishedModel("smolvlm2-500m", "500m", "float32", "photographs, print, clips"),
        PublishedModel("smolvlm2-2.2b", "2.2b", "float32", "photographs, documents, videos"),
        PublishedModel("smoldocling", "256m", "bfloat16", "pages to DocTags, nothing else"),
        PublishedModel(
            "granite-docling",
            "256m",
            "bfloat16",
            "pages to DocTags, nothing else",
            replace(SIZES["256m"][1], vocab_size=100352, tie_word_embeddings=True),
        ),
    )
}
PHOTO_MODEL = "smolvlm2-500m"  # recommended where the demo is used
