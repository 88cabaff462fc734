"""The published models: their sizes, and what each of them is good at."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_smolvlm.checkpoint.headers import read_headers
from mlx_smolvlm.checkpoint.load import read_config
from mlx_smolvlm.config import (
    DEMO_FOLDER,
    DTYPE_BITS,
    Config,
    ImageConfig,
    QuantizationConfig,
    TextConfig,
    VisionConfig,
)
from mlx_smolvlm.convert.fit import PRECISIONS, choose_bits, count_weight_bytes, estimate_answer
from mlx_smolvlm.convert.options import FLOAT_BITS
from mlx_smolvlm.generate.memory_plan import Machine

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
        alias: Its name in `hub.ALIASES`, which has its hub id.
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
            source=self.alias,
        )

    @property
    def download_bytes(self) -> int:
        """Size of its weights on the hub."""
        return count_weight_bytes(self.config, FLOAT_BITS, DTYPE_BITS[self.dtype] // 8)


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
DEMO_PURPOSE = "drawn shapes, print, charts, pages"
PHOTO_MODEL = "smolvlm2-500m"  # recommended where the demo is used


@dataclass(frozen=True)
class ModelFigures:
    """What a model takes, by bits of the decoder; all but the demo's sizes are estimated.

    Attributes:
        alias: Its name.
        download_bytes: Size of its weights on the hub; 0 for the demo, which is bundled.
        disk_bytes: Size of its weights when they are converted.
        answer_bytes: Memory that an answer about a photograph takes on this machine.
        fits_bits: The most bits with which an answer takes at most half of this machine's memory;
            None if none does.
        good_at: What it is good at.
    """

    alias: str
    download_bytes: int
    disk_bytes: dict[int, int]
    answer_bytes: dict[int, int]
    fits_bits: int | None
    good_at: str


def list_figures(machine: Machine) -> list[ModelFigures]:
    """List what the demo and the published models take on `machine`."""
    weights = sum(info.nbytes for info in read_headers(DEMO_FOLDER).values())
    own = _count(read_config(DEMO_FOLDER), (FLOAT_BITS,), machine, DEMO_PURPOSE)
    figures = [replace(own, download_bytes=0, disk_bytes={FLOAT_BITS: weights})]
    for one in MODELS.values():
        figures.append(_count(one.config, PRECISIONS, machine, one.purpose))
    return figures


def _count(
    config: Config, precisions: tuple[int, ...], machine: Machine, purpose: str
) -> ModelFigures:
    """Return the figures of a model at `precisions`."""
    item_bytes, suited = DTYPE_BITS[config.dtype] // 8, choose_bits(config, machine)
    disk = {bits: count_weight_bytes(config, bits, item_bytes) for bits in precisions}
    return ModelFigures(
        alias=config.name,
        download_bytes=disk[FLOAT_BITS],
        disk_bytes=disk,
        answer_bytes={bits: estimate_answer(config, bits, machine) for bits in precisions},
        fits_bits=suited.bits if suited.suits else None,
        good_at=purpose,
    )
