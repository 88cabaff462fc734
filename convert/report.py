"""A comparison told to people: a table for a terminal, and a section of a model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_smolvlm.config import PARTS, part_of
from mlx_smolvlm.convert.comparison import Comparison, MatrixLoss, Side, TokenLoss

FEATURE_NAMES = {
    "patch_features": "after the encoder",
    "image_embeds": "after the connector",
}
WORST = 5  # matrices that are named


def summary_rows(found: Comparison) -> Iterator[tuple[str, str]]:
    """Pairs of what was measured and the number, for every part that could be compared."""
    yield "reference", _side(found.reference)
    yield "compared", _side(found.other)
    if found.texts is not None:
        yield from _token_rows("texts", found.texts)
    if found.answers_forced is not None:
        yield from _token_rows("reference's answers", found.answers_forced)
    for feature in found.features:
        yield (
            f"pictures, {FEATURE_NAMES[feature.name]}",
            f"cosine {feature.cosine:.6f}, least {feature.cosine_least:.6f} of "
            f"{feature.vectors} vectors; relative error {feature.relative_error:.4f}",
        )
    if found.answers:
        share = f"{found.equal_share:.1%} of tokens up to the first difference"
        yield "answers", f"{found.equal_answers} of {len(found.answers)} the same; {share}"
    for part, error, worst in part_errors(found.matrices):
        text = f"relative error {error:.4f}, greatest {worst.relative_error:.4f}"
        yield f"weights, {part}", f"{text} ({worst.path})" if worst.relative_error else text
    for task in found.tasks:
        yield (
            f"task {task.task}",
            f"{task.reference:.1%} -> {task.other:.1%} ({task.metric}); "
            f"{task.same_answers} of {task.examples} answers the same",
        )


def _side(side: Side) -> str:
    """Name and size."""
    megabytes = side.nbytes / 1e6
    return f"{side.name}, {megabytes:,.1f} MB, {side.bits_per_weight:.2f} bits a weight"


def _token_rows(name: str, loss: TokenLoss) -> Iterator[tuple[str, str]]:
    """What was found of tokens."""
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


def part_errors(matrices: Sequence[MatrixLoss]) -> Iterator[tuple[str, float, MatrixLoss]]:
    """Each part with its relative errors' mean, weighed by parameters, and its worst matrix."""
    for part in PARTS:
        own = [one for one in matrices if part_of(one.path) == part]
        if own:
            total = sum(one.parameters for one in own)
            mean = sum(one.relative_error * one.parameters for one in own) / total
            yield part, mean, max(own, key=lambda one: one.relative_error)


def differing_answers(found: Comparison) -> Iterator[str]:
    """Lines that show the answers that differ, and the tokens of the texts that differ most."""
    for pair in found.answers:
        if pair.equal_tokens == pair.tokens:
            continue
        about = f" ({pair.picture})" if pair.picture else ""
        yield f"{pair.question}{about}: {pair.equal_tokens} of {pair.tokens} tokens the same"
        yield f"  reference: {one_line(pair.reference)}"
        yield f"  compared:  {one_line(pair.other)}"
    for one in found.surprises:
        yield (
            f"...{one_line(one.context)} [{one_line(one.true)}]: reference says "
            f"{one.reference!r}, compared {one.other!r}, KL {one.kl_nats:.3g} nats"
        )


def one_line(text: str) -> str:
    """`text` without line breaks."""
    return " ".join(text.split())


def card_section(found: Comparison, plot: str | None = None) -> str:
    """Markdown that says what the conversion lost, for a model card; `plot` is its picture's name.

    It begins with a heading of the second level.
    """
    lines = [
        "## What the conversion lost",
        "",
        "Measured against the weights it was made from, activations in float32.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {_cell(text)} |" for name, text in summary_rows(found)),
    ]
    worst = sorted(found.matrices, key=lambda one: -one.relative_error)[:WORST]
    if worst and worst[0].relative_error:
        lines += ["", "The matrices with the greatest relative error:", ""]
        lines += ["| matrix | bits | relative error |", "| --- | --- | --- |"]
        lines += [f"| `{m.path}` | {m.bits or 'float'} | {m.relative_error:.4f} |" for m in worst]
    if plot:
        lines += ["", f"![Errors by matrix, by layer and by token]({plot})"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """`text` as a cell of a Markdown table."""
    return one_line(text).replace("|", "\\|")
