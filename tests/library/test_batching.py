"""The micro-batcher runs what waits together, in order, and gives every thread its own answers and errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

import sidetuning as st
from sidetuning.serving.batching import Batcher, BusyError


class Model:
    """Squares numbers; runs only while it is let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()
        self.free.set()
        self.started = threading.Event()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.started.set()
        assert self.free.wait(10)
        if -1 in items:
            raise ValueError("negative")
        return [item * item for item in items]


def busy(model: Model, batcher: Batcher[int, int]) -> None:
    """Let the model work at one item until it is free again."""
    model.free.clear()
    batcher.submit([0])
    assert model.started.wait(10)


def test_what_waits_is_run_together_when_the_model_is_free() -> None:
    model = Model()
    batcher = Batcher(model, max_batch=4)
    busy(model, batcher)
    futures = [batcher.submit([n])[0] for n in range(1, 7)]
    assert batcher.waiting == 6
    model.free.set()
    assert [future.result(10) for future in futures] == [1, 4, 9, 16, 25, 36]
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]
    batcher.close()


def test_alone_an_item_waits_for_nothing_and_a_batch_that_is_to_wait_fills() -> None:
    batcher: Batcher[int, int] = Batcher(Model())
    start = time.perf_counter()
    assert batcher.submit([3])[0].result(10) == 9 and time.perf_counter() - start < 1
    batcher.close()
    model = Model()
    batcher = Batcher(model, max_batch=2, wait=5.0)
    first = batcher.submit([1])
    second = batcher.submit([2])
    # Full before its time.
    assert [first[0].result(2), second[0].result(2)] == [1, 4] and model.batches == [[1, 2]]
    batcher.close()


def test_an_error_belongs_to_the_item_that_made_it() -> None:
    model = Model()
    batcher = Batcher(model)
    busy(model, batcher)
    good, bad, other = batcher.submit([2, -1, 3])
    model.free.set()
    assert (good.result(10), other.result(10)) == (4, 9)
    with pytest.raises(ValueError, match="negative"):
        bad.result(10)
    batcher.close()


def test_a_cancelled_item_is_not_run() -> None:
    model = Model()
    batcher = Batcher(model, max_waiting=2)
    busy(model, batcher)
    left, gone = batcher.submit([1, 2])
    assert gone.cancel()
    # Nor does it take anybody's place.
    (other,) = batcher.submit([3])
    model.free.set()
    assert (left.result(10), other.result(10)) == (1, 9)
    batcher.close()
    assert model.batches == [[0], [1, 3]]


def test_too_many_are_refused_as_a_whole_and_none_after_it_was_closed() -> None:
    model = Model()
    batcher = Batcher(model, max_waiting=3)
    busy(model, batcher)
    futures = batcher.submit([1, 2])
    with pytest.raises(BusyError, match="2 inputs wait already"):
        batcher.submit([3, 4])
    # Asked again, there would be no more room.
    with pytest.raises(st.TaskError, match="3 may wait; send several requests"):
        batcher.submit([3, 4, 5, 6])
    assert batcher.waiting == 2
    closing = threading.Thread(target=batcher.close)
    closing.start()
    model.free.set()
    closing.join(10)
    # What waited was answered.
    assert [future.result(0) for future in futures] == [1, 4] and not batcher.alive
    with pytest.raises(BusyError, match="stopping"):
        batcher.submit([5])


def test_threads_get_their_own_answers() -> None:
    model = Model()
    batcher = Batcher(model, max_batch=8, max_waiting=10_000)

    def ask(number: int) -> bool:
        items = [number * 10 + k for k in range(3)]
        futures = batcher.submit(items)
        wait(futures, 10)
        return [future.result() for future in futures] == [item * item for item in items]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(300)))
    batcher.close()
    assert sum(map(len, model.batches)) == 900 and max(map(len, model.batches)) <= 8
