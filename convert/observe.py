"""What one loaded checkpoint does with texts and questions, kept in little memory.

Of a text or an answer its last hidden states are kept, of the model its output head and
encoder; so two models are compared without being in memory together, and logits of a
whole text never exist.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.answer import AnswerStream
from mlx_smolvlm.config import Config
from mlx_smolvlm.convert.losses import Head, head_of
from mlx_smolvlm.convert.samples import Asked
from mlx_smolvlm.image import Detail
from mlx_smolvlm.media import joined
from mlx_smolvlm.messages import read_request
from mlx_smolvlm.model import Model
from mlx_smolvlm.sampling import Sampling
from mlx_smolvlm.smolvlm import SmolVLM

WINDOW = 512  # tokens of a text that are read at once
LAYER_TOKENS = 256  # tokens whose states are kept after every layer


@dataclass(frozen=True)
class Work:
    """What a model is given.

    Attributes:
        texts: To predict, token by token.
        text_tokens: The most of their tokens that are read, in all.
        asked: Questions to answer greedily.
        max_tokens: The longest answer, in tokens.
        detail: How pictures are cut into tiles, see `SmolVLM.ask`.
    """

    texts: tuple[str, ...]
    text_tokens: int
    asked: tuple[Asked, ...]
    max_tokens: int
    detail: Detail

    @property
    def steps(self) -> int:
        """How often `observe` reports."""
        return len(self.asked) + 1


@dataclass(frozen=True)
class Passage:
    """Tokens to predict: those of `input_ids` (L,) from `start` on."""

    input_ids: np.ndarray
    start: int = 1
    image_embeds: mx.array | None = None

    @property
    def targets(self) -> np.ndarray:
        """Ids of the tokens to predict."""
        return self.input_ids[self.start :]


@dataclass(frozen=True)
class Answered:
    """A greedy answer."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Observation:
    """What is kept of a model.

    Attributes:
        config: Of the checkpoint.
        head: Its output head.
        encoder: The modules that pictures pass, vision encoder and connector.
        passages: The texts, `num_texts` of them, then prompts with the reference's answers.
        hidden: Last hidden states of each passage, of the tokens before its targets.
        layers: States (L, D) of the first text's first tokens after every decoder layer.
        answers: Its greedy answers.
    """

    config: Config
    head: Head
    encoder: tuple[nn.Module, nn.Module]
    passages: list[Passage]
    num_texts: int
    hidden: list[mx.array]
    layers: list[mx.array]
    answers: list[Answered]


def windows(vlm: SmolVLM, texts: Sequence[str], most: int) -> list[Passage]:
    """The tokens of `texts`, at most `WINDOW` at once and `most` in all."""
    passages: list[Passage] = []
    for text in texts:
        ids = np.array(vlm.engine.prompt_builder.tokenizer.encode(text).ids[:most], dtype=np.int64)
        most -= ids.size
        parts = [ids[start : start + WINDOW] for start in range(0, ids.size, WINDOW)]
        passages += [Passage(part) for part in parts if part.size > 1]
    return passages


def observe(
    vlm: SmolVLM,
    work: Work,
    step: Callable[[str], None],
    expected: Sequence[Answered] | None = None,
) -> Observation:
    """What `vlm` does.

    Args:
        vlm: The model.
        work: Texts and questions.
        step: Called with the name of what begins, `work.steps` times.
        expected: The reference's answers, whose tokens are then predicted; None if `vlm`
            is the reference.

    Raises:
        MediaError: A picture cannot be opened.
        PromptError: A question is longer than the context.
    """
    passages = texts = windows(vlm, work.texts, work.text_tokens)
    answers: list[Answered] = []
    for number, one in enumerate(work.asked):
        step(f"answer {number + 1}")
        prompt, answer = _answer(vlm, one, work)
        answers.append(answer)
        told = answer if expected is None else expected[number]
        ids = np.concatenate([prompt.input_ids, np.array(told.token_ids, dtype=np.int64)])
        passages = [*passages, Passage(ids, prompt.input_ids.size, prompt.image_embeds)]
    step("texts")
    model = vlm.model
    return Observation(
        config=vlm.config,
        head=head_of(model),
        encoder=(model.vision_model, model.connector),
        passages=passages,
        num_texts=len(texts),
        hidden=[last_hidden(model, passage) for passage in passages],
        layers=layer_states(model, texts[0].input_ids[:LAYER_TOKENS]) if texts else [],
        answers=answers,
    )


def _answer(vlm: SmolVLM, asked: Asked, work: Work) -> tuple[Passage, Answered]:
    """The prompt of a question, and the answer to it."""
    pictures = () if asked.picture is None else (asked.picture,)
    request = read_request(asked.text, pictures, (), None)
    media = vlm.engine.open_media(request, work.detail)
    prompt = vlm.engine.make_prompt(request.messages, media)
    reply = AnswerStream(vlm.engine, prompt, Sampling(max_tokens=work.max_tokens)).finished()
    answer = Answered(reply.text, tuple(reply.token_ids))
    return Passage(prompt.input_ids, prompt.input_ids.size, joined(media)), answer


def last_hidden(model: Model, passage: Passage) -> mx.array:
    """Hidden states (L, D) from which the head predicts the passage's targets."""
    embeds = model.embed(passage.input_ids, passage.image_embeds)
    hidden: mx.array = model.text_model(embeds)[0, passage.start - 1 : -1]
    mx.eval(hidden)
    return hidden


def layer_states(model: Model, input_ids: np.ndarray) -> list[mx.array]:
    """States (L, D) after every decoder layer, for the text `input_ids` (L,)."""
    with recorded(model.text_model.layers) as states:
        mx.eval(model.text_model(model.embed(input_ids)))
    return [state[0] for state in states]


@contextlib.contextmanager
def recorded(layers: list[Any]) -> Iterator[list[mx.array]]:
    """What the `layers` of a model give in this block, in the order they are called."""
    states: list[mx.array] = []
    originals = list(layers)
    layers[:] = [_Recorder(layer, states) for layer in originals]
    try:
        yield states
    finally:
        layers[:] = originals


class _Recorder(nn.Module):
    """A layer that notes what it gives."""

    def __init__(self, layer: nn.Module, states: list[mx.array]) -> None:
        super().__init__()
        self.layer = layer
        self._states = states

    def __call__(self, *arguments: Any) -> mx.array:
        state: mx.array = self.layer(*arguments)
        self._states.append(state)
        return state
