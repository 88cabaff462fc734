"""How likely each of some answers to a question is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from mlx_smolvlm.errors import PromptError
from mlx_smolvlm.generate.batch import RowDecoder, make_prefix_cache, split_into_groups
from mlx_smolvlm.generate.engine import Engine, Prompt
from mlx_smolvlm.generate.sampling import log_normalizer
from mlx_smolvlm.generate.stream import Reply
from mlx_smolvlm.reuse.content import count_common

Normalize = Literal["none", "tokens"]
SCORE_CHUNK = 128  # positions that go through the output head at once; bounds the logits


@dataclass(frozen=True)
class Choice:
    """Choices with their probabilities, in the order given.

    Attributes:
        best: The likeliest choice.
        index: Its place.
        choices: All of them.
        probabilities: They add up to 1: the softmax of `logprobs`, or of `logprobs` /
            `token_counts` if normalised by tokens.
        logprobs: Of each choice as the whole answer, natural logarithm: the sum over its
            tokens and the one that ends it.
        token_counts: Tokens of each choice, the one that ends it included.
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
        """All fields, ready for JSON."""
        return asdict(self)


def check_choices(choices: Sequence[str], normalize: str) -> tuple[str, ...]:
    """`choices` that can be told apart.

    Raises:
        ValueError: There are fewer than two, or one is no text, empty or there twice; or
            `normalize` is unknown.
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
    """What `scores`, the log-probabilities of each choice's tokens, make of `choices`."""
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
    told: Sequence[Prompt],
    choices: tuple[str, ...],
    normalize: Normalize,
) -> Choice:
    """The choice between `choices` as answers to `prompt`; `told` are both in one, each.

    Raises:
        PromptError: The chat template does not end an answer.
    """
    transcripts = [
        cut_after_answer(engine, one.input_ids, count_common(prompt.input_ids, one.input_ids))
        for one in told
    ]
    return make_choice(choices, compute_log_probabilities(engine, prompt, transcripts), normalize)


def cut_after_answer(engine: Engine, told: np.ndarray, start: int) -> np.ndarray:
    """`told`, a transcript whose answer begins at `start`, up to the token that ends that.

    Raises:
        PromptError: Nothing ends it.
    """
    ends = np.flatnonzero(np.isin(told[start:], engine.config.eos_token_ids))
    if not ends.size:
        raise PromptError(
            "the chat template ends an answer with none of the tokens that end one in the "
            f"checkpoint's configuration ({', '.join(map(str, engine.config.eos_token_ids))})"
        )
    return told[: start + int(ends[-1]) + 1]


def compute_log_probabilities(
    engine: Engine, prompt: Prompt, transcripts: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Log-probabilities (float64) of each transcript's tokens behind `prompt`.

    What the prompt and all transcripts begin with goes through the decoder once, the rest
    of them together.

    Args:
        engine: Generates the answers.
        prompt: The question, up to where the answer begins.
        transcripts: Input ids of the question with each answer, up to the answer's end.
    """
    starts = [count_common(prompt.input_ids, told) for told in transcripts]
    shared = min(starts) - 1  # the token before an answer is in its row: it foretells the first
    cache = make_prefix_cache(engine, replace(prompt, input_ids=prompt.input_ids[:shared]), Reply())
    context = engine.context_size
    scores = []
    for group in split_into_groups([told.size - shared for told in transcripts], shared, context):
        cache.trim(shared)
        suffixes = [transcripts[number][shared:] for number in group]
        states = RowDecoder(engine.model, cache, len(group)).compute_hidden_states(suffixes)
        before = 0
        for number, suffix in zip(group, suffixes, strict=True):
            first = starts[number] - shared
            own = states[before + first - 1 : before + suffix.size - 1]
            scores.append(_score_tokens(engine, own, suffix[first:]))
            before += suffix.size
    return scores


def _score_tokens(engine: Engine, states: mx.array, token_ids: np.ndarray) -> np.ndarray:
    """Log-probability of each of `token_ids` (L,) after the one of `states` (L, D) before it."""
    parts = []
    for start in range(0, token_ids.size, SCORE_CHUNK):
        part = slice(start, start + SCORE_CHUNK)
        logits = engine.model.head(states[part]).astype(mx.float32)
        chosen = mx.take_along_axis(logits, mx.array(token_ids[part])[:, None], axis=1)
        numbers = mx.concatenate([chosen, *log_normalizer(logits)], axis=1)
        own, largest, log_sum = np.array(numbers, np.float64).T  # float32 would round once more
        parts.append(own - largest - log_sum)
    return np.concatenate(parts)
