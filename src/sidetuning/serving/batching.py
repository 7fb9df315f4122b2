"""A micro-batcher: what waits while the model is busy is run together as soon as it is free. No HTTP, no torch."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

from sidetuning.errors import SideTuningError, TaskError

Item = TypeVar("Item")
Result = TypeVar("Result")


class BusyError(SideTuningError, RuntimeError):
    """More waits than may wait, or the batcher was closed."""


class Batcher(Generic[Item, Result]):
    """Runs items of many threads in batches, in one thread of its own.

    A batch is taken when the one before it has ended: alone, an item waits for nothing; under load, batches grow by
    themselves. First come, first served.

    Args:
        run: gives the results of some items, in their order.
        max_batch: items of a batch at most.
        max_waiting: items that may wait.
        wait: seconds that a batch which is not full waits for more; 0 gives the lowest latency.

    Attributes:
        waiting: how many items wait.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        *,
        max_batch: int = 32,
        max_waiting: int = 1024,
        wait: float = 0.0,
    ) -> None:
        self._run, self.max_batch, self.max_waiting, self.wait = run, max_batch, max_waiting, wait
        self._items: deque[tuple[Item, Future[Result]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many items wait."""
        return len(self._items)

    @property
    def alive(self) -> bool:
        """Whether items are taken."""
        return self._thread.is_alive() and not self._closed

    def submit(self, items: Sequence[Item]) -> list[Future[Result]]:
        """Queue items, all or none; a future each. One that is cancelled before its turn is not run.

        Raises:
            BusyError: too many wait already, or the batcher was closed.
            TaskError: there are more than may ever wait.
        """
        if len(items) > self.max_waiting:
            raise TaskError(f"{len(items)} inputs at a time, and {self.max_waiting} may wait; send several requests")
        with self._changed:
            if self._closed:
                raise BusyError("the server is stopping; ask another one, or again in a moment")
            if len(self._items) + len(items) > self.max_waiting:
                # Nobody waits for those that were given up.
                self._items = deque(pair for pair in self._items if not pair[1].cancelled())
            if len(self._items) + len(items) > self.max_waiting:
                raise BusyError(f"{len(self._items)} inputs wait already; ask again in a moment")
            futures: list[Future[Result]] = [Future() for _ in items]
            self._items.extend(zip(items, futures, strict=True))
            self._changed.notify()
        return futures

    async def results(self, items: Sequence[Item]) -> list[Result]:
        """What items come to, for a coroutine; those that are not run yet are cancelled where it is."""
        futures = self.submit(items)
        try:
            return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Take no more items, run those that wait, and return when all are done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            # From here on nobody can cancel them.
            running = [(item, future) for item, future in batch if future.set_running_or_notify_cancel()]
            if running:
                self._answer(running)

    def _next(self) -> list[tuple[Item, Future[Result]]]:
        """The next batch, as soon as there is one; empty when the batcher was closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            until = time.monotonic() + self.wait
            while len(self._items) < self.max_batch and not self._closed and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            return [self._items.popleft() for _ in range(min(len(self._items), self.max_batch))]

    def _answer(self, batch: list[tuple[Item, Future[Result]]]) -> None:
        """Run a batch. Where that fails, each item is run alone: an error belongs to the item that made it."""
        try:
            results = self._run([item for item, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            else:
                for each in batch:
                    self._answer([each])
            return
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(result)
