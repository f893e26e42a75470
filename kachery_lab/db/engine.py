"""The database as the rest of the program sees it: `read(fn)` and `write(fn)`.

A function gets a SQLAlchemy `Connection` that is already inside a transaction and belongs to it until it returns. It
returns plain values (never an open result), does not commit or roll back, does not wait for anything but the
database, and lets database errors other than `IntegrityError` pass; for a part that may fail it uses
`with connection.begin_nested()`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection

from kachery_lab.db.connections import create_private
from kachery_lab.db.failures import closed, too_slow
from kachery_lab.db.jobs import Job
from kachery_lab.db.readers import Readers
from kachery_lab.db.writer import Writer
from kachery_lab.errors import Unavailable

T = TypeVar("T")

MAX_QUEUED = 20_000


class Database:
    """One SQLite file with one writing thread and a small pool of reading threads."""

    def __init__(self, writer: Writer, readers: Readers, read_timeout: float) -> None:
        self._writer = writer
        self._readers = readers
        self._read_timeout = read_timeout
        self._closed = False
        # Nothing may be queued behind the mark that ends a worker: its waiter would wait for ever.
        self._gate = threading.Lock()

    @classmethod
    def open(
        cls, path: Path, *, read_threads: int = 4, read_timeout: float = 10.0, busy_timeout: float = 5.0
    ) -> Database:
        """Open the database; blocks. An absent file is made (0600), without tables.

        Raises `StartRefused` when the file is no database, cannot be opened, or SQLite does not take a setting that the
        promise of a durable write rests on.
        """
        create_private(path)
        # The writer first: it recovers the log of a killed process, which a read-only connection may not be able to.
        writer = Writer(path, busy_timeout)
        try:
            readers = Readers(path, read_threads, busy_timeout)
        except BaseException:
            writer.close()
            raise
        return cls(writer, readers, read_timeout)

    def close(self) -> None:
        """Finish what is queued, fold the log into the file, close; blocks. Closing twice is no error."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        # The writer last: the last connection that closes is the one that may checkpoint.
        self._readers.close()
        self._writer.close()

    @property
    def commits(self) -> int:
        """Groups committed since `open`."""
        return self._writer.commits

    @property
    def writes(self) -> int:
        """Functions in committed groups since `open`, also those that failed by themselves."""
        return self._writer.writes

    @property
    def queued_writes(self) -> int:
        """Functions that wait for the writer."""
        return self._writer.queued

    @property
    def queued_reads(self) -> int:
        """Functions that wait for a reader."""
        return self._readers.queued

    async def write(self, fn: Callable[[Connection], T], *, single: bool = False) -> T:
        """Run `fn` in an immediate transaction and return its value once that is durable.

        What `fn` raises undoes `fn` alone and is raised here. Raises `Unavailable` when the database is locked for
        longer than the busy timeout, cannot be written, or is closed, and `StorageFull` when it cannot grow; then
        nothing of `fn` is seen (after a failed fsync and a power cut it may still come back). Cancelling the caller
        does not stop `fn`. `single`: `fn` runs one statement and raises nothing else, so it needs no savepoint.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._submit_write(Job(fn, future, loop, single=single))
        return await _answer(future)

    def write_sync(self, fn: Callable[[Connection], T]) -> T:
        """The same for code outside an event loop, which it blocks."""
        if self._writer.is_current_thread():
            raise RuntimeError("a write function cannot wait for another write")
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._submit_write(Job(fn, future))
        return future.result()

    async def read(self, fn: Callable[[Connection], T], *, timeout: float | None = None) -> T:
        """Run `fn` on one snapshot, on a connection that cannot write, and return its value.

        Raises `Unavailable` at the time limit (`timeout` seconds, else the one given to `open`), in which waiting for a
        thread counts, and where `write` would. What `fn` raises is raised here. Cancelling the caller stops the query.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        limit = self._read_timeout if timeout is None else timeout
        job = Job(fn, future, loop, time.monotonic() + limit)
        self._submit_read(job)
        # The thread stops a long query by itself; the timer answers also when the thread hangs on the disk.
        timer = loop.call_later(limit, _expire, future)
        try:
            return await _answer(future)
        except asyncio.CancelledError:
            job.deadline = 0.0
            raise
        finally:
            timer.cancel()

    def read_sync(self, fn: Callable[[Connection], T], *, timeout: float | None = None) -> T:
        """The same for code outside an event loop, which it blocks; `timeout=math.inf` for maintenance: no limit."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        limit = self._read_timeout if timeout is None else timeout
        self._submit_read(Job(fn, future, None, time.monotonic() + limit))
        try:
            return future.result(limit if limit < threading.TIMEOUT_MAX else None)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise  # the function's own TimeoutError
            future.cancel()
            raise too_slow() from None

    def _submit_write(self, job: Job) -> None:
        with self._gate:
            if self._closed:
                raise closed()
            if self._writer.queued >= MAX_QUEUED:
                raise Unavailable("too many writes are waiting for the database")
            self._writer.submit(job)

    def _submit_read(self, job: Job) -> None:
        with self._gate:
            if self._closed:
                raise closed()
            if self._readers.queued >= MAX_QUEUED:
                raise Unavailable("too many reads are waiting for the database")
            self._readers.submit(job)


async def _answer(future: asyncio.Future[T]) -> T:
    try:
        return await future
    except asyncio.CancelledError:
        if future.done() and not future.cancelled():
            future.exception()  # seen: else asyncio logs an error that nobody was there to receive
        raise


def _expire(future: asyncio.Future[T]) -> None:
    if not future.done():
        future.set_exception(too_slow())
