"""How much memory models take at 16, 8 and 4 bits, and which precision suits a machine.

All numbers are estimates, from configurations alone, before anything is downloaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mlx_smolvlm.config import Config, find_part
from mlx_smolvlm.convert.names import list_entries
from mlx_smolvlm.convert.options import FINE_BITS, FLOAT_BITS
from mlx_smolvlm.generate.memory_plan import Machine, Setup, Work, estimate
from mlx_smolvlm.generate.sampling import Sampling
from mlx_smolvlm.media.tiles import compute_grid

PRECISIONS = (FLOAT_BITS, 8, 4)  # bits of the decoder
GROUP_SIZE = 64  # weights that share a scale and a bias
PHOTO = (4032, 3024)  # width and height in pixels, 12 megapixels
QUESTION = 64  # tokens
SHARE = 2  # an answer may take this part of the memory: other programs and the system need the rest


def count_weight_bytes(config: Config, bits: int, item_bytes: int) -> int:
    """Size of the weights after a conversion with `--bits`, with floats of `item_bytes` bytes."""
    total = 0.0
    for entry in list_entries(config):
        weights = sum(map(math.prod, entry.shapes))
        item: float = item_bytes
        if entry.quantizable and bits < FLOAT_BITS:
            is_text = find_part(entry.path) == "text"
            item = (bits if is_text else FINE_BITS) / 8 + 2 * item_bytes / GROUP_SIZE
        total += weights * item
        if entry.bias:
            total += sum(shape[0] for shape in entry.shapes) * item_bytes
    return round(total)


def estimate_answer(config: Config, bits: int, machine: Machine) -> int:
    """Bytes of memory that the process takes for an answer about a photograph, tiled as trained.

    Packed weights stay packed. The result is the same for a source and for its conversions, in
    which the encoder's MLP may be padded.
    """
    item, inner = machine.item_bytes, config.vision.intermediate_size
    padded = -(-inner // GROUP_SIZE) * GROUP_SIZE
    config = replace(config, vision=replace(config.vision, intermediate_size=padded))
    weights = count_weight_bytes(config, bits, item)
    setup = Setup(config, weights, machine.backend, item, is_packed=bits < FLOAT_BITS)
    tiles = compute_grid(PHOTO, config).num_tiles
    work = Work(
        tiles=tiles,
        pixels=PHOTO[0] * PHOTO[1],
        tokens=tiles * (config.image_seq_len + 3) + QUESTION,  # with the marks of each tile
        max_tokens=Sampling().max_tokens,
    )
    return estimate(setup, work).total


@dataclass(frozen=True)
class SuitedBits:
    """The most bits that suit a machine: 16, 8 or 4.

    Attributes:
        bits: 4 if even these do not suit it.
        answer_bytes: What an answer takes with them.
        float_bytes: What it takes at 16 bits.
        suits: Whether an answer takes at most half of the machine's memory.
    """

    bits: int
    answer_bytes: int
    float_bytes: int
    suits: bool


def choose_bits(config: Config, machine: Machine) -> SuitedBits:
    """Choose the precision of a model on `machine`, whose memory may be unknown."""
    most = math.inf if machine.memory is None else machine.memory / SHARE
    sizes = {bits: estimate_answer(config, bits, machine) for bits in PRECISIONS}
    bits = next((bits for bits, size in sizes.items() if size <= most), PRECISIONS[-1])
    return SuitedBits(bits, sizes[bits], sizes[FLOAT_BITS], sizes[bits] <= most)
