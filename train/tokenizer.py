"""The demo's tokenizer: a small byte-level BPE with the special tokens of SmolVLM.

Every text round-trips, since each byte is a token; the merges are learned from
the questions and answers that the demo is trained on.
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlx_smolvlm.train.draw import COLOR_NAMES, PLACES, SHAPES, sample_scene
from mlx_smolvlm.train.questions import ask, plural, small_talk

FIRST_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LAST_TOKENS = (
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
_TEXTS = 6000


def build_tokenizer(seed: int = 0, vocab_size: int = 640) -> Tokenizer:
    """A trained tokenizer of at most `vocab_size` tokens; the same for the same arguments.

    Ids follow SmolVLM's order: the tokens of a chat first, those of images and the
    end of an utterance last.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(LAST_TOKENS),
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.add_special_tokens(list(LAST_TOKENS))
    return tokenizer


def _texts(seed: int) -> list[str]:
    """Questions, answers and the parts of a chat, as the tokenizer meets them."""
    rng = np.random.default_rng(seed)
    texts = ["User:", "User: ", "Assistant:", "System: ", "\n", "\n\n", "\n\n"] * _TEXTS
    for _ in range(_TEXTS // 4):
        turns = [*ask(sample_scene(rng), rng, 4), small_talk(rng)]
        texts += [f" {turn.answer}" for turn in turns] + [turn.question for turn in turns]
    words = [*COLOR_NAMES, *SHAPES, *PLACES, *(plural(kind) for kind in SHAPES)]
    texts += [f" {word}" for word in words] * 40
    return texts


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of `token`, which the tokenizer is known to have."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, token
    return found
