"""A function on its way to a database thread, and its answer on the way back."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.engine import Result


class Job:
    """One function with the future of whoever waits for it. The thread that runs it fills `value` or `error`."""

    __slots__ = ("deadline", "error", "fn", "future", "loop", "single", "value")

    def __init__(
        self,
        fn: Callable[[Connection], Any],
        future: asyncio.Future[Any] | concurrent.futures.Future[Any],
        loop: asyncio.AbstractEventLoop | None = None,
        deadline: float = 0.0,
        single: bool = False,
    ) -> None:
        self.fn = fn
        self.future = future
        self.loop = loop
        self.deadline = deadline
        self.single = single
        self.value: Any = None
        self.error: BaseException | None = None

    def call(self, connection: Connection) -> Any:
        """Run the function. Raises what it raises, and `TypeError` when it hands out an open result."""
        value = self.fn(connection)
        if isinstance(value, Result):
            value.close()
            # An open result would keep its snapshot, and with it the write-ahead log, for as long as somebody holds it.
            raise TypeError("a database function returns values (.all(), .scalar(), ...), not a Result")
        return value


def settle(jobs: Iterable[Job]) -> None:
    """Hand the outcomes over; one wake-up per event loop however many jobs there are."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.loop is None:
            _resolve(job)
        else:
            by_loop[job.loop].append(job)
    for loop, waiting in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve_all, waiting)
        except RuntimeError:
            continue  # that loop is closed: nobody waits there any more


def _resolve_all(jobs: list[Job]) -> None:
    for job in jobs:
        _resolve(job)


def _resolve(job: Job) -> None:
    if job.future.done():
        return  # the waiter was cancelled or has given up
    if job.error is None:
        job.future.set_result(job.value)
    elif isinstance(job.error, StopIteration):
        # Futures refuse StopIteration, which would leave the waiter waiting for ever.
        wrapped = RuntimeError("a database function raised StopIteration")
        wrapped.__cause__ = job.error
        job.future.set_exception(wrapped)
    else:
        job.future.set_exception(job.error)
