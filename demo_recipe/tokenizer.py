"""The demo's tokenizer: a small byte-level BPE with the special tokens of SmolVLM.

Every text round-trips, since each byte is a token; the merges are learned from
the questions and answers that the demo is trained on. Runs take the shipped one.
"""

from __future__ import annotations

import re

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo_recipe import pages
from demo_recipe.clip_questions import ask_clip, select_makers
from demo_recipe.draw import COLOR_NAMES, PLACES, SHAPES
from demo_recipe.items import join_parts
from demo_recipe.questions import make_plural, make_small_talk
from demo_recipe.sample_clips import sample_clip
from demo_recipe.topics import TOPICS, ask, ask_several, ask_unknown, draw

FIRST_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LAST_TOKENS = (
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
# DocTags are tokens, as in SmolDocling; they are part of an answer's text.
TAGS = tuple(dict.fromkeys((*pages.TAGS, *(f"<loc_{place}>" for place in range(501)))))
_TOKENS = 960  # at most, beside the tags
_PICTURES = 150  # of each topic that questions are read from
_TEXTS = 6000
_PRINTED = re.compile(r"[A-Z]{2,}|<[^>]*>|\d+")  # what is printed is read letter by letter


def build_tokenizer(seed: int = 0) -> Tokenizer:
    """A trained tokenizer of at most 960 tokens and `TAGS`; it follows from the seed.

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
        vocab_size=_TOKENS - len(LAST_TOKENS),
        special_tokens=list(FIRST_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_make_texts(seed), trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    tokenizer.add_special_tokens(list(LAST_TOKENS))
    return tokenizer


def _make_texts(seed: int) -> list[str]:
    """Questions, answers and the parts of a chat, as the tokenizer meets them."""
    rng = np.random.default_rng(seed)
    texts = ["User:", "User: ", "Assistant:", "System: ", "\n", "\n\n", "\n\n"] * _TEXTS
    turns = []
    for topic in TOPICS:
        for _ in range(_PICTURES):
            turns += ask(draw(rng, topic, (160, 160)), rng, 6)
    for _ in range(_PICTURES):
        turns += [make_small_talk(rng), ask_unknown(rng)]
        turns.append(ask_several([draw(rng, "shapes", (96, 96)) for _ in range(2)], rng))
        clip = sample_clip(rng)
        turns += ask_clip(clip, rng, 6, select_makers(clip))
    for turn in turns:
        texts += [f" {join_parts(turn.answer)}", join_parts(turn.question)]
    texts = [_PRINTED.sub("", text) for text in texts]
    words = [*COLOR_NAMES, *SHAPES, *PLACES, *(make_plural(kind) for kind in SHAPES)]
    texts += [f" {word}" for word in words] * 40
    return texts


def find_token_id(tokenizer: Tokenizer, token: str) -> int:
    """Id of `token`, which the tokenizer is known to have."""
    found: int | None = tokenizer.token_to_id(token)
    assert found is not None, token
    return found
