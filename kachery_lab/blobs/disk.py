"""The bounded thread pool in which all work on the volume runs, and the one table errno -> error.

The event loop never touches the volume: a hung mount blocks threads of this pool only, and callers get Unavailable at
their deadline.
"""

from __future__ import annotations

import asyncio
import errno
import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar

from kachery_lab.blobs.gather import Gather, settle
from kachery_lab.blobs.threads import Threads
from kachery_lab.errors import KacheryLabError, NotFound, StorageFull, Unavailable

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")

_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
TROUBLE_LIMIT = 3
"""Failures of the volume after which the node calls itself not ready, until a probe succeeds."""


def from_os_error(error: OSError) -> KacheryLabError:
    """The error a caller is told. Paths stay out of the text: they are the lab's business, not the client's."""
    reason = errno.errorcode.get(error.errno or 0, "unknown error")
    if error.errno in _ABSENT:
        return NotFound("no such file on the volume")
    if error.errno in _FULL:
        return StorageFull(f"the storage is full ({reason})", hint="Free space on the storage volume, then try again")
    return Unavailable(f"the storage cannot be used at the moment ({reason})", hint="Look at the server's log")


class Disk:
    """Runs blocking file work in at most `workers` threads; one operation may take `deadline` seconds."""

    def __init__(self, workers: int = 24, deadline: float = 30.0) -> None:
        self.deadline = deadline
        self.trouble = 0
        self._pool = Threads(workers, "disk")
        self._short = Gather(self._pool, workers)

    @property
    def executor(self) -> Executor:
        """For libraries that take an executor."""
        return self._pool

    async def run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Result of `fn`. Raises what `from_os_error` says for an OSError, Unavailable after the deadline.

        A function that outlives its deadline still ends in its thread; what it opened must close itself when dropped.
        """
        return await self._within_deadline(self._begin(functools.partial(fn, *args, **kwargs)))

    async def run_short(self, fn: Callable[[A], T], argument: A) -> T:
        """As `run`, for what takes microseconds on a healthy volume: operations that come together share a thread."""
        return await self._within_deadline(self._short.submit(functools.partial(fn, argument)))

    def _begin(self, call: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._pool.begin(_work, loop, future, call)
        return future

    async def _within_deadline(self, future: asyncio.Future[T]) -> T:
        timer = asyncio.get_running_loop().call_later(self.deadline, _expire, future)
        try:
            return await future
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                raise self._late() from None
            raise self._failed(error) from error
        finally:
            timer.cancel()

    async def run_long(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """As `run`, without a deadline: for work whose length follows the size of a file."""
        try:
            return await self._begin(functools.partial(fn, *args, **kwargs))
        except OSError as error:
            raise self._failed(error) from error

    def _late(self) -> Unavailable:
        self.trouble += 1
        return Unavailable(f"the storage did not answer within {self.deadline:g} s", hint="Look at the volume's mount")

    def _failed(self, error: OSError) -> KacheryLabError:
        known = from_os_error(error)
        if isinstance(known, Unavailable):
            self.trouble += 1
        return known

    def close(self) -> None:
        """Let the threads end. Does not wait for one that hangs on the volume."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _work(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], call: Callable[[], Any]) -> None:
    """One operation in a thread of the pool. Lighter than a future that is chained to another."""
    value = error = None
    try:
        value = call()
    except BaseException as failure:
        error = failure
    try:
        loop.call_soon_threadsafe(settle, future, value, error)
    except RuntimeError:
        pass  # the loop is closed: nobody waits any more


def _expire(future: asyncio.Future[Any]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())
