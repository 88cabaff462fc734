"""Computes the probability of each of several answers to a question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from mlx_smolvlm.errors import PromptError
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.many import (
    CONTEXTS,
    TOTAL,
    RowDecoder,
    make_prefix_cache,
    split_into_groups,
)
from mlx_smolvlm.generate.sampling import log_normalizer
from mlx_smolvlm.generate.stream import Reply
from mlx_smolvlm.reuse.content import count_common

Normalize = Literal["none", "tokens"]
SCORE_CHUNK = 128  # positions per call of the output head; bounds the logits


@dataclass(frozen=True)
class Choice:
    """Choices and their probabilities, in the order given.

    Attributes:
        best: The most probable choice.
        index: Its index in `choices`.
        choices: All choices.
        probabilities: Probability of each choice; they add up to 1. The softmax of `logprobs`,
            or of `logprobs` / `token_counts` if normalized by tokens.
        logprobs: Natural logarithm of the probability that a choice is the whole answer: the
            sum over its tokens, including the end token.
        token_counts: Number of tokens of each choice, including the end token.
    """

    best: str
    index: int
    choices: tuple[str, ...]
    probabilities: tuple[float, ...]
    logprobs: tuple[float, ...]
    token_counts: tuple[int, ...]

    def __str__(self) -> str:
        return self.best

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values for JSON."""
        return asdict(self)


def check_choices(choices: Sequence[str], normalize: str) -> tuple[str, ...]:
    """Return `choices` as a tuple if they are valid.

    Raises:
        ValueError: There are fewer than two choices; a choice is not a text, empty or a
            duplicate; or `normalize` is unknown.
    """
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize is {normalize!r}; it must be 'none' or 'tokens'")
    if isinstance(choices, str):
        raise ValueError(f"choices is one text, {choices!r:.100}; give a list of two or more")
    if len(choices) < 2:
        raise ValueError(f"the number of choices is {len(choices)}; give two or more")
    seen: dict[str, int] = {}
    for number, choice in enumerate(choices, 1):
        if not isinstance(choice, str):
            raise ValueError(f"choice {number} is {choice!r:.100}; it must be a text")
        if not choice.strip():
            raise ValueError(f"choice {number} is empty; give it a text")
        if choice in seen:
            raise ValueError(f"choices {seen[choice]} and {number} are both {choice!r:.100}")
        seen[choice] = number
    return tuple(choices)


def make_choice(
    choices: tuple[str, ...], scores: Sequence[np.ndarray], normalize: Normalize
) -> Choice:
    """Return the result for `choices`, given the log-probabilities of each choice's tokens."""
    sums = np.array([score.sum() for score in scores])
    counts = [score.size for score in scores]
    values = sums / counts if normalize == "tokens" else sums
    weights = np.exp(values - values.max())
    index = int(values.argmax())
    return Choice(
        best=choices[index],
        index=index,
        choices=choices,
        probabilities=tuple((weights / weights.sum()).tolist()),
        logprobs=tuple(sums.tolist()),
        token_counts=tuple(counts),
    )


def choose_answer(
    engine: Engine,
    prompt: Prompt,
    transcripts: Sequence[Prompt],
    choices: tuple[str, ...],
    normalize: Normalize,
) -> Choice:
    """Choose between `choices` as answers to `prompt`.

    Args:
        engine: The engine.
        prompt: The question, up to the start of the answer.
        transcripts: For each choice, the question and the choice as its answer.
        choices: The choices.
        normalize: Whether to divide log-probabilities by numbers of tokens.

    Raises:
        PromptError: The chat template does not end an answer with an end token.
    """
    sequences = [
        cut_after_answer(engine, one.input_ids, count_common(prompt.input_ids, one.input_ids))
        for one in transcripts
    ]
    return make_choice(choices, compute_log_probabilities(engine, prompt, sequences), normalize)


def cut_after_answer(engine: Engine, transcript: np.ndarray, start: int) -> np.ndarray:
    """Return the token ids of `transcript` up to the end token of the answer at `start`.

    Raises:
        PromptError: There is no end token.
    """
    ends = np.flatnonzero(np.isin(transcript[start:], engine.config.eos_token_ids))
    if not ends.size:
        raise PromptError(
            "the chat template ends an answer with none of the tokens that end one in the "
            f"checkpoint's configuration ({', '.join(map(str, engine.config.eos_token_ids))})"
        )
    return transcript[: start + int(ends[-1]) + 1]


def compute_log_probabilities(
    engine: Engine, prompt: Prompt, transcripts: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Return the log-probabilities (float64) of each answer's tokens.

    The shared prefix of all transcripts is prefilled once, their suffixes together.

    Args:
        engine: The engine.
        prompt: The question, up to the start of the answer.
        transcripts: Token ids (L,) of the question and each answer, including the end token.
    """
    starts = [count_common(prompt.input_ids, transcript) for transcript in transcripts]
    shared = min(starts) - 1  # the token before an answer, which predicts its first, is in the row
    more = sum(transcript.size - shared for transcript in transcripts)
    most = min(more, CONTEXTS * engine.context_size)
    engine.check_memory(prompt, most, min(more, SCORE_CHUNK), TOTAL)
    cache = make_prefix_cache(engine, replace(prompt, input_ids=prompt.input_ids[:shared]), Reply())
    scores = []
    columns = [transcript.size - shared for transcript in transcripts]
    for group in split_into_groups(columns, shared, engine.context_size):
        cache.trim(shared)
        suffixes = [transcripts[number][shared:] for number in group]
        states = RowDecoder(engine.model, cache, len(group)).compute_hidden_states(suffixes)
        offset = 0
        for number, suffix in zip(group, suffixes, strict=True):
            first = starts[number] - shared
            own = states[offset + first - 1 : offset + suffix.size - 1]
            scores.append(_score_tokens(engine, own, suffix[first:]))
            offset += suffix.size
    return scores


def _score_tokens(engine: Engine, states: mx.array, token_ids: np.ndarray) -> np.ndarray:
    """Return the log-probabilities (L,) of `token_ids` (L,), each predicted by one of `states`.

    `states` (L, D) are the hidden states of the preceding tokens.
    """
    parts = []
    for start in range(0, token_ids.size, SCORE_CHUNK):
        part = slice(start, start + SCORE_CHUNK)
        logits = engine.model.head(states[part]).astype(mx.float32)
        own_logits = mx.take_along_axis(logits, mx.array(token_ids[part])[:, None], axis=1)
        numbers = mx.concatenate([own_logits, *log_normalizer(logits)], axis=1)
        own, largest, log_sum = np.array(numbers, np.float64).T  # float32 would round again
        parts.append(own - largest - log_sum)
    return np.concatenate(parts)
