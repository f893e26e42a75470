"""The pool of threads behind all work on the volume."""

from __future__ import annotations

import threading

import pytest

from kachery_lab.blobs.threads import Threads
from tests.faults.report import wait_for


def test_a_thread_begins_only_when_none_is_idle() -> None:
    pool = Threads(8, "few")
    names = set()
    for _ in range(50):
        names.add(pool.submit(lambda: threading.current_thread().name).result(60))
        wait_for(lambda: pool._idle == 1, "the thread waits for its next call")
    assert names == {"few_1"}
    pool.shutdown()


def test_calls_run_beside_each_other_up_to_the_most() -> None:
    pool = Threads(4, "many")
    together = threading.Barrier(4)
    futures = [pool.submit(together.wait, 60) for _ in range(4)]
    assert sorted(future.result(60) for future in futures) == [0, 1, 2, 3]
    release, running = threading.Event(), threading.Semaphore(0)

    def hang() -> None:
        running.release()
        release.wait(60)

    hung = [pool.submit(hang) for _ in range(4)]
    for _ in hung:
        assert running.acquire(timeout=60)
    waiting = pool.submit(lambda: 5)
    assert not waiting.done()
    assert pool._started == 4
    release.set()
    assert waiting.result(60) == 5
    pool.shutdown()


def test_an_error_reaches_the_caller_and_leaves_the_thread() -> None:
    pool = Threads(1, "one")
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 // 0).result(60)
    assert pool.submit(lambda: 1).result(60) == 1
    pool.shutdown()


def test_threads_end_and_nothing_is_taken_afterwards() -> None:
    before = set(threading.enumerate())
    pool = Threads(3, "ending")
    assert pool.submit(lambda: 1).result(60) == 1
    mine = set(threading.enumerate()) - before
    assert mine
    pool.shutdown()
    for thread in mine:
        thread.join(60)
        assert not thread.is_alive()
    with pytest.raises(RuntimeError):
        pool.begin(lambda: None)


def test_what_waits_is_dropped_on_demand() -> None:
    pool = Threads(1, "dropping")
    release, running, done = threading.Event(), threading.Event(), []

    def hang() -> None:
        running.set()
        release.wait(60)

    hung = pool.submit(hang)
    assert running.wait(60)
    pool.begin(done.append, 1)
    pool.shutdown(cancel_futures=True)
    release.set()
    hung.result(60)
    for thread in threading.enumerate():
        if thread.name.startswith("dropping"):
            thread.join(60)
    assert done == []
