"""Records what the stages of a transformers model give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def recorded(model: Any) -> Iterator[dict[str, Any]]:
    """A dict that fills, while `model` runs, with the outputs of the stages by name."""
    inner, seen = model.model, {}
    modules = {
        "patch embedding": inner.vision_model.embeddings,
        "post_layernorm": inner.vision_model.post_layernorm,
        "connector": inner.connector,
        "norm": inner.text_model.norm,
    }
    for number, layer in enumerate(inner.vision_model.encoder.layers):
        modules[f"encoder layer {number}"] = layer
    for number, layer in enumerate(inner.text_model.layers):
        modules[f"decoder layer {number}"] = layer
    hooks = []
    for name, module in modules.items():

        def keep(_module: Any, _inputs: Any, output: Any, name: str = name) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        hooks.append(module.register_forward_hook(keep))

    def keep_embeds(_module: Any, _args: Any, named: Any) -> None:
        seen["merged embeddings"] = named["inputs_embeds"]

    hooks.append(inner.text_model.register_forward_pre_hook(keep_embeds, with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
