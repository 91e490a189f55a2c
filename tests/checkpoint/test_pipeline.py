"""Ordered results of several threads: order, bound, errors, an end."""

import contextlib
import threading
import time

import pytest

from jaxquant.checkpoint.pipeline import ordered


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("jaxquant_")]


@pytest.mark.parametrize(("count", "ahead"), [(1, 1), (3, 2), (4, 8)])
def test_results_come_in_order(count, ahead):
    def work(i):
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(ordered(work, range(30), threads=count, ahead=ahead)) == [i * i for i in range(30)]
    assert not threads()


def test_threads_work_side_by_side():
    barrier = threading.Barrier(3, timeout=10)
    list(ordered(lambda _: barrier.wait(), range(9), threads=3, ahead=3))


def test_no_more_is_begun_than_allowed():
    begun = []
    results = ordered(begun.append, range(100), threads=2, ahead=5)
    for taken in range(1, 20):
        next(results)
        assert len(begun) <= taken + 4
    results.close()


def test_an_error_comes_in_its_turn_and_ends_everything():
    def work(i):
        if i >= 3:
            raise ValueError(i)
        return i

    results = ordered(work, range(100), threads=4, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="3"):
        next(results)
    assert not threads()


def test_an_error_of_the_consumer_ends_the_threads_and_drops_what_waits():
    begun = []

    def work(i):
        begun.append(i)
        time.sleep(0.01)

    def consume():
        with contextlib.closing(ordered(work, range(1000), threads=2, ahead=50)) as results:
            next(results)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert not threads()
    assert len(begun) < 60
