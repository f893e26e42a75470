"""What `Database` promises: group commits, isolation, cancellation, limits, closing."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from kachery_lab.db import connections, engine, jobs
from kachery_lab.db.engine import Database
from kachery_lab.errors import Conflict, StartRefused, Unavailable
from tests.db.databases import keys, make, put, run, together, writer_held

SLOW = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = make(tmp_path / "db")
    yield opened
    opened.close()


def test_pragmas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "journal_mode",
        "synchronous",
        "foreign_keys",
        "busy_timeout",
        "temp_store",
        "wal_autocheckpoint",
        "query_only",
    ]

    def pragmas(connection: Connection) -> list[Any]:
        return [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names]

    database = Database.open(tmp_path / "db", busy_timeout=1.5)
    try:
        assert database.write_sync(pragmas) == ["wal", 2, 1, 1500, 2, connections.CHECKPOINT_PAGES, 0]
        assert database.read_sync(pragmas) == ["wal", 2, 1, 1500, 2, 0, 1]
        assert (tmp_path / "db").stat().st_mode & 0o777 == 0o600
    finally:
        database.close()
    monkeypatch.setattr(connections, "_FULL", 7)  # SQLite takes it as another value, or not at all
    with pytest.raises(StartRefused, match="synchronous"):
        Database.open(tmp_path / "db")


@pytest.mark.parametrize("content", [b"this is no database at all " * 100, None])
def test_open_refuses(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "absent" / "db" if content is None else tmp_path / "db"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StartRefused, match=str(path)):
        Database.open(path)


def test_an_odd_path(tmp_path: Path) -> None:
    path = tmp_path / "a ?b#c%41" / "d b"
    path.parent.mkdir()
    database = make(path)
    database.write_sync(put(1))
    assert database.read_sync(keys) == [1]
    database.close()
    assert [entry.name for entry in path.parent.iterdir()] == ["d b"]


def test_a_group_shares_one_commit(database: Database) -> None:
    async def main() -> None:
        before = database.commits, database.writes
        assert await together(database, *(put(key) for key in range(100))) == [1] * 100
        assert database.writes - before[1] == 101
        assert database.commits - before[0] == 2  # the holder's and the group's

    asyncio.run(main())
    assert database.read_sync(keys) == list(range(100))


def test_a_failing_function_undoes_itself_only(database: Database) -> None:
    def fails(connection: Connection) -> None:
        put(50)(connection)
        raise Conflict("too late")

    def partly(connection: Connection) -> str:
        put(60)(connection)
        with pytest.raises(IntegrityError), connection.begin_nested():
            put(61)(connection)
            put(60)(connection)
        return "kept"

    async def main() -> None:
        outcomes = await together(database, put(1), fails, put(2), put(1), partly, put(3))
        assert outcomes[0] == outcomes[2] == outcomes[5] == 1
        assert isinstance(outcomes[1], Conflict)
        assert isinstance(outcomes[3], IntegrityError)
        assert outcomes[4] == "kept"
        with pytest.raises(Conflict):
            await database.write(fails)  # alone, without a savepoint

    asyncio.run(main())
    assert database.read_sync(keys) == [1, 2, 3, 60]


def test_a_single_statement_that_fails_undoes_itself_only(database: Database) -> None:
    def two_rows(connection: Connection) -> None:
        run(connection, "INSERT INTO t (k) VALUES (20), (1)")

    async def main() -> None:
        outcomes = await together(database, put(1), put(1), two_rows, put(3), single=True)
        assert [type(outcome) for outcome in outcomes] == [int, IntegrityError, IntegrityError, int]

    asyncio.run(main())
    assert database.read_sync(keys) == [1, 3]


def test_no_answer_before_the_commit(database: Database, tmp_path: Path) -> None:
    seen = []

    async def one(key: int) -> None:
        await database.write(put(key))
        with sqlite3.connect(tmp_path / "db") as other:
            seen.append(other.execute("SELECT count(*) FROM t WHERE k = ?", (key,)).fetchone()[0])
        other.close()

    async def main() -> None:
        await asyncio.gather(*(one(key) for key in range(50)))

    asyncio.run(main())
    assert seen == [1] * 50


def test_a_function_cannot_end_the_transaction(database: Database) -> None:
    for end in ("commit", "rollback"):
        with pytest.raises(RuntimeError, match="neither commits"):
            database.write_sync(lambda c, name=end: [put(1)(c), getattr(c, name)()])
    assert database.read_sync(keys) == []

    def swallows(connection: Connection) -> int:
        put(3)(connection)
        with pytest.raises(RuntimeError, match="neither commits"):
            connection.commit()
        return put(4)(connection)

    def ends(connection: Connection) -> None:
        put(7)(connection)
        connection.rollback()

    async def main() -> None:
        outcomes = await together(database, put(2), lambda c: [put(6)(c), c.commit()], swallows, ends, put(5))
        assert outcomes[0] == outcomes[4] == 1
        assert all(isinstance(outcome, Exception) for outcome in outcomes[1:4])

    asyncio.run(main())
    assert database.read_sync(keys) == [2, 5]


def test_odd_outcomes(database: Database) -> None:
    def stops(_: Connection) -> None:
        raise StopIteration

    async def main() -> None:
        with pytest.raises(RuntimeError, match="StopIteration"):
            await database.write(stops)
        with pytest.raises(TypeError, match="Result"):
            await database.write(lambda c: c.exec_driver_sql("SELECT 1"))
        with pytest.raises(TypeError, match="Result"):
            await database.read(lambda c: c.exec_driver_sql("SELECT 1"))
        with pytest.raises(OperationalError, match="no such table"):
            await database.read(lambda c: run(c, "SELECT * FROM absent"))
        with pytest.raises(RuntimeError, match="another write"):
            await database.write(lambda _: database.write_sync(put(1)))
        with pytest.raises(TimeoutError, match="own"):
            database.read_sync(lambda _: (_ for _ in ()).throw(TimeoutError("own")))

    asyncio.run(main())


def test_cancelling_a_waiter(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with writer_held(database):
            tasks = [asyncio.create_task(database.write(put(key))) for key in (1, 2, 2, 3)]
            while database.queued_writes < 4:
                await asyncio.sleep(0.001)
            tasks[0].cancel()
            tasks[2].cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(outcomes[0], asyncio.CancelledError)
        assert isinstance(outcomes[2], asyncio.CancelledError)
        assert outcomes[1] == outcomes[3] == 1

    asyncio.run(main())
    assert database.read_sync(keys) == [1, 2, 3]
    assert database.write_sync(put(4)) == 1
    assert caplog.records == []


def test_a_closed_event_loop(database: Database) -> None:
    async def main() -> None:
        task = asyncio.create_task(database.write(lambda c: [time.sleep(0.2), put(1)(c)]))
        await asyncio.sleep(0.05)
        task.cancel()

    asyncio.run(main())
    assert database.write_sync(put(2)) == 1
    assert database.read_sync(keys) == [1, 2]


def test_reads_are_stopped(tmp_path: Path) -> None:
    database = make(tmp_path / "db", read_threads=1, read_timeout=1.0)

    async def main() -> None:
        start = time.monotonic()
        reads = [database.read(fn) for fn in (lambda c: run(c, SLOW), keys, keys)]
        outcomes = await asyncio.gather(*reads, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
        assert time.monotonic() - start < 30
        assert await database.read(keys) == []
        with pytest.raises(Unavailable):  # many short statements, none of which is ever asked whether to go on
            await database.read(lambda c: [time.sleep(1.5), keys(c)])
        with pytest.raises(Unavailable):
            await database.read(lambda c: run(c, SLOW), timeout=0.05)
        task = asyncio.create_task(database.read(lambda c: run(c, SLOW), timeout=60))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await database.read(keys) == []  # the only reader is free again

    asyncio.run(main())
    with pytest.raises(Unavailable):
        database.read_sync(lambda c: run(c, SLOW))
    assert database.read_sync(lambda c: [time.sleep(1.2), keys(c)], timeout=float("inf")) == [None, []]
    database.close()


def test_a_reader_sees_one_snapshot(database: Database) -> None:
    def twice(connection: Connection) -> tuple[list[int], list[int]]:
        before = keys(connection)
        database.write_sync(put(1))
        return before, keys(connection)

    assert database.read_sync(twice) == ([], [])
    assert database.read_sync(keys) == [1]


def test_a_reader_cannot_write_or_checkpoint(database: Database) -> None:
    with pytest.raises(Unavailable) as refusal:
        database.read_sync(put(1))
    assert isinstance(refusal.value.__cause__, DBAPIError)
    with pytest.raises(Unavailable):
        database.read_sync(lambda c: [run(c, "PRAGMA query_only = OFF"), put(1)(c)])
    assert database.read_sync(keys) == []


def test_after_close(tmp_path: Path) -> None:
    database = make(tmp_path / "db")

    async def main() -> None:
        with writer_held(database):
            task = asyncio.create_task(database.write(put(1)))
            while not database.queued_writes:
                await asyncio.sleep(0.001)
            closing = asyncio.create_task(asyncio.to_thread(database.close))
            await asyncio.sleep(0.05)
            with pytest.raises(Unavailable):
                await database.read(keys)
        assert await task == 1  # was queued before
        await closing
        with pytest.raises(Unavailable):
            await database.write(put(2))

    asyncio.run(main())
    database.close()
    with pytest.raises(Unavailable):
        database.write_sync(put(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["db"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("database-")]


def test_too_many_waiters(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_QUEUED", 3)

    async def main() -> None:
        outcomes = await together(database, *(put(key) for key in range(3)))
        assert outcomes == [1, 1, 1]
        with writer_held(database):
            tasks = [asyncio.create_task(database.write(put(key))) for key in range(10, 15)]
            await asyncio.sleep(0.05)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[:3] == [1, 1, 1]
        assert [type(outcome) for outcome in outcomes[3:]] == [Unavailable] * 2

    asyncio.run(main())


def test_one_wake_up_per_group() -> None:
    calls = []

    class Loop:
        def call_soon_threadsafe(self, *arguments: Any) -> None:
            calls.append(arguments)

    loop: Any = Loop()
    future: Any = None
    jobs.settle([jobs.Job(put(key), future, loop) for key in range(10)])
    assert len(calls) == 1
