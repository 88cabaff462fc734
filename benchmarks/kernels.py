"""Count the GPU kernels of a forward pass, on any machine.

    python -m benchmarks.kernels [--model demo] [--json]

On Metal each `mx.fast` call and each `mx.dequantize` is one kernel; on a CPU it is
many operations. So every such call is replaced by one node, the graph is exported with
`mx.export_to_dot`, and the nodes that are not views are counted. The count does not tell how long a
kernel takes.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_smolvlm import CacheOptions
from mlx_smolvlm.generate.batch import step_rows
from mlx_smolvlm.generate.many import RowDecoder
from mlx_smolvlm.kv.batched import BatchedKVCache
from mlx_smolvlm.model import text
from mlx_smolvlm.model.model import Model, compile_encoder
from mlx_smolvlm.smolvlm import load_in_mlx

VIEWS = {
    "AsStrided",
    "Broadcast",
    "Depends",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unflatten",
}


def _one_node(first: mx.array, *others: Any, **named: Any) -> mx.array:
    """Return one kernel of `first`'s shape that depends on all arrays and is never fused."""
    arrays = [x for x in (*others, *named.values()) if isinstance(x, mx.array)]
    return mx.depends(mx.sort(first), arrays) if arrays else mx.sort(first)


def _dequantize(w: mx.array, scales: mx.array, *others: Any, **named: Any) -> mx.array:
    """Return one kernel with the output shape of `mx.dequantize`."""
    group_size = named.get("group_size") or 64
    out = mx.zeros((*scales.shape[:-1], scales.shape[-1] * group_size), mx.float32)
    mx.eval(out)
    return _one_node(out, w, scales, *others)


@contextmanager
def make_single_nodes() -> Iterator[None]:
    """Make each `mx.fast` call inside the `with` block one node of the graph."""
    names = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
    originals = {name: getattr(mx.fast, name) for name in names}
    dequantize, normalize, rotate_step = mx.dequantize, text.normalize_step, text.rotate_step
    try:
        for name in names:
            setattr(mx.fast, name, _one_node)
        # What MLX compiled earlier would not call the functions above. A kernel of `mx.fast` is
        # never fused with others, so compiled or not makes no difference to the count.
        text.normalize_step, text.rotate_step = text.divide_by_rms, text.rotate_rows
        mx.dequantize = _dequantize
        yield
    finally:
        for name, function in originals.items():
            setattr(mx.fast, name, function)
        mx.dequantize = dequantize
        text.normalize_step, text.rotate_step = normalize, rotate_step


def count_kernels(forward: Callable[[], Any]) -> Counter[str]:
    """Count the kernels that compute the result of `forward`, by the name of the operation."""
    with make_single_nodes():
        out = forward()
    dot = io.StringIO()
    mx.export_to_dot(dot, *(out if isinstance(out, (list, tuple)) else [out]))
    nodes = re.findall(r'label ?= ?"(\w+)", shape ?= ?rectangle', dot.getvalue())
    return Counter(node for node in nodes if node not in VIEWS)


def count_decoding(model: Model, options: CacheOptions = CacheOptions()) -> Counter[str]:  # noqa: B008
    """Count the kernels of a greedy decoding step; the prompt fills a bounded cache."""
    cache = model.make_cache(options)
    prompt = mx.zeros((1, options.max_kv_tokens or 2), mx.int32)
    mx.eval(model.text_model(model.text_model.embed_tokens(prompt), cache), cache.arrays)
    token_id = mx.array([0])
    return count_kernels(
        lambda: [mx.argmax(model.step(token_id, cache), keepdims=True), *cache.arrays]
    )


def count_batch_decoding(model: Model, answers: int) -> Counter[str]:
    """Count the kernels of a greedy decoding step of several answers to one prompt."""
    cache = model.make_cache()
    mx.eval(
        model.text_model(model.text_model.embed_tokens(mx.array([[0, 0]])), cache), cache.arrays
    )
    rows, token_ids = RowDecoder(model, cache, answers), mx.array([0] * answers)

    def step() -> list[mx.array]:
        logits = rows.step(token_ids, np.arange(answers))
        return [mx.argmax(logits, axis=-1), *cache.arrays]

    return count_kernels(step)


def count_unlike_decoding(model: Model, answers: int) -> Counter[str]:
    """Count the kernels of a greedy decoding step of answers to prompts of unlike lengths."""
    rows = BatchedKVCache(len(model.text_model.layers))
    for number in range(answers):
        cache = model.make_cache()
        prompt = mx.zeros((1, 2 + number), mx.int32)
        mx.eval(model.text_model(model.text_model.embed_tokens(prompt), cache), cache.arrays)
        rows.add(cache)
    token_ids = mx.array([0] * answers)
    return count_kernels(
        lambda: [mx.argmax(step_rows(model, rows, token_ids), axis=-1), *rows.arrays]
    )


def count_encoding(model: Model, tile_size: int, count: int) -> Counter[str]:
    """Count the kernels of the encoder and the connector for `count` tiles."""
    pixel_values = mx.zeros((count, tile_size, tile_size, 3), model.dtype)
    mx.eval(pixel_values)
    encode = compile_encoder(model)
    return count_kernels(lambda: encode(pixel_values))


def make_report(model: Model, tile_size: int) -> dict[str, Any]:
    """Count the kernels of decoding and encoding, and the layers of the model."""
    step, one, many = (
        count_decoding(model),
        count_encoding(model, tile_size, 1),
        count_encoding(model, tile_size, 13),
    )
    return {
        "decoder_layers": len(model.text_model.layers),
        "decoded_token": step.total(),
        "decoded_token_packed_cache": count_decoding(model, CacheOptions(kv_bits=8)).total(),
        "decoded_tokens_of_8": count_batch_decoding(model, 8).total(),
        "decoded_tokens_of_8_unlike": count_unlike_decoding(model, 8).total(),
        "encoder_layers": len(model.vision_model.encoder.layers),
        "encoder_1_tile": one.total(),
        "encoder_13_tiles": many.total(),
        "decoded_token_by_operation": dict(step),
        "encoder_by_operation": dict(one),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the GPU kernels of a forward pass.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    vlm = load_in_mlx(options.model)
    counts = make_report(vlm.model, vlm.config.tile_size)
    if options.json:
        print(json.dumps(counts, indent=2))
        return
    for name, value in counts.items():
        print(f"{name:30} {value}")


if __name__ == "__main__":
    main()
