"""Runs texts and questions through one checkpoint, and keeps what a comparison needs.

That is the last hidden states of each text and answer, and the output head and the encoder of the
model. So the two models of a comparison are never in memory together, nor are the logits of a
whole text.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.convert.compare.samples import PictureQuestion
from mlx_smolvlm.convert.open_model import Matrix
from mlx_smolvlm.generate.sampling import Sampling, log_softmax, sum_last
from mlx_smolvlm.generate.stream import AnswerStream
from mlx_smolvlm.media.encode import join_embeds
from mlx_smolvlm.media.tiles import Detail
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.prompt.messages import read_request
from mlx_smolvlm.smolvlm import SmolVLM

HEAD_ROWS = 128  # tokens whose logits are computed at once
BLOCK = 2**22  # elements of a matrix that are compared at once

Head = Callable[[mx.array], mx.array]


def get_head(model: Model) -> Head:
    """Return the output head of `model`; it does not keep the rest of the model in memory."""
    if "lm_head" in model:
        head: Head = model.lm_head
    else:
        head = model.text_model.embed_tokens.as_linear
    return head


@dataclass(frozen=True)
class Predictions:
    """The predictions of two models for the same tokens (L,), the reference first.

    Attributes:
        kl_nats: KL divergence of the second from the reference.
        nll_nats: Negative log-likelihoods of the true tokens, (2, L).
        likeliest: Ids of the likeliest tokens, (2, L).
    """

    kl_nats: np.ndarray
    nll_nats: np.ndarray
    likeliest: np.ndarray


def compare_predictions(
    hidden: tuple[mx.array, mx.array], heads: tuple[Head, Head], targets: np.ndarray
) -> Predictions:
    """Compare the predictions of two models for `targets` (L,).

    `hidden` are their last hidden states (L, D), from which `heads` compute logits.

    Logits are computed for `HEAD_ROWS` tokens at a time.
    """
    divergences, nlls, likeliest = [], [], []
    for start in range(0, targets.size, HEAD_ROWS):
        part = slice(start, start + HEAD_ROWS)
        true = mx.array(targets[part])[:, None]
        logs = [log_softmax(head(states[part])) for states, head in zip(hidden, heads, strict=True)]
        divergence = sum_last(mx.exp(logs[0]) * (logs[0] - logs[1]))[:, 0]
        nll = mx.stack([-mx.take_along_axis(log, true, -1)[:, 0] for log in logs])
        best = mx.stack([mx.argmax(log, -1) for log in logs])
        mx.eval(divergence, nll, best)
        divergences.append(np.array(divergence))
        nlls.append(np.array(nll))
        likeliest.append(np.array(best))
    return Predictions(
        np.maximum(np.concatenate(divergences), 0),  # rounding can make it negative
        np.concatenate(nlls, 1),
        np.concatenate(likeliest, 1),
    )


def compute_cosines(a: mx.array, b: mx.array) -> np.ndarray:
    """Return the cosine of each pair of vectors along the last axis of `a` and `b`, flat."""
    one, other = _to_vectors(a), _to_vectors(b)
    lengths = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    result: np.ndarray = np.minimum((one * other).sum(-1) / np.maximum(lengths, 1e-30), 1)
    return result


def compute_relative_errors(a: mx.array, b: mx.array) -> np.ndarray:
    """Return |b - a| / |a| of each pair of vectors along the last axis, flat.

    Each vector has its own error, because a few are much longer than the others.
    """
    one, other = _to_vectors(a), _to_vectors(b)
    lengths = np.maximum(np.linalg.norm(one, axis=-1), 1e-30)
    errors: np.ndarray = np.linalg.norm(other - one, axis=-1) / lengths
    return errors


def _to_vectors(x: mx.array) -> np.ndarray:
    """Return the vectors along the last axis of `x`, in float64 for cosines near 1."""
    vectors: np.ndarray = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
    return vectors.astype(np.float64)


def compute_frobenius_error(a: Matrix, b: Matrix) -> float:
    """Return |b - a| / |a| in the Frobenius norm, over the rows and columns that both have.

    If `a` is all zeros, return |b|.
    """
    total = difference = 0.0
    for one, other in _iterate_blocks(a, b):
        total += _sum_squares(one)
        difference += _sum_squares(other - one)
    return math.sqrt(difference / total) if total else math.sqrt(difference)


def _sum_squares(x: mx.array) -> float:
    """Sum the squares of `x`: each row in float32, the rows in float64."""
    return float(np.array((x * x).sum(-1)).sum(dtype=np.float64))


def _iterate_blocks(a: Matrix, b: Matrix) -> Iterator[tuple[mx.array, mx.array]]:
    """Yield the common rows and columns of both in float32, some rows at a time."""
    rows, width = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
    step = max(1, BLOCK // width)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield a.get_rows(start, stop)[:, :width], b.get_rows(start, stop)[:, :width]


WINDOW = 512  # tokens of a passage
LAYER_TOKENS = 256  # tokens whose states after every layer are kept


@dataclass(frozen=True)
class Workload:
    """The texts and questions that a model is run on.

    Attributes:
        texts: Texts to predict, token by token.
        text_tokens: The maximum number of tokens of all texts together.
        questions: Questions to answer greedily.
        max_tokens: The maximum length of an answer, in tokens.
        detail: How pictures are cut into tiles, see `SmolVLM.ask`.
    """

    texts: tuple[str, ...]
    text_tokens: int
    questions: tuple[PictureQuestion, ...]
    max_tokens: int
    detail: Detail

    @property
    def steps(self) -> int:
        """How often `observe` calls `step`."""
        return len(self.questions) + 1


@dataclass(frozen=True)
class Passage:
    """Token ids (L,), of which those from `start` on are predicted."""

    input_ids: np.ndarray
    start: int = 1
    image_embeds: mx.array | None = None

    @property
    def targets(self) -> np.ndarray:
        """Ids of the tokens to predict."""
        return self.input_ids[self.start :]


@dataclass(frozen=True)
class GreedyAnswer:
    """A greedy answer."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Observation:
    """What a comparison needs of one model.

    Attributes:
        config: The configuration of the checkpoint.
        head: Its output head.
        encoder: The vision encoder and the connector.
        passages: `num_texts` passages of the texts, then prompts with the reference's answers.
        num_texts: How many of the passages are of the texts.
        hidden: Last hidden states (L, D) of each passage, from which its targets are predicted.
        layers: States (L, D) after each decoder layer, for the first tokens of the first text.
        answers: Its greedy answers.
    """

    config: Config
    head: Head
    encoder: tuple[nn.Module, nn.Module]
    passages: list[Passage]
    num_texts: int
    hidden: list[mx.array]
    layers: list[mx.array]
    answers: list[GreedyAnswer]


def split_texts(vlm: SmolVLM, texts: Sequence[str], most: int) -> list[Passage]:
    """Split `texts` into passages of at most `WINDOW` tokens, `most` tokens in all."""
    passages: list[Passage] = []
    for text in texts:
        ids = np.array(vlm.engine.prompt_builder.tokenizer.encode(text).ids[:most], dtype=np.int64)
        most -= ids.size
        parts = [ids[start : start + WINDOW] for start in range(0, ids.size, WINDOW)]
        passages += [Passage(part) for part in parts if part.size > 1]
    return passages


def observe(
    vlm: SmolVLM,
    work: Workload,
    step: Callable[[str], None],
    expected: Sequence[GreedyAnswer] | None = None,
) -> Observation:
    """Run the texts and questions of `work` through `vlm`.

    Args:
        vlm: The model.
        work: Texts and questions.
        step: Called with the name of each step before it, `work.steps` times.
        expected: The reference's answers, whose tokens `vlm` predicts; None if `vlm` is the
            reference.

    Raises:
        MediaError: A picture cannot be opened.
        PromptError: A question is longer than the context.
    """
    passages = texts = split_texts(vlm, work.texts, work.text_tokens)
    answers: list[GreedyAnswer] = []
    for number, one in enumerate(work.questions):
        step(f"answer {number + 1}")
        prompt, answer = _answer(vlm, one, work)
        answers.append(answer)
        target = answer if expected is None else expected[number]
        ids = np.concatenate([prompt.input_ids, np.array(target.token_ids, dtype=np.int64)])
        passages = [*passages, Passage(ids, prompt.input_ids.size, prompt.image_embeds)]
    step("texts")
    model = vlm.model
    return Observation(
        config=vlm.config,
        head=get_head(model),
        encoder=(model.vision_model, model.connector),
        passages=passages,
        num_texts=len(texts),
        hidden=[compute_last_hidden(model, passage) for passage in passages],
        layers=compute_layer_states(model, texts[0].input_ids[:LAYER_TOKENS]) if texts else [],
        answers=answers,
    )


def _answer(
    vlm: SmolVLM, question: PictureQuestion, work: Workload
) -> tuple[Passage, GreedyAnswer]:
    """Answer a question, and return its prompt and the answer."""
    pictures = () if question.picture is None else (question.picture,)
    request = read_request(question.text, pictures, (), None)
    media = vlm.engine.open_media(request, work.detail)
    prompt = vlm.engine.make_prompt(request.messages, media)
    reply = AnswerStream(vlm.engine, prompt, Sampling(max_tokens=work.max_tokens)).finish()
    answer = GreedyAnswer(reply.text, tuple(reply.token_ids))
    return Passage(prompt.input_ids, prompt.input_ids.size, join_embeds(media)), answer


def compute_last_hidden(model: Model, passage: Passage) -> mx.array:
    """Compute the last hidden states (L, D) that predict the targets of `passage`."""
    embeds = model.embed(passage.input_ids, passage.image_embeds)
    hidden: mx.array = model.text_model(embeds)[0, passage.start - 1 : -1]
    mx.eval(hidden)
    return hidden


def compute_layer_states(model: Model, input_ids: np.ndarray) -> list[mx.array]:
    """Compute the states (L, D) after every decoder layer for `input_ids` (L,)."""
    with record_outputs(model.text_model.layers) as states:
        mx.eval(model.text_model(model.embed(input_ids)))
    return [state[0] for state in states]


@contextlib.contextmanager
def record_outputs(layers: list[Any]) -> Iterator[list[mx.array]]:
    """Record the outputs of `layers` inside the `with` block, in the order of the calls."""
    states: list[mx.array] = []
    originals = list(layers)
    layers[:] = [_Recorder(layer, states) for layer in originals]
    try:
        yield states
    finally:
        layers[:] = originals


class _Recorder(nn.Module):
    """A layer that appends its outputs to a list."""

    def __init__(self, layer: nn.Module, states: list[mx.array]) -> None:
        super().__init__()
        self.layer = layer
        self._states = states

    def __call__(self, *arguments: Any) -> mx.array:
        state: mx.array = self.layer(*arguments)
        self._states.append(state)
        return state
