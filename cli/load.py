"""The model of a command: which one it is, loading it, and its name in messages."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.output import ConversionProgress, say_wrapped

if TYPE_CHECKING:
    from mlx_smolvlm import SmolVLM
    from mlx_smolvlm.cli.args import ModelOptions


def load_model(options: ModelOptions, fixed: frozenset[str] = frozenset()) -> SmolVLM:
    """Load the model of a command; a conversion shows its progress on stderr.

    Without `options.model`, that is the converted one that was used last, which is said, and else
    the demo.

    Args:
        options: Which model, and how.
        fixed: Arguments that the command has no options for: a refusal for want of memory does
            not advise to change them.

    Raises:
        CheckpointError: It cannot be found, converted or read.
    """
    from mlx_smolvlm import load

    model = options.model or choose_model(options.bits)
    progress = ConversionProgress(f"converting {model}, once")
    with contextlib.closing(progress):
        vlm = load(
            model,
            bits=options.bits,
            offline=options.offline,
            cache=options.cache,
            progress=progress,
            adapter=options.adapter,
            memory_limit=options.memory_limit,
        )
    if fixed and vlm.engine.guard is not None:
        vlm.engine.guard.fixed |= fixed
    return vlm


def choose_model(bits: int | None) -> str:
    """Return the converted model that was used last, and say which; "demo" if there is none.

    Args:
        bits: As `--bits` says. Another precision of a model of the hub is converted anew.
    """
    from mlx_smolvlm.checkpoint.load import read_config
    from mlx_smolvlm.convert.hub import DEMO, find_last_used, shorten_source
    from mlx_smolvlm.convert.source import is_hub_id

    folder = find_last_used()
    if folder is None:
        return DEMO
    config = read_config(folder)
    text = config.quantization.text
    own_bits = 16 if text is None else text.bits
    is_new = bits not in (None, own_bits) and is_hub_id(config.source)
    say_wrapped(
        f"{shorten_source(config.source)} at {bits if is_new else own_bits} bits, the model used "
        "last (-m takes another, -m demo the demo)",
        dim=True,
    )
    return config.source if is_new else str(folder)


def name_model(options: ModelOptions, vlm: SmolVLM) -> str:
    """Return the name of the model in messages: as the user gave it, else the shortest."""
    from mlx_smolvlm.convert.hub import shorten_source

    return options.model or shorten_source(vlm.config.name)


def say_what_the_demo_knows(vlm: SmolVLM) -> None:
    """Say on stderr what the demo does not know, and what to use for it, if `vlm` is the demo."""
    from mlx_smolvlm.convert.hub import describe_demo

    if vlm.config.is_demo:
        say_wrapped(describe_demo("mlx-smolvlm chat -m {}"), dim=True)
