"""The one thread that writes. Writes that are queued together share one commit, and one fsync."""

from __future__ import annotations

import queue
import sqlite3
import threading
from contextlib import suppress
from pathlib import Path

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.pool import NullPool

from kachery_lab.db import connections
from kachery_lab.db.failures import LOCKED, commit_failure, result_code, translate
from kachery_lab.db.jobs import Job, settle

MAX_GROUP = 256


class Writer:
    """Owns the writing connection. Each group runs in one BEGIN IMMEDIATE, each of its functions in a savepoint; a
    single statement needs none, as SQLite undoes one that fails.

    Outcomes are handed over after the commit; when the group does not get committed, each waiter gets the reason
    instead, also one whose function had failed by itself: what that function saw may have been a neighbour's
    uncommitted change.
    """

    def __init__(self, path: Path, busy_timeout: float) -> None:
        """Open the connection and start the thread. Raises `StartRefused`."""
        self.commits = 0
        self.writes = 0
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._inside_function = False
        self._engine = create_engine(
            "sqlite+pysqlite://", creator=lambda: connections.open_writer(path, busy_timeout), poolclass=NullPool
        )
        event.listen(self._engine, "commit", self._refuse_end)
        event.listen(self._engine, "rollback", self._refuse_end)
        self._connection: Connection | None = None
        self._driver: sqlite3.Connection | None = None
        self._connect()
        self._thread = threading.Thread(target=self._serve, name="database-writer", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        """Functions that wait for their group."""
        return self._jobs.qsize()

    def submit(self, job: Job) -> None:
        """Queue a job; never after `close`."""
        self._jobs.put(job)

    def is_current_thread(self) -> bool:
        """Whether the caller is itself a write function."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Run what is queued, then close; the log is folded into the database file when no other connection is open."""
        self._jobs.put(None)
        self._thread.join()

    def _serve(self) -> None:
        stopping = False
        while not stopping:
            job = self._jobs.get()
            if job is None:
                break
            group = [job]
            while len(group) < MAX_GROUP and not stopping:
                try:
                    following = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    stopping = True
                else:
                    group.append(following)
            self._run(group)
        self._disconnect()
        self._engine.dispose()

    def _run(self, group: list[Job]) -> None:
        try:
            connection, driver = self._connect()
            driver.execute("BEGIN IMMEDIATE")
        except Exception as error:
            if result_code(error) not in LOCKED:
                self._disconnect()  # it may be the connection that is broken: the next group opens a new one
            # Everybody who waits by now is told: nobody waits for more than one busy timeout, however long the queue.
            self._fail(group + self._drain(), error)
            return
        try:
            if len(group) == 1:
                self._run_alone(group[0], connection, driver)
            else:
                self._run_together(group, connection, driver)
        except Exception as error:
            self._abandon(driver)
            self._fail(group, error)
        else:
            self.writes += len(group)
            settle(group)

    def _run_alone(self, job: Job, connection: Connection, driver: sqlite3.Connection) -> None:
        if self._call(job, connection):
            driver.execute("COMMIT")
            self.commits += 1
        elif driver.in_transaction:
            driver.execute("ROLLBACK")

    def _run_together(self, group: list[Job], connection: Connection, driver: sqlite3.Connection) -> None:
        for job in group:
            if job.single:
                self._call_inside(job, connection, driver)
                continue
            driver.execute("SAVEPOINT one")
            if not self._call_inside(job, connection, driver):
                driver.execute("ROLLBACK TO one")
            # Fails when SQLite has dropped the transaction behind the back of a function that swallowed the error.
            driver.execute("RELEASE one")
        driver.execute("COMMIT")
        self.commits += 1

    def _call_inside(self, job: Job, connection: Connection, driver: sqlite3.Connection) -> bool:
        done = self._call(job, connection)
        if not done and not driver.in_transaction and job.error is not None:
            # After a full disk or an I/O error SQLite may drop the whole transaction, the neighbours' part too.
            raise _GroupLost from (job.error.__cause__ or job.error)
        return done

    def _call(self, job: Job, connection: Connection) -> bool:
        self._inside_function = True
        try:
            job.value = job.call(connection)
        except BaseException as error:
            job.error = translate(error)
            return False
        finally:
            self._inside_function = False
            root = connection.get_transaction()
            if root is not None and not root.is_active:
                root.close()  # `_refuse_end` left SQLAlchemy's idea of the transaction unusable; SQLite's goes on
        return True

    def _fail(self, group: list[Job], error: Exception) -> None:
        cause = error.__cause__ if isinstance(error, _GroupLost) and error.__cause__ is not None else error
        for job in group:
            job.value, job.error = None, commit_failure(cause)
        settle(group)

    def _abandon(self, driver: sqlite3.Connection) -> None:
        try:
            if driver.in_transaction:
                driver.execute("ROLLBACK")
        except sqlite3.Error:
            self._disconnect()  # the next group opens a new connection

    def _drain(self) -> list[Job]:
        drained: list[Job] = []
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return drained
            if job is None:
                self._jobs.put(None)  # the end mark is always last: leave it for `_serve`
                return drained
            drained.append(job)

    def _connect(self) -> tuple[Connection, sqlite3.Connection]:
        if self._connection is None or self._driver is None:
            self._connection = self._engine.connect()
            driver = self._connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            self._driver = driver
        return self._connection, self._driver

    def _disconnect(self) -> None:
        connection, self._connection, self._driver = self._connection, None, None
        if connection is not None:
            # A broken connection may not even close. This thread has to go on: everybody waits for it.
            with suppress(Exception):
                connection.close()

    def _refuse_end(self, _: Connection) -> None:
        if self._inside_function:
            raise RuntimeError("a write function neither commits nor rolls back: return or raise")


class _GroupLost(Exception):
    """SQLite rolled the whole transaction back; the cause says why."""
