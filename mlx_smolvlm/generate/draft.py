"""Drafts of the next tokens, copied from the prompt and the answer so far (prompt lookup).

Why answers stay the same, and when drafting pays: docs/decisions/drafting.md.

Source: github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_smolvlm.generate.grammar import Constraint
from mlx_smolvlm.generate.sampling import MAX_DRAFT, Sampling

if TYPE_CHECKING:
    from mlx_smolvlm.generate.engine import Engine

NUMBER = -1  # stands for each token that is a number
LONGEST_MATCH = 6  # tokens of the suffix that are compared
COST = 0.2  # what a pass over a draft costs more than one over a single token, in such passes
MOST_SAVED = 3.0  # passes; what was saved long ago does not pay for misses now
SHORTEST_PAUSE, LONGEST_PAUSE = 4, 32  # tokens without a draft, after drafts that did not pay


class PromptLookup:
    """Finds what followed the longest suffix of the tokens where it last occurred before.

    A suffix of several tokens also matches one with other numbers in the same places, as in the
    rows of a table and in the locations of DocTags.

    Args:
        token_ids: The tokens so far.
        read_numbers: Returns the tokens that are numbers, and match each other. It is called at
            the first proposal, since a vocabulary takes a while to read.
        excluded: Tokens that are never proposed, such as image placeholders.
        ends: Tokens after which nothing is proposed.
    """

    def __init__(
        self,
        token_ids: np.ndarray,
        read_numbers: Callable[[], Collection[int]] = tuple,
        excluded: Collection[int] = (),
        ends: Collection[int] = (),
    ) -> None:
        self._read_numbers = read_numbers
        self._excluded, self._ends = frozenset(excluded), frozenset(ends)
        self._token_ids: list[int] = token_ids.tolist()
        self._kinds = list[int]()  # the tokens, with one id for all numbers
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram to the index after it
        self._similar: dict[tuple[int, ...], int] = {}  # the same for `_kinds`

    @cached_property
    def _numbers(self) -> frozenset[int]:
        return frozenset(self._read_numbers())

    def append(self, token_id: int) -> None:
        """Append a token."""
        self._token_ids.append(token_id)

    def propose(self, most: int) -> list[int]:
        """Return up to `most` tokens that may follow; none if no suffix occurred before.

        A copy that reaches the end of the tokens goes on with what it has copied.
        """
        if self._token_ids[-1:] and self._token_ids[-1] in self._excluded:
            return []  # it cannot be fed together with a draft
        self._index()
        start, length, proposal = self._find_follower(), len(self._token_ids), list[int]()
        while start is not None and len(proposal) < most:
            place = start + len(proposal)
            token_id = self._token_ids[place] if place < length else proposal[place - length]
            if token_id in self._excluded:
                break
            proposal.append(token_id)
            if token_id in self._ends:
                break
        return proposal

    def _find_follower(self) -> int | None:
        """Return the index of what followed the longest suffix; None if there is no match."""
        for n in range(min(LONGEST_MATCH, len(self._token_ids)), 0, -1):
            place = self._followers.get(tuple(self._token_ids[-n:]))
            if place is None and n > 1:
                place = self._similar.get(tuple(self._kinds[-n:]))
            if place is not None:
                return place
        return None

    def _index(self) -> None:
        """Index the n-grams before each new token; there are none before excluded tokens."""
        token_ids, kinds, numbers = self._token_ids, self._kinds, self._numbers
        for place in range(len(kinds), len(token_ids)):
            token_id = token_ids[place]
            if token_id not in self._excluded:
                for n in range(1, min(LONGEST_MATCH, place) + 1):
                    self._followers[tuple(token_ids[place - n : place])] = place
                    self._similar[tuple(kinds[place - n : place])] = place
            kinds.append(NUMBER if token_id in numbers else token_id)


class Governor:
    """Decides how many tokens to draft.

    It starts with one, doubles after a draft that was accepted as a whole, and halves after one
    of which nothing was. It keeps a balance of the passes that drafts have saved and of what they
    cost. When that is spent, it pauses, each time for longer; a hit makes the next pause short
    again.

    Args:
        most: Most tokens of a draft.
    """

    def __init__(self, most: int) -> None:
        self._most, self._width = most, 1
        self._balance, self._pause, self._left = 2 * COST, SHORTEST_PAUSE, 0

    @property
    def width(self) -> int:
        """Number of tokens to draft; 0 during a pause."""
        return 0 if self._left else self._width

    def count_token(self) -> None:
        """Count a token of the answer that no draft was made for."""
        self._left = max(0, self._left - 1)

    def record(self, drafted: int, accepted: int, passes: int = 1) -> None:
        """Learn from a draft of `drafted` tokens, of which `accepted` were right.

        It took `passes` forward passes, which also gave the token after the draft.
        """
        saved = accepted + 1 - passes
        self._balance = min(MOST_SAVED, self._balance + saved) - COST
        if accepted:
            self._pause = SHORTEST_PAUSE
        else:
            self._width = max(1, self._width // 2)
        if accepted == drafted >= self._width:
            self._width = min(self._most, 2 * self._width + 1)
        if self._balance < 0:
            self._left, self._balance = self._pause, COST / 2
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)


class Draft(NamedTuple):
    """Tokens that may follow, and which of them are guesses.

    Attributes:
        token_ids: The tokens.
        guesses: Indices of those that must equal the token that is sampled in their place. The
            others are forced by a grammar, given those before them.
        masks: Which tokens are allowed, bool (vocabulary,), at each guess and after the draft;
            None if all are.
        is_complete: Whether nothing may follow the draft.
    """

    token_ids: list[int]
    guesses: list[int]
    masks: list[mx.array] | None = None
    is_complete: bool = False

    @property
    def ends(self) -> list[int]:
        """For each number of right guesses, the number of tokens up to the next one."""
        return [*self.guesses, len(self.token_ids)]


NO_DRAFT = Draft([], [])


class Drafter:
    """Drafts the next tokens of one answer.

    Attributes:
        drafted: Number of tokens that were guessed.
        accepted: Number of those that were right.
    """

    def __init__(
        self, lookup: PromptLookup, governor: Governor, triggers: Collection[int] | None = None
    ) -> None:
        """Make a drafter.

        Args:
            lookup: Proposes tokens.
            governor: Says how many.
            triggers: Tokens of which one must occur in the answer before anything is drafted;
                None drafts from the beginning.
        """
        self.drafted = self.accepted = 0
        self._lookup, self._governor = lookup, governor
        self._triggers = None if triggers is None else frozenset(triggers)

    def append(self, token_id: int) -> None:
        """Append a token to the answer."""
        self._lookup.append(token_id)
        if self._triggers is not None and token_id in self._triggers:
            self._triggers = None

    def should_wait(self) -> bool:
        """Return whether to wait for the token that is being computed.

        A draft needs that token. Since waiting costs time, it is only worth it if there is a
        guess of this token too.
        """
        if self._width and self._lookup.propose(1):
            return True
        self._governor.count_token()
        return False

    def draft(self, most: int) -> Draft:
        """Draft up to `most` tokens; possibly none."""
        token_ids = self._lookup.propose(min(self._width, most))
        if not token_ids:
            self._governor.count_token()
            return NO_DRAFT
        return Draft(token_ids, [*range(len(token_ids))])

    def record(self, draft: Draft, accepted: int, passes: int = 1) -> None:
        """Count a draft of whose guesses the first `accepted` were right, after `passes`."""
        self.drafted += len(draft.guesses)
        self.accepted += accepted
        self._governor.record(len(draft.guesses), accepted, passes)

    @property
    def _width(self) -> int:
        """Number of tokens to draft; 0 if none are drafted now."""
        return 0 if self._triggers is not None else self._governor.width


def constrain_draft(proposal: Sequence[int], constraint: Constraint, most: int) -> Draft:
    """Return a draft of up to `most` tokens of `proposal` that `constraint` allows.

    They are appended to `constraint`. What the grammar forces is part of the draft, as it is of
    the answer; the draft ends where that differs from `proposal`.
    """
    token_ids, guesses, masks = list[int](), list[int](), list[mx.array]()
    while len(token_ids) < len(proposal) and [*proposal[: len(token_ids)]] == token_ids:
        guess = proposal[len(token_ids)]
        if constraint.is_complete or not constraint.allows(guess):
            break
        masks.append(constraint.compute_mask())
        guesses.append(len(token_ids))
        constraint.take(guess)
        token_ids += [guess, *constraint.take_forced(most - len(token_ids) - 1)]
    if guesses and not constraint.is_complete:
        masks.append(constraint.compute_mask())
    return Draft(token_ids, guesses, masks, constraint.is_complete)


def make_drafter(engine: Engine, input_ids: np.ndarray, sampling: Sampling) -> Drafter | None:
    """Return the drafter of an answer; None if there are no drafts.

    With `draft="auto"` these are answers that a grammar constrains, from the beginning, and
    documents, from the first tag of DocTags on. Only greedy answers are drafted.

    Args:
        engine: The engine.
        input_ids: The prompt (L,).
        sampling: How the answer is generated.
    """
    triggers = None
    if sampling.draft == "auto" and not sampling.is_constrained:
        triggers = engine.prompt_builder.document_token_ids
    if sampling.draft == "off" or sampling.temperature > 0 or triggers == frozenset():
        return None
    most = MAX_DRAFT if sampling.draft == "auto" else sampling.draft
    config, builder = engine.config, engine.prompt_builder
    excluded, ends = [config.image_token_id], config.eos_token_ids
    lookup = PromptLookup(input_ids, lambda: builder.number_token_ids, excluded, ends)
    return Drafter(lookup, Governor(most), triggers)
