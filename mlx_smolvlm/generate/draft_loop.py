"""The generation loops with drafts: the tokens of a draft go through the decoder together.

They yield the tokens that the loops without drafts, in `generate/loop.py`, sample greedily.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_smolvlm.generate.draft import NO_DRAFT, Draft, Drafter, constrain_draft
from mlx_smolvlm.generate.grammar import Constraint
from mlx_smolvlm.generate.loop import prefill, read_token_id
from mlx_smolvlm.generate.sampling import MAX_DRAFT
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.model.model import Model

# How far the largest logit must be above the others, by the type of the logits, for a token to
# be taken from a pass over several tokens (docs/decisions/drafting.md).
MARGINS = {mx.float32: 1e-3, mx.float16: 0.05, mx.bfloat16: 0.3}


class Verdict(NamedTuple):
    """What the model says to a draft.

    Attributes:
        accepted: Number of guesses that are right.
        token_id: The token after them and what they force; None if nothing may follow.
        passes: Number of forward passes that it took.
    """

    accepted: int
    token_id: int | None
    passes: int = 1


def generate_drafted_tokens(
    model: Model, inputs_embeds: mx.array, cache: KVCache, drafter: Drafter, max_tokens: int
) -> Generator[int, None, None]:
    """Yield up to `max_tokens` token ids that follow `inputs_embeds` (1, L, D), sampled greedily.

    While the drafter does not wait, the device is a token ahead, as in `generate_tokens`. The
    cache may hold tokens beyond those that were yielded.
    """
    drawn, is_known = _start_sampling(prefill(model, inputs_embeds, cache)), False
    left = max_tokens
    while left > 0:
        left -= 1
        draft, is_read = NO_DRAFT, is_known or drafter.should_wait()
        if is_read:
            drafter.append(read_token_id(drawn))
            if cache.can_undo(1 + MAX_DRAFT):
                draft = drafter.draft(left - 1)
        if not draft.token_ids:
            following = _start_sampling(model.step(drawn, cache)) if left else drawn
            if not is_read:
                drafter.append(read_token_id(drawn))
            yield read_token_id(drawn)
            drawn, is_known = following, False
            continue
        yield read_token_id(drawn)
        verdict = verify(model, cache, [read_token_id(drawn)], draft)
        drafter.record(draft, verdict.accepted, verdict.passes)
        for token_id in draft.token_ids[: verdict.accepted]:
            drafter.append(token_id)
            left -= 1
            yield token_id
        drawn, is_known = mx.array([verdict.token_id]), True


def generate_drafted_constrained_tokens(
    model: Model,
    inputs_embeds: mx.array,
    cache: KVCache,
    drafter: Drafter,
    constraint: Constraint,
    max_tokens: int,
) -> Generator[int, None, None]:
    """Yield up to `max_tokens` token ids that follow `inputs_embeds` (1, L, D) and are allowed.

    They are sampled greedily. Forced tokens go through the decoder with the others, as in
    `generate_constrained_tokens`. The cache may hold tokens beyond those that were yielded.
    """
    new = constraint.take_forced(max_tokens)
    if new:
        inputs_embeds = mx.concatenate([inputs_embeds, model.embed(np.array(new))], axis=1)
    logits, left = prefill(model, inputs_embeds, cache), max_tokens - len(new)
    pending, token_id = new, None
    while left and not constraint.is_complete:
        if token_id is None:
            mx.async_eval(logits)
            token_id = read_token_id(_start_sampling(logits, constraint.compute_mask()))
        constraint.take(token_id)
        new = [token_id, *constraint.take_forced(left - 1)]
        left, token_id = left - len(new), None
        for one in (*pending, *new):
            drafter.append(one)
        is_over = not left or constraint.is_complete
        proposal = [] if is_over else drafter.draft(left).token_ids
        if not proposal and not is_over:
            logits = prefill(model, model.embed(np.array(new)), cache)
            mx.async_eval(logits)
        yield from (*pending, *new)
        pending = []
        if not proposal:
            continue
        draft = constrain_draft(proposal, constraint, left)
        if not draft.token_ids or not cache.can_undo(len(new) + len(draft.token_ids)):
            constraint.undo(len(draft.token_ids))
            logits = prefill(model, model.embed(np.array(new)), cache)
            continue
        verdict = verify(model, cache, new, draft)
        drafter.record(draft, verdict.accepted, verdict.passes)
        right = draft.token_ids[: draft.ends[verdict.accepted]]
        constraint.undo(len(draft.token_ids) - len(right))
        left, token_id = left - len(right), verdict.token_id
        for one in right:
            drafter.append(one)
        yield from right
    mx.eval(logits)
    yield from pending


def verify(model: Model, cache: KVCache, new: Sequence[int], draft: Draft) -> Verdict:
    """Feed `new` and `draft`, and compare each guess with the token that is sampled there.

    The cache keeps `new`, the right guesses and what they force. Where the largest logit is not
    clearly above the others, the last token is fed again, alone, as it would be without a draft.
    """
    start, fed = cache.offset, [*new, *draft.token_ids]
    ends = draft.guesses if draft.is_complete else draft.ends
    rows = [len(new) - 1 + end for end in ends]  # of which logits are needed
    hidden_states = model.text_model(model.embed(np.array(fed)), cache)[0]
    logits = model.head(hidden_states[mx.array(rows)])  # (rows, vocabulary)
    if draft.masks is not None:
        logits = mx.where(mx.stack(draft.masks), logits, -mx.inf)
    token_ids, is_clear = _sample_rows(logits)
    guesses = [draft.token_ids[place] for place in draft.guesses]
    verdicts = zip(is_clear, token_ids, guesses, strict=False)
    is_right = [clear and token_id == guess for clear, token_id, guess in verdicts]
    accepted = [*is_right, False].index(False)
    if accepted == len(rows):
        return Verdict(accepted, None)
    last = rows[accepted]
    if is_clear[accepted]:
        cache.trim(start + last + 1)
        return Verdict(accepted, token_ids[accepted])
    cache.trim(start + last)
    logits = model.step(mx.array(fed[last : last + 1]), cache)
    mask = None if draft.masks is None else draft.masks[accepted]
    return Verdict(accepted, read_token_id(_start_sampling(logits, mask)), passes=2)


def _start_sampling(logits: mx.array, mask: mx.array | None = None) -> mx.array:
    """Start to sample the token id (1,) from `logits` (vocabulary,), and return it."""
    allowed = logits if mask is None else mx.where(mask, logits, -mx.inf)
    token_id = mx.argmax(allowed, keepdims=True)
    mx.async_eval(token_id)
    return token_id


def _sample_rows(logits: mx.array) -> tuple[list[int], list[bool]]:
    """Sample from each row of `logits` (B, vocabulary).

    Returns:
        The token ids, and whether each one's logit is clearly above the others.
    """
    token_ids, largest = mx.argmax(logits, axis=-1), logits.max(-1, keepdims=True)
    rivals = (logits >= largest - MARGINS[logits.dtype]).sum(-1)
    mx.eval(token_ids, rivals)
    return np.array(token_ids).tolist(), (np.array(rivals) == 1).tolist()
