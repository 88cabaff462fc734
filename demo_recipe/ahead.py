"""Batches that are drawn before a step needs them, by other processes if wished."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Generic, TypeVar

Place = TypeVar("Place")
Made = TypeVar("Made")


class Ahead(Generic[Place, Made]):
    """What `make` makes of one place after the other, some of them ahead of time.

    Args:
        make: Without workers it runs in a thread; workers get it pickled.
        after: The place that follows another one, None after the last.
        workers: Processes.
    """

    def __init__(
        self,
        make: Callable[[Place], Made],
        after: Callable[[Place], Place | None],
        workers: int = 0,
    ) -> None:
        self._make, self._after = make, after
        self._pool: Executor = ThreadPoolExecutor(1)
        if workers:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(workers, mp_context=context)
        self._depth = 1 + 2 * workers
        self._begun: deque[tuple[Place, Future[Made]]] = deque()

    def at(self, place: Place) -> Made:
        """What is made of `place`; the next ones are begun."""
        if not self._begun or self._begun[0][0] != place:
            self._begun.clear()
            self._begin(place)
        _, future = self._begun.popleft()
        for following in self._follow(self._begun[-1][0] if self._begun else place):
            self._begin(following)
        return future.result()

    def _follow(self, last: Place) -> Iterator[Place]:
        while len(self._begun) < self._depth:
            following = self._after(last)
            if following is None:
                return
            yield following
            last = following

    def _begin(self, place: Place) -> None:
        self._begun.append((place, self._pool.submit(self._make, place)))
