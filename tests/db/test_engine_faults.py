"""What a locked, full or failing database does to callers, and what a killed process leaves behind."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from kachery_lab.db import connections, writer
from kachery_lab.db.engine import Database
from kachery_lab.errors import Conflict, StorageFull, Unavailable
from tests.db.databases import keys, make, put, run, together


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = make(tmp_path / "db")
    yield opened
    opened.close()


def test_a_failed_commit_fails_every_waiter(database: Database) -> None:
    def breaks(connection: Connection) -> None:
        run(connection, "PRAGMA defer_foreign_keys = ON")
        run(connection, "INSERT INTO child VALUES (77)")

    def own_failure(_: Connection) -> None:
        raise Conflict("too late")

    async def main() -> None:
        await database.write(lambda c: run(c, "CREATE TABLE child (p REFERENCES t (k) DEFERRABLE)"))
        outcomes = await together(database, put(1), breaks, own_failure, put(2))
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
        assert len({id(outcome) for outcome in outcomes}) == 4
        with pytest.raises(Unavailable):
            await database.write(breaks)
        assert await together(database, put(3), put(4)) == [1, 1]

    asyncio.run(main())
    assert database.read_sync(keys) == [3, 4]


def test_a_disk_that_refuses_at_the_commit(database: Database, tmp_path: Path) -> None:
    log = (tmp_path / "db-wal").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def main() -> None:
        # The log cannot grow: the write of the commit fails with EFBIG, which SQLite reports as an I/O error.
        resource.setrlimit(resource.RLIMIT_FSIZE, (log, before[1]))
        try:
            outcomes = await together(database, put(1, "x" * 20_000), put(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 2
        assert await together(database, put(3, "x" * 20_000), put(4)) == [1, 1]

    asyncio.run(main())
    assert database.read_sync(keys) == [3, 4]
    assert database.read_sync(lambda c: c.exec_driver_sql("PRAGMA integrity_check").scalar()) == "ok"


@pytest.mark.parametrize("single", [False, True])
def test_full(database: Database, single: bool) -> None:
    pages = database.write_sync(lambda c: c.exec_driver_sql("PRAGMA page_count").scalar())
    database.write_sync(lambda c: run(c, f"PRAGMA max_page_count = {pages}"))
    with pytest.raises(StorageFull):
        database.write_sync(put(1, "x" * 100_000))

    async def main() -> None:
        outcomes = await together(database, put(2), put(3, "x" * 100_000), put(4), single=single)
        assert isinstance(outcomes[1], StorageFull)
        # Either SQLite kept the neighbours' part of the transaction, or they were told that it did not.
        acknowledged = [key for key, outcome in zip((2, 3, 4), outcomes, strict=True) if outcome == 1]
        assert await database.read(keys) == acknowledged

    asyncio.run(main())
    database.write_sync(lambda c: run(c, "PRAGMA max_page_count = 1000000"))
    assert database.write_sync(put(5, "x" * 100_000)) == 1


def test_a_transaction_that_sqlite_dropped(database: Database) -> None:
    """SQLite may roll everything back by itself; the neighbours must not be told that they are stored."""

    def dropped(connection: Connection) -> None:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute("ROLLBACK")
        driver.execute("SELECT * FROM absent")

    def swallowed(connection: Connection) -> str:
        with pytest.raises(sqlite3.OperationalError):
            dropped(connection)
        return "stored, surely"

    async def main() -> None:
        for fn in (dropped, swallowed):
            outcomes = await together(database, put(1), fn, put(2))
            assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
            with pytest.raises((Unavailable, sqlite3.OperationalError)):
                await database.write(fn)
        assert await database.write(put(3)) == 1

    asyncio.run(main())
    assert database.read_sync(keys) == [3]


@pytest.mark.parametrize("guarded", [True, False])
def test_closing_a_reader_does_not_checkpoint(tmp_path: Path, guarded: bool) -> None:
    path = tmp_path / "db"
    child = os.fork()
    if child == 0:  # a killed writer leaves its log behind
        left = make(path)
        left.write_sync(put(1))
        os._exit(0)
    os.waitpid(child, 0)
    reader = connections.open_reader(path, 1) if guarded else sqlite3.connect(path)
    assert reader.execute("SELECT k FROM t").fetchall() == [(1,)]
    reader.close()
    assert (path.with_name("db-wal").exists()) is guarded
    if guarded:
        database = Database.open(path, read_threads=1)
        assert database.read_sync(keys) == [1]
        database.close()
        assert not path.with_name("db-wal").exists()


def test_a_broken_connection_is_replaced(database: Database, tmp_path: Path) -> None:
    def breaks(connection: Connection) -> None:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.close()

    async def main() -> None:
        for number in range(3):
            with pytest.raises(Unavailable):
                await database.write(breaks)
            outcomes = await together(database, put(100), breaks, put(101))
            assert all(isinstance(outcome, Exception) for outcome in outcomes)
            assert await database.write(put(number)) == 1

    asyncio.run(main())
    assert database.read_sync(keys) == [0, 1, 2]


def test_a_lost_file_is_not_replaced_by_an_empty_one(database: Database, tmp_path: Path) -> None:
    def breaks(connection: Connection) -> None:
        for entry in tmp_path.iterdir():
            entry.unlink()
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.close()

    for fn in (breaks, put(1)):
        with pytest.raises(Unavailable):
            database.write_sync(fn)
    assert list(tmp_path.iterdir()) == []


LOCKER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute(sys.argv[2])
print("held", flush=True)
sys.stdin.read()
connection.execute("ROLLBACK")
connection.close()
"""


@contextmanager
def locked_by_another_process(path: Path, begin: str) -> Iterator[None]:
    command = [sys.executable, "-c", LOCKER, str(path), begin]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        yield
        other.communicate()  # closes its input: it lets go
    assert other.returncode == 0


@pytest.mark.parametrize("begin", ["BEGIN EXCLUSIVE", "BEGIN IMMEDIATE"])
def test_locked_by_another_process(tmp_path: Path, begin: str) -> None:
    """F16: reads go on, writes are refused within the busy timeout, nothing acknowledged is lost."""
    database = make(tmp_path / "db", busy_timeout=2.0)
    database.write_sync(put(0))

    async def timed(key: int, after: float) -> tuple[Any, float]:
        await asyncio.sleep(after)
        start = time.monotonic()
        try:
            return await database.write(put(key)), time.monotonic() - start
        except Unavailable as refusal:
            assert refusal.retry_after > 0
            return refusal, time.monotonic() - start

    async def main() -> None:
        with locked_by_another_process(tmp_path / "db", begin):
            writes = asyncio.gather(*(timed(key, key * 0.01) for key in range(1, 40)))
            longest_read = 0.0
            while not writes.done():
                start = time.monotonic()
                assert await database.read(keys) == [0]
                longest_read = max(longest_read, time.monotonic() - start)
                await asyncio.sleep(0.01)
            for outcome, took in await writes:
                assert isinstance(outcome, Unavailable)
                # One after the other they would take a minute and more.
                assert took < 20
            assert longest_read < 1.9
            waiting = asyncio.create_task(database.write(put(100)))
            await asyncio.sleep(0.1)
        assert await waiting == 1  # let go within the timeout
        assert await database.write(put(101)) == 1

    asyncio.run(main())
    assert database.read_sync(keys) == [0, 100, 101]
    database.close()


def test_locked_positive_control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the write-ahead log reads do fail; without waiting for the commit acknowledged writes are lost."""
    old = sqlite3.connect(tmp_path / "old")
    old.execute("CREATE TABLE t (k)")
    old.close()
    with locked_by_another_process(tmp_path / "old", "BEGIN EXCLUSIVE"):
        reader = sqlite3.connect(tmp_path / "old", timeout=0.1)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            reader.execute("SELECT * FROM t")
        reader.close()

    database = make(tmp_path / "db", busy_timeout=0.1)
    monkeypatch.setattr(writer, "commit_failure", lambda _: None)
    with locked_by_another_process(tmp_path / "db", "BEGIN IMMEDIATE"):
        assert database.write_sync(put(1)) is None  # "stored"
    assert database.read_sync(keys) == []
    database.close()
