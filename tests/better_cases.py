"""A small checkpoint to convert in better ways, and how far two models lie apart."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer

from mlx_smolvlm.convert.losses import head_of, predictions
from mlx_smolvlm.convert.observe import last_hidden, windows
from mlx_smolvlm.convert.samples import TEXTS

spec = importlib.util.spec_from_file_location("hf", Path(__file__).with_name("hf_folder.py"))
hf = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf)

TEMPLATE = (
    "{% for message in messages %}{{message['role']}}: {% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{line['text']}}{% else %}{{ '<image>' }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}Assistant:"
)
TOKENIZER = str(Path(__file__).with_name("tiny_tokenizer.json"))
HELD_OUT = " ".join(TEXTS)


def make_source(folder, **changes):
    """`folder` with a checkpoint whose weights are large enough for predictions that differ.

    `changes` are to its config.json, as `hf_folder.settings` takes them.
    """
    tokenizer = Tokenizer.from_file(TOKENIZER)
    values = hf.settings(
        image_token_id=tokenizer.token_to_id("<image>"),
        text__vocab_size=tokenizer.get_vocab_size(),
        **changes,
    )
    random = np.random.default_rng(1)
    weights = hf.weights(values)
    for name, array in weights.items():
        if array.ndim == 2:  # some rows and layers matter more than others
            spread = 1 if "norm" in name else float(random.uniform(1, 4))
            weights[name] = array * spread
        elif "norm" in name:
            weights[name] = array + (1 if name.endswith("weight") else 0)
    hf.make(folder, values, weights)
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {"eos_token_id": tokenizer.token_to_id("<end_of_utterance>")}
    hf.write_json(folder / "generation_config.json", ends)
    hf.write_json(folder / "chat_template.json", {"chat_template": TEMPLATE})
    return folder


def kl_of(plain, other):
    """KL divergence of `other` from `plain` in nats on held-out text."""
    passages = windows(plain, [HELD_OUT], 800)
    both = [mx.concatenate([last_hidden(v.model, p) for p in passages]) for v in (plain, other)]
    targets = np.concatenate([passage.targets for passage in passages])
    heads = (head_of(plain.model), head_of(other.model))
    return float(predictions(tuple(both), heads, targets).kl_nats.mean())
