"""Products with matrices in NumPy: of floats, and of numbers packed into 4 or 8 bits.

OpenBLAS is good at products with one row and with many rows of floats. The others are put
together here from products that it is good at (docs/decisions/cpu.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_smolvlm.model.lora import LoRAEmbedding, LoRALinear, unpack
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.runtime import count_blas_threads

BLOCK = 2**18  # numbers that are computed at a time, so that they stay in a core's cache
FEW_ROWS = 16  # up to this number of rows, a matrix is multiplied block by block
FEW_BLOCK = 32  # rows of such a block
THREADED_SIZE = 2**18  # numbers of a matrix that is divided among threads
UNPACK_BLOCK = 2**22  # numbers of a packed matrix that are unpacked at a time
UNPACK_ROWS = 4  # from this number of rows on, a packed matrix is unpacked to multiply by it

Packed = nn.QuantizedLinear | nn.QuantizedEmbedding
Function = Callable[[np.ndarray], np.ndarray]
"""Maps (..., width) to a new array (..., other width)."""


def bind_linear(module: nn.Module) -> Function:
    """Return the function that `module`, a linear layer of any kind, computes."""
    if type(module) is nn.Linear:
        bias = as_numpy(module.bias) if "bias" in module else None
        return partial(multiply, as_numpy(module.weight).T, bias)
    if type(module) is nn.QuantizedLinear:
        return partial(multiply_packed, module)
    return lambda x: as_numpy(module(mx.array(x)))


def multiply(matrix: np.ndarray, bias: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    """Return x @ matrix + bias, (..., other width), of `x` (..., width)."""
    rows = x.reshape(-1, x.shape[-1])
    product = multiply_few(matrix, rows) if 1 < len(rows) <= FEW_ROWS else rows @ matrix
    output: np.ndarray = product.reshape(*x.shape[:-1], -1)
    if bias is not None:
        output += bias
    return output


def multiply_few(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return rows @ matrix, block by block.

    OpenBLAS rearranges a large matrix before it multiplies, which takes longer than a product with
    few rows. It reads a small one as it lies, but uses one thread, so the blocks are divided among
    threads here.
    """
    weight, columns = matrix.T, np.ascontiguousarray(rows.T)
    count = len(weight) // FEW_BLOCK
    cut = count * FEW_BLOCK
    output = np.empty((len(weight), len(rows)), np.float32)
    blocks = weight[:cut].reshape(count, FEW_BLOCK, weight.shape[1])
    target = output[:cut].reshape(count, FEW_BLOCK, len(rows))
    share_rows(count, weight.size, lambda part: np.matmul(blocks[part], columns, target[part]))
    output[cut:] = weight[cut:] @ columns
    return np.ascontiguousarray(output.T)


def share_rows(count: int, size: int, compute: Callable[[slice], object]) -> None:
    """Call `compute` for all of `count` rows, in parts, each in a thread of its own.

    Args:
        count: Number of rows.
        size: Numbers of the matrix; a small one is computed in this thread.
        compute: Computes a part of the rows.
    """
    threads = count_blas_threads() if size >= THREADED_SIZE else 1
    ends = [count * number // threads for number in range(threads + 1)]
    first, *others = (slice(*pair) for pair in pairwise(ends))
    jobs = []
    for part in others:
        try:
            jobs.append(get_pool().submit(compute, part))
        except RuntimeError:  # the main thread has ended, and with it all pools
            compute(part)
    compute(first)
    for job in jobs:
        job.result()


@cache
def get_pool() -> ThreadPoolExecutor:
    """Return the threads of `share_rows`."""
    return ThreadPoolExecutor(count_blas_threads() - 1, "multiply")


def multiply_packed(module: Packed, x: np.ndarray) -> np.ndarray:
    """Return the product of `x` (..., width) and the matrix of `module`, (..., other width)."""
    rows = x.reshape(-1, x.shape[-1])
    output = np.empty((len(rows), len(module.weight)), np.float32)
    if len(rows) >= UNPACK_ROWS:
        for part in split_rows(len(module.weight), x.shape[-1], UNPACK_BLOCK):
            np.matmul(rows, unpack_rows(module, part).T, out=output[:, part])
    elif module.bits in (4, 8) and module.mode == "affine":
        for row, target in zip(rows, output, strict=True):
            multiply_packed_row(module, row, target)
    else:
        output[:] = as_numpy(
            mx.quantized_matmul(
                mx.array(rows),
                module.weight,
                module.scales,
                module.get("biases"),
                transpose=True,
                group_size=module.group_size,
                bits=module.bits,
                mode=module.mode,
            )
        )
    if "bias" in module:
        output += as_numpy(module.bias)
    return output.reshape(*x.shape[:-1], -1)


def multiply_packed_row(module: Packed, x: np.ndarray, output: np.ndarray) -> None:
    """Multiply `x` (width,) by the matrix of `module`, of 4 or 8 bits, into `output`.

    The integers of a block of rows become floats, which are multiplied group by group; then the
    sums of the groups are scaled. So each packed number is read once, and scaled with its group.
    """
    assert module.biases is not None
    scales, biases = as_numpy(module.scales), as_numpy(module.biases)  # (rows, groups)
    count, groups = scales.shape
    packed = as_numpy(module.weight).view(np.uint8).reshape(count, groups, -1)
    middle = module.group_size // 2
    sums = x.reshape(groups, -1).sum(1)
    if module.bits == 4:  # the first number of a pair has the lower 4 bits
        x = x.reshape(groups, middle, 2).swapaxes(1, 2)
    columns = x.reshape(groups, -1, 1)

    def compute(part: slice) -> None:
        for rows in split_rows(part.stop - part.start, x.size):
            block = slice(part.start + rows.start, part.start + rows.stop)
            unpacked = np.empty((rows.stop - rows.start, groups, 2 * middle), np.float32)
            if module.bits == 4:
                unpacked[..., :middle] = packed[block] & 15
                unpacked[..., middle:] = packed[block] >> 4
            else:
                unpacked[:] = packed[block]
            products = (unpacked.swapaxes(0, 1) @ columns)[..., 0]  # (groups, rows of the block)
            output[block] = np.einsum("gr,rg->r", products, scales[block]) + biases[block] @ sums

    share_rows(count, count * x.size, compute)


def unpack_weights(model: Model) -> None:
    """Replace quantized and adapted layers by layers of float32 that compute the same."""
    for path, module in model.named_modules():
        if isinstance(module, (LoRALinear, LoRAEmbedding)):
            model.update_modules(tree_unflatten([(path, module.fuse())]))
    modules = model.named_modules()
    while modules:  # without a loop over the list, each packed matrix is freed in its turn
        path, module = modules.pop()
        if isinstance(module, nn.QuantizedLinear):
            model.update_modules(tree_unflatten([(path, unpack_linear(module))]))
        elif isinstance(module, nn.QuantizedEmbedding):
            model.update_modules(tree_unflatten([(path, unpack_embedding(module))]))


def unpack_linear(module: nn.QuantizedLinear) -> nn.Linear:
    """Return a linear layer with the weights of `module` in float32."""
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = mx.array(unpack_rows(module))
    if "bias" in module:
        linear.bias = module.bias
    return linear


def unpack_embedding(module: nn.QuantizedEmbedding) -> nn.Embedding:
    """Return an embedding layer with the weights of `module` in float32."""
    embedding = nn.Embedding(1, 1)
    embedding.weight = mx.array(unpack_rows(module))
    return embedding


def unpack_rows(module: Packed, rows: slice = slice(None)) -> np.ndarray:
    """Return `rows` of the weights of `module` in float32, (rows, width)."""
    if module.bits != 8 or module.mode != "affine":
        return as_numpy(unpack(module, mx.float32, rows))
    # MLX does this at a fifth of the speed.
    assert module.biases is not None
    scales, biases = as_numpy(module.scales)[rows], as_numpy(module.biases)[rows]
    packed = as_numpy(module.weight)[rows].view(np.uint8).reshape(*scales.shape, module.group_size)
    unpacked: np.ndarray = np.multiply(packed, scales[..., None], dtype=np.float32)
    unpacked += biases[..., None]
    unpacked = unpacked.reshape(len(scales), -1)
    return unpacked


def split_rows(rows: int, width: int, block: int | None = None) -> Iterator[slice]:
    """Yield slices of `rows` rows of `width` numbers, each of about `block` or `BLOCK` numbers."""
    count = max(1, (block or BLOCK) // width)
    return (slice(start, min(start + count, rows)) for start in range(0, rows, count))


def as_numpy(x: mx.array) -> np.ndarray:
    """Return a view of the memory of `x`, evaluated."""
    return np.array(x, copy=False)
