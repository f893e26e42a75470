"""Short disk operations that arrive together share one thread and one way back to the event loop.

Handing one operation to a thread costs more than reading a small file. One thread therefore works off whatever is
waiting; while something waits longer than `STALL` (a slow or hung mount) one more thread helps, up to all there are.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from kachery_lab.blobs.threads import Threads

STALL = 0.001
MOST_TOGETHER = 32

_Done = list[tuple[asyncio.Future[Any], Any, BaseException | None]]


class Gather:
    """The waiting operations of one event loop. All methods but `_pull` run on the loop."""

    def __init__(self, pool: Threads, most_threads: int) -> None:
        self._pool = pool
        self._most = most_threads
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._threads = 0
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, call: Callable[[], Any]) -> asyncio.Future[Any]:
        """The result to come. A future that is done before its turn (cancelled, expired) is skipped."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((call, future))
        if self._threads == 0:
            self._start(loop)
        elif self._timer is None:
            self._timer = loop.call_later(STALL, self._reinforce, loop)
        return future

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._pool.begin(self._pull, loop)
        self._threads += 1

    def _reinforce(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiting and self._threads < self._most:
            self._start(loop)
            self._timer = loop.call_later(STALL, self._reinforce, loop)

    def _pull(self, loop: asyncio.AbstractEventLoop) -> None:
        done: _Done = []
        until = time.monotonic() + STALL
        # What is done must not wait for long behind what is slow.
        while len(done) < MOST_TOGETHER and time.monotonic() < until:
            try:
                call, future = self._waiting.popleft()
            except IndexError:
                break
            if future.done():
                continue
            try:
                done.append((future, call(), None))
            except BaseException as error:
                done.append((future, None, error))
        try:
            loop.call_soon_threadsafe(self._deliver, loop, done)
        except RuntimeError:
            pass  # the loop is closed: nobody waits any more

    def _deliver(self, loop: asyncio.AbstractEventLoop, done: _Done) -> None:
        self._threads -= 1
        if self._waiting:
            self._start(loop)
        for future, value, error in done:
            settle(future, value, error)


def settle(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    """Hand an outcome over, on the loop, unless nobody waits for it any more."""
    if future.done():
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
