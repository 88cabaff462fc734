"""A small checkpoint for mixed precision, GPTQ and DWQ, and the divergence of two models."""

import mlx.core as mx
import numpy as np

from mlx_smolvlm.convert.compare.observe import (
    compare_predictions,
    compute_last_hidden,
    get_head,
    split_texts,
)
from mlx_smolvlm.convert.compare.samples import TEXTS
from tests.helpers import hf_folder as hf

HELD_OUT = " ".join(TEXTS)


def make_source(folder, **changes):
    """`folder` with a checkpoint whose weights are large enough for predictions that differ.

    `changes` are to its config.json, as `hf_folder.settings` takes them.
    """
    values = hf.askable_settings(**changes)
    random = np.random.default_rng(1)
    weights = hf.weights(values)
    for name, array in weights.items():
        if array.ndim == 2:  # some rows and layers matter more than others
            spread = 1 if "norm" in name else float(random.uniform(1, 4))
            weights[name] = array * spread
        elif "norm" in name:
            weights[name] = array + (1 if name.endswith("weight") else 0)
    return hf.make_askable(folder, values, weights)


def kl_of(plain, other):
    """Return the KL divergence of `other` from `plain` in nats on held-out text."""
    passages = split_texts(plain, [HELD_OUT], 800)
    both = [
        mx.concatenate([compute_last_hidden(v.model, p) for p in passages]) for v in (plain, other)
    ]
    targets = np.concatenate([passage.targets for passage in passages])
    heads = (get_head(plain.model), get_head(other.model))
    return float(compare_predictions(tuple(both), heads, targets).kl_nats.mean())
