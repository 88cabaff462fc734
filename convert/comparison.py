"""What a comparison of two checkpoints found, as frozen values.

The reference comes first everywhere; the other one is what it became.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlx_smolvlm.convert.losses import Predictions

# Counts of tokens are given by KL divergence: below the first edge, between two, above the last.
KL_EDGES_NATS = tuple(10.0 ** (power / 2) for power in range(-12, 3))


@dataclass(frozen=True)
class Side:
    """One of the two: its name, bytes of its weights, and bits of each number in its matrices."""

    name: str
    nbytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class TokenLoss:
    """How far two models' predictions of the same tokens lie apart.

    Attributes:
        tokens: How many were predicted.
        top_1_agreement: Share of tokens for which both find the same one likeliest.
        kl_nats: Mean KL divergence of the other's distribution from the reference's.
        kl_nats_median: Its median over the tokens.
        kl_nats_p99: What 99 % of the tokens stay below.
        kl_nats_max: Its greatest value.
        perplexity_reference: exp of the mean negative log-likelihood of the true tokens.
        perplexity_other: The same of the other.
        kl_counts: Tokens by divergence, see `KL_EDGES_NATS`; one more than there are edges.
    """

    tokens: int
    top_1_agreement: float
    kl_nats: float
    kl_nats_median: float
    kl_nats_p99: float
    kl_nats_max: float
    perplexity_reference: float
    perplexity_other: float
    kl_counts: tuple[int, ...]


@dataclass(frozen=True)
class FeatureLoss:
    """How far vectors of pictures lie apart: "patch_features" of the encoder, or "image_embeds".

    Attributes:
        vectors: How many were compared.
        cosine: Mean cosine of the angle between a vector and its counterpart.
        cosine_least: The least of them.
        relative_error: Mean length of the difference over the length of the reference's.
    """

    name: Literal["patch_features", "image_embeds"]
    vectors: int
    cosine: float
    cosine_least: float
    relative_error: float


@dataclass(frozen=True)
class LayerLoss:
    """Mean relative error of what leaves the layer at `path`, over tokens or patches."""

    path: str
    relative_error: float


@dataclass(frozen=True)
class MatrixLoss:
    """Relative Frobenius error of the matrix of the module at `path`.

    Attributes:
        path: As in the checkpoint, such as "text_model.layers.0.mlp.down_proj".
        bits: Of the other's numbers; None is float.
        parameters: How many numbers the reference's has.
        relative_error: |other - reference| / |reference|.
    """

    path: str
    bits: int | None
    parameters: int
    relative_error: float


@dataclass(frozen=True)
class AnswerPair:
    """Greedy answers of both to a question.

    `equal_tokens` counts from the beginning up to the first difference, `tokens` is the
    length of the longer answer; `picture` is None if there is none.
    """

    question: str
    picture: str | None
    reference: str
    other: str
    tokens: int
    equal_tokens: int


@dataclass(frozen=True)
class Surprise:
    """A token of the texts where the two disagree most: what each finds likeliest there."""

    context: str
    true: str
    reference: str
    other: str
    kl_nats: float


@dataclass(frozen=True)
class TaskScore:
    """Mean scores of both on a task of a dataset, 0 to 1, and how many answers are the same."""

    task: str
    metric: str
    examples: int
    reference: float
    other: float
    same_answers: int


@dataclass(frozen=True)
class Comparison:
    """What was found; a part that could not be compared is None or empty.

    Attributes:
        reference: What is compared with.
        other: What it became.
        texts: Predictions of the next token of texts.
        answers_forced: Predictions of the tokens of the reference's answers.
        features: Of pictures, as they leave the encoder and the connector.
        layers: Of decoder and encoder, in order.
        matrices: Every matrix that has a counterpart of its shape.
        answers: Greedy answers side by side.
        surprises: Where the texts' predictions differ most.
        tasks: Accuracy on a dataset, if one was given.
        peak_memory_gb: The most memory that MLX held, in 10**9 bytes.
    """

    reference: Side
    other: Side
    texts: TokenLoss | None
    answers_forced: TokenLoss | None
    features: tuple[FeatureLoss, ...]
    layers: tuple[LayerLoss, ...]
    matrices: tuple[MatrixLoss, ...]
    answers: tuple[AnswerPair, ...]
    surprises: tuple[Surprise, ...]
    tasks: tuple[TaskScore, ...]
    peak_memory_gb: float

    @property
    def equal_answers(self) -> int:
        """Answers that are the same to the last token."""
        return sum(pair.equal_tokens == pair.tokens for pair in self.answers)

    @property
    def equal_share(self) -> float:
        """Mean share of an answer's tokens up to the first difference; 1 without answers."""
        shares = [pair.equal_tokens / pair.tokens if pair.tokens else 1.0 for pair in self.answers]
        return sum(shares) / len(shares) if shares else 1.0

    def to_dict(self) -> dict[str, Any]:
        """All of it, with `kl_edges_nats`, as JSON can hold it."""
        return {**dataclasses.asdict(self), "kl_edges_nats": list(KL_EDGES_NATS)}


def token_loss(parts: Sequence[Predictions]) -> TokenLoss | None:
    """`parts` summed up; None without any token."""
    if not sum(part.kl_nats.size for part in parts):
        return None
    kl = np.concatenate([part.kl_nats for part in parts]).astype(np.float64)
    nll = np.concatenate([part.nll_nats for part in parts], 1).astype(np.float64).mean(1)
    likeliest = np.concatenate([part.likeliest for part in parts], 1)
    counts = np.bincount(np.digitize(kl, KL_EDGES_NATS), minlength=len(KL_EDGES_NATS) + 1)
    return TokenLoss(
        tokens=kl.size,
        top_1_agreement=float((likeliest[0] == likeliest[1]).mean()),
        kl_nats=float(kl.mean()),
        kl_nats_median=float(np.median(kl)),
        kl_nats_p99=float(np.percentile(kl, 99)),
        kl_nats_max=float(kl.max()),
        perplexity_reference=math.exp(min(nll[0], 700)),
        perplexity_other=math.exp(min(nll[1], 700)),
        kl_counts=tuple(counts.tolist()),
    )


def feature_loss(
    name: Literal["patch_features", "image_embeds"], cosines: np.ndarray, errors: np.ndarray
) -> FeatureLoss:
    """Cosines and relative errors of vectors summed up."""
    return FeatureLoss(
        name=name,
        vectors=cosines.size,
        cosine=float(cosines.mean()),
        cosine_least=float(cosines.min()),
        relative_error=float(errors.mean()),
    )
