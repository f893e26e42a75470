"""Group commits: the journal and its index never tell different stories, whatever fails in between."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.journal import START, Journal, Position
from kachery_lab.db.engine import Database
from kachery_lab.db.migrate import migrate
from kachery_lab.errors import StorageFull, Unavailable
from kachery_lab.services import logs
from kachery_lab.services.logs import LogWriter, get_meta, replay, set_meta, to_line
from tests.db.databases import writer_held

NAME = "some_log"


def add(conn: Connection, record: dict[str, Any]) -> None:
    """The index of these tests: the numbers that were told."""
    conn.exec_driver_sql("INSERT INTO told VALUES (?)", (record["n"],))


def clear(conn: Connection) -> None:
    conn.exec_driver_sql("DELETE FROM told")


def line(number: int) -> bytes:
    return to_line({"type": "told", "n": number})


class Log:
    """A writer with everything it needs, in one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / "index.db"
        migrate(path, backup_dir=root / "backups")
        self.database = Database.open(path)
        self.database.write_sync(lambda c: c.exec_driver_sql("CREATE TABLE IF NOT EXISTS told (n)").rowcount)
        self.disk = Disk()
        self.journal = Journal(root / "log")
        known = self.database.read_sync(lambda c: get_meta(c, NAME))
        self.journal.open(Position.parse(known) if known else START)
        self.writer = LogWriter(NAME, self.journal, self.database, self.disk)

    async def tell(self, number: int) -> int:
        return await self.writer.append([line(number)], lambda conn: (add(conn, {"n": number}), number)[1])

    async def go_ahead(self, number: int, indexed: list[int]) -> None:
        await self.writer.append_ahead(
            lambda: [line(number)], lambda conn: add(conn, {"n": number}), lambda: indexed.append(number)
        )

    async def refused(self, number: int) -> None:
        def refuse(conn: Connection) -> None:
            add(conn, {"n": number})
            raise Refused

        await self.writer.append([line(number)], refuse)

    @property
    def told(self) -> list[int]:
        return list(self.database.read_sync(lambda c: c.exec_driver_sql("SELECT n FROM told ORDER BY rowid").scalars()))

    @property
    def known(self) -> Position:
        text = self.database.read_sync(lambda c: get_meta(c, NAME))
        return Position.parse(text) if text else START

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(record) for _, record in self.journal.read()]

    def replay(self) -> int:
        return replay(NAME, self.journal, self.database, add, clear)

    def forget(self, known: Position | None = None) -> None:
        """The index as it was at `known`, or never was."""

        def back(conn: Connection) -> None:
            clear(conn)
            set_meta(conn, NAME, str(known or START))

        self.database.write_sync(back)

    def close(self) -> None:
        self.journal.close()
        self.database.close()
        self.disk.close()


class Refused(Exception):
    """What an index function raises in these tests."""


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path)
    yield made
    made.close()


def test_told_durably_and_in_order(log: Log) -> None:
    async def work() -> list[int]:
        return [await log.tell(number) for number in range(5)]

    assert asyncio.run(work()) == list(range(5))
    assert log.told == list(range(5))
    assert log.known == log.journal.end
    assert [record["n"] for record in log.records()] == list(range(5))


def test_what_arrives_together_shares_a_flush_and_a_commit(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    appended: list[int] = []
    real = log.journal.append
    monkeypatch.setattr(log.journal, "append", lambda records: (appended.append(len(records)), real(records))[1])

    async def work() -> list[int]:
        return await asyncio.gather(*(log.tell(number) for number in range(40)))

    assert asyncio.run(work()) == list(range(40))
    assert log.told == list(range(40))
    assert sum(appended) == 40
    assert len(appended) <= 3
    assert [record["n"] for record in log.records()] == list(range(40))


def test_a_refused_commit_is_voided_and_never_comes_back(log: Log) -> None:
    async def work() -> None:
        await log.tell(1)
        with pytest.raises(Refused):
            await log.refused(2)
        await log.tell(3)

    asyncio.run(work())
    assert log.told == [1, 3]
    kinds = [record["type"] for record in log.records()]
    assert kinds == ["told", "told", "void", "told"]
    log.forget()
    assert log.replay() == 2
    assert log.told == [1, 3]


def test_a_refusal_takes_its_whole_group(log: Log) -> None:
    async def work() -> list[Any]:
        with writer_held(log.database):
            first = asyncio.create_task(log.tell(1))
            await asyncio.sleep(0.05)
            # These wait for the first commit, and so make one group.
            rest = [
                asyncio.create_task(log.tell(2)),
                asyncio.create_task(log.refused(3)),
                asyncio.create_task(log.tell(4)),
            ]
            await asyncio.sleep(0.05)
        results = await asyncio.gather(first, *rest, return_exceptions=True)
        await log.tell(5)
        return results

    first, *rest = asyncio.run(work())
    assert first == 1
    assert [type(one) for one in rest] == [Refused] * 3
    assert log.told == [1, 5]
    log.forget()
    log.replay()
    assert log.told == [1, 5]


def test_a_full_disk_keeps_nothing(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def work() -> None:
        await log.tell(1)
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StorageFull):
            await log.tell(2)
        monkeypatch.setattr(os, "write", real)
        await log.tell(3)

    asyncio.run(work())
    assert log.told == [1, 3]
    assert [record.get("n") for record in log.records() if record["type"] == "told"] == [1, 3]


def test_nothing_is_written_before_a_void_is(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused records are in the log until they are voided; what came behind them would tell another story."""
    real = log.journal.append
    broken = False

    def append(records: list[bytes]) -> Position:
        if broken and b'"void"' in records[0]:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(records)

    monkeypatch.setattr(log.journal, "append", append)

    async def work() -> None:
        nonlocal broken
        await log.tell(1)
        broken = True
        with pytest.raises((Refused, Unavailable)):
            await log.refused(2)
        with pytest.raises(Unavailable):
            await log.tell(3)
        assert log.told == [1]
        broken = False
        await log.tell(4)

    asyncio.run(work())
    assert log.told == [1, 4]
    log.forget()
    log.replay()
    assert log.told == [1, 4]


def test_records_behind_what_the_index_knows_are_applied(log: Log) -> None:
    """A kill between flush and commit."""
    log.journal.append([line(1), line(2)])
    assert log.replay() == 2
    assert log.told == [1, 2]
    assert log.known == log.journal.end
    assert log.replay() == 0
    assert log.told == [1, 2]


def test_a_void_reaches_behind_what_the_index_knows(log: Log) -> None:
    """A commit that was reported as failed and yet survived: the log is right, the index is built anew."""
    start = log.journal.append([line(1)])
    end = log.journal.append([line(2), line(3)])
    log.replay()
    assert log.told == [1, 2, 3]
    log.journal.append([to_line({"type": "void", "from": str(start), "to": str(end)}), line(4)])
    log.replay()
    assert log.told == [1, 4]
    assert log.known == log.journal.end


def test_voids_over_a_long_log(log: Log) -> None:
    expected, at = [], START
    for number in range(1200):
        at_end = log.journal.append([line(number)])
        if number % 3 == 1:
            log.journal.append([to_line({"type": "void", "from": str(at), "to": str(at_end)})])
        else:
            expected.append(number)
        at = log.journal.end
    assert log.replay() == len(expected)
    assert log.told == expected


def test_a_caller_that_goes_away_undoes_nothing(log: Log) -> None:
    async def work() -> None:
        with writer_held(log.database):
            task = asyncio.create_task(log.tell(1))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await log.writer.drain()

    asyncio.run(work())
    assert log.told == [1]
    assert log.known == log.journal.end


def test_a_restart_continues(tmp_path: Path) -> None:
    for number in range(3):
        log = Log(tmp_path)
        log.replay()
        assert log.told == list(range(number))
        asyncio.run(log.tell(number))
        log.close()


# -- ahead of the index ------------------------------------------------------------------------------------------------


def test_what_goes_ahead_is_durable_and_indexed_with_the_next(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "INDEX_SECONDS", 3600)
    indexed: list[int] = []

    async def work() -> None:
        await log.go_ahead(1, indexed)
        assert [record["n"] for record in log.records()] == [1]
        assert (log.told, indexed, log.known) == ([], [], START)
        await log.tell(2)

    asyncio.run(work())
    assert (log.told, indexed) == ([1, 2], [1])
    assert log.known == log.journal.end


def test_what_goes_ahead_waits_for_no_commit(log: Log) -> None:
    async def work() -> None:
        with writer_held(log.database):
            held = asyncio.create_task(log.tell(1))
            await log.go_ahead(2, [])
            assert 2 in [record["n"] for record in log.records()]
            assert not held.done()
        await held
        await log.writer.drain()

    asyncio.run(work())
    assert sorted(log.told) == [1, 2]
    assert log.known == log.journal.end


def test_the_index_follows_by_itself(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "INDEX_SECONDS", 0.01)
    indexed: list[int] = []

    async def work() -> None:
        await log.go_ahead(1, indexed)
        async with asyncio.timeout(30):
            while not indexed:
                await asyncio.sleep(0.01)

    asyncio.run(work())
    assert log.told == [1]


def test_many_that_go_ahead_are_indexed_at_once(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "INDEX_SECONDS", 3600)
    monkeypatch.setattr(logs, "MOST_AHEAD", 3)
    indexed: list[int] = []

    async def work() -> None:
        await asyncio.gather(*(log.go_ahead(number, indexed) for number in range(3)))
        async with asyncio.timeout(30):
            while len(indexed) < 3:
                await asyncio.sleep(0.01)

    asyncio.run(work())
    assert log.told == [0, 1, 2]


def test_a_kill_before_it_is_indexed(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "INDEX_SECONDS", 3600)

    async def work() -> None:
        await log.tell(1)
        await log.go_ahead(2, [])

    asyncio.run(work())
    assert log.told == [1]
    assert log.replay() == 1
    assert log.told == [1, 2]
    assert log.known == log.journal.end


def test_a_refusal_does_not_take_what_went_ahead(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "INDEX_SECONDS", 3600)

    async def work() -> None:
        refused = asyncio.create_task(log.refused(1))
        await log.go_ahead(2, [])
        with pytest.raises(Refused):
            await refused
        await log.go_ahead(3, [])
        await log.writer.drain()

    asyncio.run(work())
    assert log.told == [2, 3]
    log.forget()
    assert log.replay() == 2
    assert log.told == [2, 3]


def test_a_full_disk_refuses_what_would_go_ahead(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    indexed: list[int] = []

    async def work() -> None:
        with monkeypatch.context() as filled:
            filled.setattr(os, "write", full)
            with pytest.raises(StorageFull):
                await log.go_ahead(1, indexed)
        # Nobody needs to keep it in mind any longer.
        assert indexed == [1]
        await log.go_ahead(2, indexed)
        await log.writer.drain()

    asyncio.run(work())
    assert log.told == [2]
    assert [record["n"] for record in log.records()] == [2]


def test_an_index_that_fails_is_made_later(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "INDEX_SECONDS", 3600)
    indexed: list[int] = []

    async def work() -> None:
        await log.go_ahead(1, indexed)
        with pytest.raises(Refused):
            await log.refused(2)
        assert (log.told, indexed) == ([], [])
        await log.tell(3)

    asyncio.run(work())
    assert (log.told, indexed) == ([1, 3], [1])
    log.forget()
    log.replay()
    assert log.told == [1, 3]
