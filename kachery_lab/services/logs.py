"""Group commits: a journal on the volume is the truth, the database an index of it.

Appends that arrive together share one flush and one commit. A record whose index commit fails is voided in the journal
before anything else is written, so that what was refused never comes back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.journal import START, Journal, Position
from kachery_lab.db.engine import Database
from kachery_lab.db.models import meta
from kachery_lab.errors import Unavailable

T = TypeVar("T")
Apply = Callable[[Connection, dict[str, Any]], None]
REPLAY_BATCH = 500


def get_meta(conn: Connection, key: str) -> str | None:
    """A value of the table of single facts."""
    return conn.execute(select(meta.c.value).where(meta.c.key == key)).scalar_one_or_none()


def set_meta(conn: Connection, key: str, value: str) -> None:
    """Set a single fact."""
    statement = insert(meta).values(key=key, value=value)
    conn.execute(statement.on_conflict_do_update(index_elements=[meta.c.key], set_={"value": value}))


def to_line(record: dict[str, Any]) -> bytes:
    """A record as the journal keeps it."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(slots=True)
class _Entry:
    records: list[bytes]
    commit: Callable[[Connection], Any]
    done: asyncio.Future[Any]


class LogWriter:
    """The one writer of a journal. `name` is also the key under which the database keeps how far it has read."""

    def __init__(self, name: str, journal: Journal, database: Database, disk: Disk) -> None:
        self.name = name
        self._journal = journal
        self._database = database
        self._disk = disk
        self._pending: list[_Entry] = []
        self._worker: asyncio.Task[None] | None = None
        self._void: tuple[Position, Position] | None = None

    async def append(self, records: list[bytes], commit: Callable[[Connection], T]) -> T:
        """Result of `commit`, which runs in the index's transaction after the records are durable.

        Raises StorageFull or Unavailable: then nothing of it is kept. Cancelling the caller does not undo the append.
        """
        entry = _Entry(records, commit, asyncio.get_running_loop().create_future())
        self._pending.append(entry)
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        try:
            async with asyncio.timeout(self._disk.deadline):
                result: T = await asyncio.shield(entry.done)
        except TimeoutError:
            raise Unavailable(
                f"the storage did not answer within {self._disk.deadline:g} s; whether this was kept is not known",
                hint="Look what is there, then try again; an append with a requestId can be repeated safely",
            ) from None
        return result

    async def _work(self) -> None:
        try:
            while self._pending:
                group, self._pending = self._pending, []
                try:
                    results = await self._commit(group)
                except BaseException as error:
                    for entry in group:
                        if not entry.done.done():
                            entry.done.set_exception(error)
                            # The caller may have gone away; its error must not be reported as unseen.
                            entry.done.exception()
                    if not isinstance(error, Exception):
                        raise
                else:
                    for entry, result in zip(group, results, strict=True):
                        if not entry.done.done():
                            entry.done.set_result(result)
        finally:
            self._worker = None

    async def _commit(self, group: list[_Entry]) -> list[Any]:
        await self._write_void()
        start = self._journal.end
        end = await self._disk.run_long(self._journal.append, [line for entry in group for line in entry.records])

        def index(conn: Connection) -> list[Any]:
            results = [entry.commit(conn) for entry in group]
            set_meta(conn, self.name, str(end))
            return results

        try:
            return await self._database.write(index)
        except Exception:
            self._void = (start, end)
            await self._write_void()
            raise

    async def _write_void(self) -> None:
        if self._void is None:
            return
        start, end = self._void
        line = to_line({"type": "void", "from": str(start), "to": str(end)})
        try:
            await self._disk.run_long(self._journal.append, [line])
        except Exception as error:
            raise Unavailable(
                f"the log {self.name} cannot be written", hint="Look at the storage volume; it is tried again"
            ) from error
        self._void = None

    @property
    def busy(self) -> bool:
        """Whether something that was handed in, and perhaps given up by its caller, is not committed yet."""
        return self._worker is not None

    async def drain(self) -> None:
        """Wait until everything that was handed in is committed."""
        while self._worker is not None:
            await asyncio.wait([self._worker])


def _records(journal: Journal, start: Position) -> Iterator[tuple[Position, dict[str, Any]]]:
    for position, line in journal.read(start):
        yield position, json.loads(line)


def replay(name: str, journal: Journal, database: Database, apply: Apply, clear: Callable[[Connection], None]) -> int:
    """Blocking: bring the index up to the journal's end; how many records were applied.

    A void that reaches behind what the index knows (a commit that failed and yet survived a crash) makes the index of
    this journal be built anew: `clear`, then everything.
    """
    known = database.read_sync(lambda conn: get_meta(conn, name))
    start = Position.parse(known) if known else START
    voided = [
        (Position.parse(record["from"]), Position.parse(record["to"]))
        for _, record in _records(journal, start)
        if record["type"] == "void"
    ]
    if any(first < start for first, _ in voided):

        def forget(conn: Connection) -> None:
            clear(conn)
            set_meta(conn, name, str(START))

        database.write_sync(forget)
        return replay(name, journal, database, apply, clear)
    applied = 0
    batch: list[dict[str, Any]] = []

    def flush(position: Position) -> None:
        records = list(batch)
        batch.clear()

        def index(conn: Connection) -> None:
            for record in records:
                apply(conn, record)
            set_meta(conn, name, str(position))

        database.write_sync(index)

    position = start
    size = 0
    for position, line in journal.read(start):
        record = json.loads(line)
        # A group is voided as a whole; its records end behind `from` and not behind `to`.
        if record["type"] != "void" and not any(first < position <= last for first, last in voided):
            batch.append(record)
            applied += 1
            size += len(line)
        if len(batch) >= REPLAY_BATCH or size > 16 << 20:
            flush(position)
            size = 0
    if batch or position != start:
        flush(position)
    return applied
