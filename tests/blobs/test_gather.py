"""Short disk operations that share a thread."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.gather import Gather
from kachery_lab.blobs.threads import Threads
from kachery_lab.errors import NotFound, Unavailable


def test_each_caller_gets_its_own_result_or_error() -> None:
    def work(number: int) -> int:
        if number % 10 == 3:
            raise FileNotFoundError(2, "absent")
        return number * 2

    async def run() -> list[object]:
        disk = Disk()
        try:
            return await asyncio.gather(*(disk.run_short(work, n) for n in range(100)), return_exceptions=True)
        finally:
            disk.close()

    for number, found in enumerate(asyncio.run(run())):
        assert isinstance(found, NotFound) if number % 10 == 3 else found == number * 2


def test_operations_that_come_together_share_a_thread() -> None:
    used: set[str] = set()

    async def run() -> None:
        with Threads(8, "test") as pool:
            gather = Gather(pool, 8)
            await asyncio.gather(*(gather.submit(lambda: used.add(threading.current_thread().name)) for _ in range(20)))

    asyncio.run(run())
    assert len(used) <= 2


def test_others_do_not_wait_behind_one_that_hangs() -> None:
    release = threading.Event()

    async def run() -> float:
        disk = Disk(deadline=60.0)
        hung = asyncio.ensure_future(disk.run_short(lambda _: release.wait(60), 0))
        await asyncio.sleep(0.02)
        begun = time.monotonic()
        assert await asyncio.gather(*(disk.run_short(lambda n: n, n) for n in range(50))) == list(range(50))
        seconds = time.monotonic() - begun
        release.set()
        assert await hung
        disk.close()
        return seconds

    assert asyncio.run(run()) < 30


def test_the_deadline_counts_as_trouble() -> None:
    release = threading.Event()

    async def run() -> int:
        disk = Disk(deadline=0.1)
        with pytest.raises(Unavailable):
            await disk.run_short(lambda _: release.wait(5), 0)
        release.set()
        assert await disk.run_short(lambda n: n + 1, 1) == 2
        disk.close()
        return disk.trouble

    assert asyncio.run(run()) == 1
