"""Which examples a batch holds: a pure function of its number.

Examples come in the shares of a mixture, each dataset walking through one shuffled epoch after
the other. A window of them is sorted by length and cut into batches, so that a batch holds
examples of about one length and little is padded; the batches of a window are then shuffled.
Lengths that are padded to the same are not told apart: else answers of equal length, which are
often equal answers, would come in batches of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 32  # batches that are sorted together
ROUND = 32  # lengths of batches are multiples of it, so that buffers can be used again
_GOLDEN = 0.6180339887498949  # multiples of it fill the unit interval evenly


def padded(length: int) -> int:
    """Tokens that a row of `length` takes in a batch of such rows."""
    return -(-length // ROUND) * ROUND


class Order:
    """Batches of examples; an example is (dataset, index)."""

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        shares: Sequence[float] | None,
        batch_size: int,
        batches: int,
        seed: int,
    ) -> None:
        """An order of `batches` batches.

        Args:
            lengths: Of the examples of each dataset, in tokens.
            shares: How much of the mixture each dataset is, in any unit; None takes all
                examples alike.
            batch_size: Examples of a batch.
            batches: How many there will be; the last window ends with them.
            seed: What the order follows from.
        """
        self._lengths, self._size, self._seed = lengths, batch_size, seed
        self._total = batches * batch_size
        own = [[(d, i) for i in range(len(many))] for d, many in enumerate(lengths)]
        self._pools = [[one for many in own for one in many]] if shares is None else own
        parts = np.cumsum([1.0] if shares is None else shares)
        self._bounds = parts[:-1] / parts[-1]
        self._window = -1
        self._batches: list[list[tuple[int, int]]] = []
        self._drawn = np.zeros((1, len(self._pools)), int)  # before each window
        self._shuffled: dict[int, tuple[int, np.ndarray]] = {}  # epoch and order, by pool

    def batch(self, number: int) -> list[tuple[int, int]]:
        """The examples of the batch `number`."""
        window, place = divmod(number, WINDOW)
        if window != self._window:
            self._batches, self._window = self._cut(window), window
        return self._batches[place]

    def _cut(self, window: int) -> list[list[tuple[int, int]]]:
        """The batches of a window."""
        while len(self._drawn) <= window:
            last = len(self._drawn) - 1
            counts = np.bincount(self._pools_of(last), minlength=len(self._pools))
            self._drawn = np.vstack([self._drawn, self._drawn[last] + counts])
        places, found = self._drawn[window].copy(), []
        for pool in self._pools_of(window):
            found.append(self._example(int(pool), int(places[pool])))
            places[pool] += 1
        found.sort(key=lambda one: padded(self._lengths[one[0]][one[1]]))
        batches = [found[at : at + self._size] for at in range(0, len(found), self._size)]
        order = np.random.default_rng([self._seed, 1, window]).permutation(len(batches))
        return [batches[i] for i in order]

    def _pools_of(self, window: int) -> np.ndarray:
        """The pool of each draw of a window."""
        start = window * WINDOW * self._size
        draws = np.arange(start, min(start + WINDOW * self._size, self._total))
        offset = np.random.default_rng([self._seed, 2]).random()
        return np.searchsorted(self._bounds, (draws * _GOLDEN + offset) % 1, side="right")

    def _example(self, pool: int, place: int) -> tuple[int, int]:
        """The example that a pool gives when `place` were drawn from it before."""
        many: list[tuple[int, int]] = self._pools[pool]
        epoch, place = divmod(place, len(many))
        if pool not in self._shuffled or self._shuffled[pool][0] != epoch:
            rng = np.random.default_rng([self._seed, 3, pool, epoch])
            self._shuffled[pool] = (epoch, rng.permutation(len(many)))
        return many[int(self._shuffled[pool][1][place])]
