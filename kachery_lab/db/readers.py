"""The threads that read, each with a read-only connection of its own."""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from kachery_lab.db import connections
from kachery_lab.db.failures import too_slow, translate
from kachery_lab.db.jobs import Job, settle

# SQLite asks after so many steps of its virtual machine whether to go on: well under a millisecond of work.
STEPS_BETWEEN_CHECKS = 10_000


class Readers:
    """A queue served by `threads` readers. Each function sees one snapshot and is stopped at its job's deadline."""

    def __init__(self, path: Path, threads: int, busy_timeout: float) -> None:
        """Open the connections and start the threads. Raises `StartRefused`."""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._engine = create_engine(
            "sqlite+pysqlite://", creator=lambda: connections.open_reader(path, busy_timeout), poolclass=NullPool
        )
        opened: list[Connection] = []
        try:
            for _ in range(threads):
                opened.append(self._engine.connect())
        except BaseException:
            for connection in opened:
                connection.close()
            raise
        self._threads = [
            threading.Thread(target=self._serve, args=(connection,), name=f"database-reader-{number}", daemon=True)
            for number, connection in enumerate(opened)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        """Functions that wait for a thread."""
        return self._jobs.qsize()

    def submit(self, job: Job) -> None:
        """Queue a job; never after `close`."""
        self._jobs.put(job)

    def close(self) -> None:
        """Run what is queued (each job until its deadline at most), then close the connections."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._engine.dispose()

    def _serve(self, connection: Connection) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                try:
                    job.value = _read(connection, job)
                except BaseException as error:
                    job.error = translate(error)
                settle((job,))
                del job  # else the last answer stays in memory until the next question
        finally:
            connection.close()


def _read(connection: Connection, job: Job) -> Any:
    if job.future.done() or time.monotonic() >= job.deadline:
        raise too_slow()
    driver = connection.connection.driver_connection
    assert isinstance(driver, sqlite3.Connection)
    driver.set_progress_handler(lambda: time.monotonic() >= job.deadline, STEPS_BETWEEN_CHECKS)
    try:
        driver.execute("BEGIN")
        return job.call(connection)
    finally:
        driver.set_progress_handler(None, 0)
        if driver.in_transaction:
            driver.execute("ROLLBACK")
