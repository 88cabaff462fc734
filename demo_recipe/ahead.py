"""Draws batches before a step needs them, in a thread or in worker processes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Generic, TypeVar

Place = TypeVar("Place")
Made = TypeVar("Made")


class Ahead(Generic[Place, Made]):
    """Calls `make` for one place after another, ahead of time.

    Args:
        make: Runs in a thread, or pickled in worker processes.
        after: Returns the place that follows another, None after the last.
        workers: The number of worker processes; 0 uses a thread.
    """

    def __init__(
        self,
        make: Callable[[Place], Made],
        after: Callable[[Place], Place | None],
        workers: int = 0,
    ) -> None:
        self._make, self._find_next = make, after
        self._pool: Executor = ThreadPoolExecutor(1)
        if workers:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context)
        self._depth = 1 + 2 * workers
        self._pending: deque[tuple[Place, Future[Made]]] = deque()

    def get(self, place: Place) -> Made:
        """Return the result for `place`, and start the next ones."""
        if not self._pending or self._pending[0][0] != place:
            self._pending.clear()
            self._begin(place)
        _, future = self._pending.popleft()
        for following in self._follow(self._pending[-1][0] if self._pending else place):
            self._begin(following)
        return future.result()

    def _follow(self, last: Place) -> Iterator[Place]:
        while len(self._pending) < self._depth:
            following = self._find_next(last)
            if following is None:
                return
            yield following
            last = following

    def _begin(self, place: Place) -> None:
        self._pending.append((place, self._pool.submit(self._make, place)))
