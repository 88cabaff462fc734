"""Which of several precisions each matrix gets, so that the damage is least within a size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mlx_smolvlm.config import Quantization

STEPS = 30000  # sizes are counted in so many parts of the range that is possible


@dataclass(frozen=True)
class Choice:
    """A precision that a matrix can have: None is float; its bytes, and the damage it does."""

    quantization: Quantization | None
    nbytes: int
    damage: float


def choose(choices: Mapping[str, list[Choice]], budget: int) -> dict[str, Choice] | None:
    """A choice for each path, of least total damage within `budget` bytes; None if none fits.

    The knapsack is solved exactly up to its unit: bytes above the smallest choice are rounded
    up to a `STEPS`th of what is possible. The unit does not depend on the budget, so
    more bytes never do more damage.
    """
    smallest = {path: min(one.nbytes for one in many) for path, many in choices.items()}
    largest = {path: max(one.nbytes for one in many) for path, many in choices.items()}
    spare = budget - sum(smallest.values())
    if spare < 0:
        return None
    unit = max(1, (sum(largest.values()) - sum(smallest.values())) // STEPS)
    room = min(spare // unit, STEPS + 2 * len(choices) + 2)
    best, picks = np.zeros(room + 1), []  # least damage of what came before, by units spent
    for path, many in choices.items():
        least, pick = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int16)
        for number, one in enumerate(many):
            cost = -(-(one.nbytes - smallest[path]) // unit)
            if cost > room:
                continue
            tried = best[: room + 1 - cost] + one.damage
            better = tried < least[cost:]
            least[cost:][better], pick[cost:][better] = tried[better], number
        best = least
        picks.append((path, pick))
    result, left = {}, room
    for path, pick in reversed(picks):
        result[path] = one = choices[path][pick[left]]
        left -= -(-(one.nbytes - smallest[path]) // unit)
    return {path: result[path] for path in choices}
