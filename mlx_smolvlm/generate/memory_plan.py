"""Estimates how much memory an answer takes, and chooses batch sizes that fit into a limit.

All numbers are bytes of resident memory of the process, on a GPU of the memory that it shares
with the CPU. The constants were measured with `python -m benchmarks.memory`, whose output shows
how far the estimates are off.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mlx_smolvlm.config import Config, TextConfig
from mlx_smolvlm.kv.cache import round_up
from mlx_smolvlm.kv.options import DEFAULT_OPTIONS, CacheOptions
from mlx_smolvlm.media.encode import TILE_BATCH
from mlx_smolvlm.model.model import PREFILL_CHUNK
from mlx_smolvlm.runtime import numpy_is_off

MB = 10**6
PROCESS_BYTES = 80 * MB  # Python, NumPy, MLX and the tokenizer, before any work
BLAS_BYTES = 40 * MB  # buffers of OpenBLAS, and memory that the allocator does not return
VIDEO_BYTES = 90 * MB  # decoder of a video of 1920 x 1080
UNPACK_BLOCK = 2**22  # numbers of a packed matrix that NumPy unpacks at a time
LARGE_PICTURE = 17  # tiles of a square picture
LEAST_CHUNK = 128  # tokens; in smaller chunks, unpacking matrices takes most of the time
CGROUPS = Path("/sys/fs/cgroup")
CACHE_SHARE = 16  # MLX keeps at most this part of a limit for reuse,
SMALL_CACHE_SHARE = 64  # or this one where NumPy computes

Backend = Literal["numpy", "mlx-cpu", "mlx-gpu"]


@dataclass(frozen=True)
class Setup:
    """How a checkpoint is computed.

    Attributes:
        config: Its configuration.
        weights: Size of the weights in memory.
        loading: What loading takes beside them: packed matrices that are unpacked.
        backend: What computes: NumPy, or MLX on the CPU or a GPU.
        item_bytes: Size of a number in the activations.
        is_packed: Whether matrices are kept packed, so that NumPy unpacks one at a time.
        cache: How keys and values are stored.
        tile_batch: Most tiles per call of the encoder.
        prefill_chunk: Most tokens of a prompt per call of the decoder.
    """

    config: Config
    weights: int
    backend: Backend
    item_bytes: int
    is_packed: bool = False
    loading: int = 0
    cache: CacheOptions = DEFAULT_OPTIONS
    tile_batch: int = TILE_BATCH
    prefill_chunk: int = PREFILL_CHUNK


@dataclass(frozen=True)
class Work:
    """What an answer consists of.

    Attributes:
        tiles: Tiles and frames to encode.
        encoded_tiles: Tiles and frames of the prompt that are encoded already.
        pixels: Pixels of all opened pictures.
        tokens: Tokens of the prompt.
        max_tokens: Most tokens of the answer.
        rows: Number of tokens whose logits are computed together.
        has_video: Whether a video is decoded.
    """

    tiles: int = 0
    encoded_tiles: int = 0
    pixels: int = 0
    tokens: int = 0
    max_tokens: int = 0
    rows: int = 1
    has_video: bool = False


@dataclass(frozen=True)
class Estimate:
    """The memory of an answer, by purpose.

    Encoding is over when the prompt is prefilled, so only the larger of both counts.

    Attributes:
        process: The process before any work.
        weights: The weights.
        features: Embeddings of the tiles.
        media: Decoded pictures, and the decoder of a video.
        encoding: Activations of a batch of tiles.
        keys_values: Keys and values of prompt and answer.
        prefill: Embeddings of the prompt and activations of a chunk.
        logits: Logits of a token, and copies for sampling.
        loading: What loading the weights takes beside them, before all else.
        reserve: Freed memory that MLX keeps for reuse.
    """

    process: int
    weights: int
    features: int
    media: int
    encoding: int
    keys_values: int
    prefill: int
    logits: int
    loading: int = 0
    reserve: int = 0

    @property
    def while_encoding(self) -> int:
        """What is in memory while tiles are encoded."""
        return self._always + self.media + self.encoding

    @property
    def while_generating(self) -> int:
        """What is in memory while the answer is generated."""
        return self._always + self.keys_values + self.prefill + self.logits

    @property
    def while_loading(self) -> int:
        """What is in memory while the weights are loaded."""
        return self.process + self.weights + self.loading

    @property
    def total(self) -> int:
        """The most that is in memory at a time."""
        return max(self.while_loading, self.while_encoding, self.while_generating)

    @property
    def _always(self) -> int:
        return self.process + self.weights + self.features + self.reserve


def estimate(setup: Setup, work: Work, limit: int | None = None) -> Estimate:
    """Estimate the memory of `work`; a `limit` also limits what MLX keeps for reuse."""
    config, item = setup.config, setup.item_bytes
    tokens = work.tokens + work.max_tokens
    all_tiles = work.tiles + work.encoded_tiles
    tile_pixels = config.tile_size**2 * 3
    media = (
        3 * (work.pixels + 2 * tile_pixels // 3 * min(work.tiles, LARGE_PICTURE))
        if work.pixels
        else 0
    )
    return Estimate(
        process=PROCESS_BYTES,
        weights=setup.weights,
        features=all_tiles * config.image_seq_len * config.text.hidden_size * item,
        media=media + (VIDEO_BYTES if work.has_video else 0),
        encoding=_estimate_encoding(setup, min(setup.tile_batch, work.tiles)),
        keys_values=count_kv_bytes(config.text, setup.cache, item, tokens),
        prefill=_estimate_prefill(setup, work.tokens, tokens),
        logits=_estimate_logits(setup, work.rows),
        loading=setup.loading,
        reserve=0 if limit is None else count_reserve(setup.backend, limit),
    )


def _estimate_encoding(setup: Setup, tiles: int) -> int:
    """Activations of `tiles` tiles that go through the encoder together."""
    if not tiles:
        return 0
    vision, item = setup.config.vision, setup.item_bytes
    patches, width, inner = vision.num_patches, vision.hidden_size, vision.intermediate_size
    pixel_values = 4 * 3 * setup.config.tile_size**2
    if setup.backend == "numpy":  # whole batch as pixels and patches, then tile by tile
        batch = tiles * (2 * pixel_values + 2 * 4 * patches * width)
        return batch + 4 * patches * (inner + 2 * width) + _count_workspace(setup, width * inner)
    per_tile = 4 * pixel_values + item * patches * (3 * inner + 2 * width)  # and the next batch
    if setup.backend == "mlx-cpu":  # attention computes all scores
        per_tile += item * vision.num_attention_heads * patches**2
    return tiles * per_tile * 11 // 10 + BLAS_BYTES


def _estimate_prefill(setup: Setup, prompt: int, tokens: int) -> int:
    """Embeddings of `prompt` tokens, and activations of a chunk that attends to `tokens`."""
    text, item = setup.config.text, setup.item_bytes
    width, inner = text.hidden_size, text.intermediate_size
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    chunk = min(setup.prefill_chunk, prompt)
    embeds = 2 * item * prompt * width
    rows = item * chunk * (4 * width + 2 * heads * text.head_dim + 2 * inner)
    scores = item * text.num_attention_heads * chunk * tokens
    if setup.backend == "numpy" and setup.cache.is_plain:  # computes scores in small blocks
        return embeds + rows + _count_workspace(setup, 2 * width * inner)
    if setup.backend == "mlx-gpu" and setup.cache.kv_bits is None:  # fused attention
        return embeds + 2 * rows
    return embeds + 2 * rows + 2 * scores + BLAS_BYTES


def _estimate_logits(setup: Setup, rows: int) -> int:
    """Logits of `rows` tokens, and copies."""
    return 4 * 4 * rows * setup.config.text.vocab_size


def _count_workspace(setup: Setup, largest_matrix: int) -> int:
    """Memory for a product in NumPy, which unpacks a packed matrix of so many numbers."""
    return BLAS_BYTES + (5 * min(largest_matrix, UNPACK_BLOCK) if setup.is_packed else 0)


def count_kv_bytes(text: TextConfig, cache: CacheOptions, item_bytes: int, tokens: int) -> int:
    """Size of the keys and values of `tokens` tokens, and of a layer that grows."""
    if cache.max_kv_tokens is not None:
        tokens = min(tokens, cache.max_kv_tokens)
    numbers = 2 * text.num_key_value_heads * text.head_dim  # of a token in a layer
    layer: float = numbers * item_bytes
    if cache.kv_bits is not None:  # with two scales in float32 at most
        layer = numbers * (cache.kv_bits / 8 + 8 / cache.kv_group_size)
    return round(layer * round_up(tokens) * (text.num_hidden_layers + 1))


def count_weights(
    config: Config, shapes: Mapping[str, tuple[str, int]], item_bytes: int
) -> tuple[int, int]:
    """Count the bytes of a checkpoint's weights in memory.

    Args:
        config: Its configuration.
        shapes: For each tensor, its safetensors type and its number of items.
        item_bytes: Size of a float in memory.

    Returns:
        The size as stored, with floats of `item_bytes`, and the size if every packed matrix is
        unpacked to float32.
    """
    stored = unpacked = 0
    for name, (dtype, items) in shapes.items():
        path, _, suffix = name.rpartition(".")
        is_float = dtype in ("F32", "F16", "BF16")
        size = items * (item_bytes if is_float else {"U8": 1}.get(dtype, 4))
        stored += size
        quantization = config.quantization.find(path)
        if suffix == "weight" and dtype == "U32" and quantization is not None:
            unpacked += 4 * (32 * items // quantization.bits)
        elif suffix not in ("scales", "biases"):
            unpacked += size
    return stored, unpacked


def plan_setup(
    setup: Setup, tensors: Mapping[str, tuple[str, int]], limit: int | None, machine: int | None
) -> Setup:
    """Complete `setup`: the size of the weights, and whether they stay packed.

    NumPy multiplies by float matrices. They are unpacked once if a long answer still fits, into
    `limit` or, without one, into half of the memory of the machine; else for each product.

    Args:
        setup: Configuration, backend, and how numbers, keys and values are stored.
        tensors: As in `count_weights`.
        limit: Most bytes of the process, or None.
        machine: Memory of the machine, or None if it is not known.
    """
    stored, unpacked = count_weights(setup.config, tensors, setup.item_bytes)
    packed = replace(setup, weights=stored, is_packed=unpacked > stored)
    if packed.is_packed and setup.backend == "numpy":
        loading = stored * 9 // 8  # allocators keep what is freed meanwhile
        whole = replace(setup, weights=unpacked, is_packed=False, loading=loading)
        context = setup.config.text.max_position_embeddings
        needed = estimate(whole, Work(LARGE_PICTURE, tokens=context), limit).total
        most = limit if limit is not None else None if machine is None else machine // 2
        if most is None or needed <= most:
            packed = whole
    return packed


def count_converted_bytes(config: Config, bits: int, item_bytes: int) -> int:
    """Estimate the size of the weights after a conversion with `--bits`.

    The decoder's layers take `bits` bits, all other matrices 8, in groups of 64.
    """
    text, vision = config.text, config.vision
    width, heads = text.hidden_size, text.num_attention_heads + 2 * text.num_key_value_heads
    layer = width * text.head_dim * (heads + text.num_attention_heads)
    decoder = text.num_hidden_layers * (layer + 3 * width * text.intermediate_size)
    size = vision.hidden_size
    encoder = vision.num_hidden_layers * size * (4 * size + 2 * vision.intermediate_size)
    connector = size * config.scale_factor**2 * width
    embeddings = text.vocab_size * width * (1 if text.tie_word_embeddings else 2)
    scales = 2 * item_bytes / 64
    return round(decoder * (bits / 8 + scales) + (encoder + connector + embeddings) * (1 + scales))


def fit_batches(setup: Setup, work: Work, limit: int | None) -> Setup:
    """Compute fewer tiles and tokens together, down to 1 and 128, until `work` fits."""
    if limit is None:
        return setup
    while setup.tile_batch > 1 and estimate(setup, work, limit).while_encoding > limit:
        setup = replace(setup, tile_batch=setup.tile_batch // 2)
    while setup.prefill_chunk > LEAST_CHUNK and (
        estimate(setup, work, limit).while_generating > limit
    ):
        setup = replace(setup, prefill_chunk=setup.prefill_chunk // 2)
    return setup


@dataclass(frozen=True)
class Machine:
    """What computes by default, and with how much memory.

    Attributes:
        backend: What computes.
        item_bytes: Size of a number in its computations.
        memory: Memory of the machine or container in bytes; None if it is not known.
    """

    backend: Backend
    item_bytes: int
    memory: int | None


def find_machine() -> Machine:
    """Describe this machine."""
    import mlx.core as mx

    if mx.default_device().type != mx.DeviceType.cpu:
        return Machine("mlx-gpu", 2, measure_machine())
    in_numpy = sys.platform == "linux" and not numpy_is_off()
    return Machine("numpy" if in_numpy else "mlx-cpu", 4, measure_machine())


def measure_machine() -> int | None:
    """Memory of this machine or container in bytes; None if the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return min([total, *_read_cgroup_limits()]) if total > 0 else None


def _read_cgroup_limits() -> Iterator[int]:
    """Limits of the container that the process runs in."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (CGROUPS / name).read_text()
        except OSError:
            continue
        if text.strip().isdigit():
            yield int(text)


def count_reserve(backend: Backend, limit: int) -> int:
    """Bytes of freed memory that MLX may keep for reuse under `limit`."""
    return limit // (SMALL_CACHE_SHARE if backend == "numpy" else CACHE_SHARE)


def limit_mlx(mx: Any, backend: Backend, limit: int) -> None:
    """Set MLX's limits for this process, so that it stays within `limit`.

    Args:
        mx: The module `mlx.core`.
        backend: What computes.
        limit: Bytes for the whole process.
    """
    own = max(limit - PROCESS_BYTES, MB)
    mx.set_memory_limit(own)
    mx.set_cache_limit(count_reserve(backend, limit))
    if mx.default_device().type == mx.DeviceType.cpu or not hasattr(mx, "set_wired_limit"):
        return
    largest = mx.device_info().get("max_recommended_working_set_size")
    if largest:
        mx.set_wired_limit(min(own, int(largest)))
