"""The results of a comparison, and their text for a terminal and for a model card."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mlx_smolvlm.config import PARTS, find_part
from mlx_smolvlm.convert.compare.observe import Predictions

# Edges of the histogram of KL divergences; the first and the last bin are open.
KL_EDGES_NATS = tuple(10.0 ** (power / 2) for power in range(-12, 3))


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints: its name, the bytes of its weights, and bits per weight."""

    name: str
    nbytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class TokenLoss:
    """The difference between two models' predictions of the same tokens.

    Attributes:
        tokens: The number of predicted tokens.
        top_1_agreement: Share of tokens for which both predict the same likeliest token.
        kl_nats: Mean KL divergence of the other's distribution from the reference's.
        kl_nats_median: Its median over the tokens.
        kl_nats_p99: Its 99th percentile.
        kl_nats_max: Its maximum.
        perplexity_reference: exp of the mean negative log-likelihood of the true tokens.
        perplexity_other: The same for the other model.
        kl_counts: The histogram of divergences: tokens in each bin of `KL_EDGES_NATS`.
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
    """The difference between two models' features of pictures.

    Attributes:
        name: "patch_features" leave the encoder, "image_embeds" the connector.
        vectors: The number of compared vectors.
        cosine: Mean cosine between a vector and its counterpart.
        cosine_least: The smallest cosine.
        relative_error: Mean of |other - reference| / |reference|.
    """

    name: Literal["patch_features", "image_embeds"]
    vectors: int
    cosine: float
    cosine_least: float
    relative_error: float


@dataclass(frozen=True)
class LayerLoss:
    """Mean relative error of the output of the layer at `path`, over tokens or patches."""

    path: str
    relative_error: float


@dataclass(frozen=True)
class MatrixLoss:
    """Relative Frobenius error of the matrix of the module at `path`.

    Attributes:
        path: The path in the checkpoint, such as "text_model.layers.0.mlp.down_proj".
        bits: Bits of the other's weights; None is float.
        parameters: The number of weights of the reference's matrix.
        relative_error: |other - reference| / |reference|.
    """

    path: str
    bits: int | None
    parameters: int
    relative_error: float


@dataclass(frozen=True)
class AnswerPair:
    """Greedy answers of both to a question.

    Attributes:
        question: The text of the question.
        picture: The name of the picture; None without one.
        reference: The answer of the reference.
        other: The answer of the other.
        tokens: The length of the longer answer.
        equal_tokens: Tokens before the first difference.
    """

    question: str
    picture: str | None
    reference: str
    other: str
    tokens: int
    equal_tokens: int


@dataclass(frozen=True)
class Surprise:
    """A token of the texts where the predictions differ much, with the likeliest of each."""

    context: str
    true: str
    reference: str
    other: str
    kl_nats: float


@dataclass(frozen=True)
class TaskDifference:
    """Mean scores of both on a task of a dataset, 0 to 1, and the number of equal answers."""

    task: str
    metric: str
    examples: int
    reference: float
    other: float
    same_answers: int


@dataclass(frozen=True)
class Comparison:
    """The differences of two checkpoints; a part that cannot be compared is None or empty.

    Attributes:
        reference: The checkpoint to compare with.
        other: The compared checkpoint.
        texts: Predictions of the tokens of texts.
        answers_forced: Predictions of the tokens of the reference's answers.
        features: Features of pictures after the encoder and after the connector.
        layers: Outputs of decoder and encoder layers, in order.
        matrices: Every matrix that has the same shape in both.
        answers: Greedy answers of both.
        surprises: The tokens of the texts whose predictions differ most.
        tasks: Scores on datasets, if any were given.
        peak_memory_gb: The peak memory of MLX, in 10**9 bytes.
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
    tasks: tuple[TaskDifference, ...]
    peak_memory_gb: float

    @property
    def equal_answers(self) -> int:
        """The number of answers whose tokens are all equal."""
        return sum(pair.equal_tokens == pair.tokens for pair in self.answers)

    @property
    def equal_share(self) -> float:
        """Mean share of an answer's tokens up to the first difference; 1 without answers."""
        shares = [pair.equal_tokens / pair.tokens if pair.tokens else 1.0 for pair in self.answers]
        return sum(shares) / len(shares) if shares else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values, with the added key `kl_edges_nats`."""
        return {**dataclasses.asdict(self), "kl_edges_nats": list(KL_EDGES_NATS)}


def summarize_tokens(parts: Sequence[Predictions]) -> TokenLoss | None:
    """Summarize `parts` over all their tokens; None without any token."""
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


def summarize_feature(
    name: Literal["patch_features", "image_embeds"], cosines: np.ndarray, errors: np.ndarray
) -> FeatureLoss:
    """Summarize the cosines and relative errors of vectors."""
    return FeatureLoss(
        name=name,
        vectors=cosines.size,
        cosine=float(cosines.mean()),
        cosine_least=float(cosines.min()),
        relative_error=float(errors.mean()),
    )


FEATURE_NAMES = {
    "patch_features": "after the encoder",
    "image_embeds": "after the connector",
}
WORST = 5  # matrices that a model card names


def make_summary_rows(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Yield a name and a text with numbers for every part that could be compared."""
    yield "reference", _format_side(comparison.reference)
    yield "compared", _format_side(comparison.other)
    if comparison.texts is not None:
        yield from _make_token_rows("texts", comparison.texts)
    if comparison.answers_forced is not None:
        yield from _make_token_rows("reference's answers", comparison.answers_forced)
    for feature in comparison.features:
        yield (
            f"pictures, {FEATURE_NAMES[feature.name]}",
            f"cosine {feature.cosine:.6f}, least {feature.cosine_least:.6f} of "
            f"{feature.vectors} vectors; relative error {feature.relative_error:.4f}",
        )
    if comparison.answers:
        share = f"{comparison.equal_share:.1%} of tokens up to the first difference"
        yield (
            "answers",
            f"{comparison.equal_answers} of {len(comparison.answers)} the same; {share}",
        )
    for part, error, worst in average_by_part(comparison.matrices):
        text = f"relative error {error:.4f}, greatest {worst.relative_error:.4f}"
        yield f"weights, {part}", f"{text} ({worst.path})" if worst.relative_error else text
    for task in comparison.tasks:
        yield (
            f"task {task.task}",
            f"{task.reference:.1%} -> {task.other:.1%} ({task.metric}); "
            f"{task.same_answers} of {task.examples} answers the same",
        )


def _format_side(side: Side) -> str:
    """Return the name and the size of a checkpoint as text."""
    megabytes = side.nbytes / 1e6
    return f"{side.name}, {megabytes:,.1f} MB, {side.bits_per_weight:.2f} bits a weight"


def _make_token_rows(name: str, loss: TokenLoss) -> Iterator[tuple[str, str]]:
    """Yield the rows on predictions of tokens."""
    yield f"{name}, top-1 agreement", f"{loss.top_1_agreement:.2%} of {loss.tokens} tokens"
    yield (
        f"{name}, KL",
        f"{loss.kl_nats:.3g} nats a token (median {loss.kl_nats_median:.3g}, "
        f"99 % below {loss.kl_nats_p99:.3g}, greatest {loss.kl_nats_max:.3g})",
    )
    change = loss.perplexity_other / loss.perplexity_reference - 1
    yield (
        f"{name}, perplexity",
        f"{loss.perplexity_reference:.4g} -> {loss.perplexity_other:.4g} ({change:+.2%})",
    )


def average_by_part(matrices: Sequence[MatrixLoss]) -> Iterator[tuple[str, float, MatrixLoss]]:
    """Yield each part, its mean relative error weighted by parameters, and its worst matrix."""
    for part in PARTS:
        own = [one for one in matrices if find_part(one.path) == part]
        if own:
            total = sum(one.parameters for one in own)
            mean = sum(one.relative_error * one.parameters for one in own) / total
            yield part, mean, max(own, key=lambda one: one.relative_error)


def format_differences(comparison: Comparison) -> Iterator[str]:
    """Yield lines on the answers that differ, and on the tokens whose predictions differ most."""
    for pair in comparison.answers:
        if pair.equal_tokens == pair.tokens:
            continue
        about = f" ({pair.picture})" if pair.picture else ""
        yield f"{pair.question}{about}: {pair.equal_tokens} of {pair.tokens} tokens the same"
        yield f"  reference: {join_lines(pair.reference)}"
        yield f"  compared:  {join_lines(pair.other)}"
    for one in comparison.surprises:
        yield (
            f"...{join_lines(one.context)} [{join_lines(one.true)}]: reference says "
            f"{one.reference!r}, compared {one.other!r}, KL {one.kl_nats:.3g} nats"
        )


def join_lines(text: str) -> str:
    """Return `text` on one line, its whitespace collapsed."""
    return " ".join(text.split())


def format_card_section(comparison: Comparison, plot: str | None = None) -> str:
    """Return the Markdown section of a model card on what the conversion lost.

    It begins with a heading of the second level. `plot` is the file name of the plot.
    """
    lines = [
        "## What the conversion lost",
        "",
        "Measured against the weights it was made from, activations in float32.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {_format_cell(text)} |" for name, text in make_summary_rows(comparison)),
    ]
    worst = sorted(comparison.matrices, key=lambda one: -one.relative_error)[:WORST]
    if worst and worst[0].relative_error:
        lines += ["", "The matrices with the greatest relative error:", ""]
        lines += ["| matrix | bits | relative error |", "| --- | --- | --- |"]
        lines += [f"| `{m.path}` | {m.bits or 'float'} | {m.relative_error:.4f} |" for m in worst]
    if plot:
        lines += ["", f"![Errors by matrix, by layer and by token]({plot})"]
    return "\n".join(lines) + "\n"


def _format_cell(text: str) -> str:
    """Return `text` as a cell of a Markdown table."""
    return join_lines(text).replace("|", "\\|")
