"""Group commits: a journal on the volume is the truth, the database an index of it.

Appends that arrive together share one flush and one commit. A record whose index commit fails is voided in the journal
before anything else is written, so that what was refused never comes back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection, bindparam, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.journal import START, Journal, Position, encode
from kachery_lab.db.engine import Database
from kachery_lab.db.models import meta
from kachery_lab.db.prepared import Prepared
from kachery_lab.errors import Unavailable

T = TypeVar("T")
Apply = Callable[[Connection, dict[str, Any]], None]
REPLAY_BATCH = 500
INDEX_SECONDS = 1.0
"""How long the index may lag behind records that were appended ahead of it."""
MOST_AHEAD = 1000
log = structlog.get_logger(__name__)

_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
# Made once: making a statement takes longer than running it.
_META = select(meta.c.value).where(meta.c.key == bindparam("key"))
_INSERT = insert(meta)
_SET_META = Prepared(_INSERT.on_conflict_do_update(index_elements=[meta.c.key], set_={"value": _INSERT.excluded.value}))


def get_meta(conn: Connection, key: str) -> str | None:
    """A value of the table of single facts."""
    return conn.execute(_META, {"key": key}).scalar_one_or_none()


def set_meta(conn: Connection, key: str, value: str) -> None:
    """Set a single fact."""
    _SET_META(conn, {"key": key, "value": value})


def to_line(record: dict[str, Any]) -> bytes:
    """A record as the journal keeps it."""
    return _COMPACT.encode(record).encode()


@dataclass(slots=True)
class _Entry:
    records: list[bytes]
    commit: Callable[[Connection], Any]
    done: asyncio.Future[Any]


@dataclass(slots=True)
class _Ahead:
    """What is done when it is durable."""

    records: Callable[[], list[bytes]]
    commit: Callable[[Connection], None]
    indexed: Callable[[], None]
    done: asyncio.Future[None]


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
        # One append at a time: of a group, of what goes ahead of it, or of a void.
        self._appending = asyncio.Lock()
        self._to_go_ahead: list[_Ahead] = []
        self._runner: asyncio.Task[None] | None = None
        # Durable, not indexed yet.
        self._ahead: list[_Ahead] = []
        self._timer: asyncio.TimerHandle | None = None
        self._due = False

    async def append(
        self, records: list[bytes], commit: Callable[[Connection], T], settled: Callable[[], None] | None = None
    ) -> T:
        """Result of `commit`, which runs in the index's transaction after the records are durable. `settled` is called
        when that is known, which may be after the caller gave up.

        Raises StorageFull or Unavailable: then nothing of it is kept. Cancelling the caller does not undo the append.
        """
        entry = _Entry(records, commit, asyncio.get_running_loop().create_future())
        if settled is not None:
            entry.done.add_done_callback(lambda _: settled())
        self._pending.append(entry)
        self._start()
        result: T = await self._outcome(entry.done)
        return result

    async def append_ahead(
        self, records: Callable[[], list[bytes]], commit: Callable[[Connection], None], indexed: Callable[[], None]
    ) -> None:
        """Durable on return, which waits for nobody's commit. `commit`, which must not fail and whose order does not
        matter, runs with the next group, INDEX_SECONDS later at the latest, and then `indexed` is called; also when
        nothing was kept. `records` runs in a thread of the disk, may look at the volume, and must not fail either.

        Raises what `append` raises.
        """
        if len(self._ahead) >= 2 * MOST_AHEAD:
            indexed()
            raise Unavailable(f"the index of the log {self.name} cannot be written")
        entry = _Ahead(records, commit, indexed, asyncio.get_running_loop().create_future())
        self._to_go_ahead.append(entry)
        if self._runner is None:
            self._runner = asyncio.create_task(self._run_ahead())
        await self._outcome(entry.done)

    async def _outcome(self, done: asyncio.Future[Any]) -> Any:
        try:
            async with asyncio.timeout(self._disk.deadline):
                return await asyncio.shield(done)
        except TimeoutError:
            raise Unavailable(
                f"the storage did not answer within {self._disk.deadline:g} s; whether this was kept is not known",
                hint="Look what is there, then try again; an append with a requestId can be repeated safely",
            ) from None

    def _start(self) -> None:
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        try:
            while self._pending or self._due:
                group, self._pending = self._pending, []
                self._due = False
                try:
                    results = await self._commit(group)
                except BaseException as error:
                    _fail([entry.done for entry in group], error)
                    if not isinstance(error, Exception):
                        raise
                else:
                    for entry, result in zip(group, results, strict=True):
                        if not entry.done.done():
                            entry.done.set_result(result)
        finally:
            self._worker = None

    async def _run_ahead(self) -> None:
        try:
            while self._to_go_ahead:
                # Its error is told to those that it concerns.
                with suppress(Exception):
                    await self._append([])
        finally:
            self._runner = None

    async def _append(self, group: list[_Entry]) -> tuple[Position, Position]:
        """Make a group durable, and before it, by the same flush, what waits to go ahead; the positions before and
        behind the group."""
        async with self._appending:
            ahead, self._to_go_ahead = self._to_go_ahead, []
            lines = [line for entry in group for line in entry.records]
            try:
                await self._write_void()
                end = await self._disk.run_long(self._write, ahead, lines) if ahead or lines else self._journal.end
            except BaseException as error:
                _fail([entry.done for entry in ahead], error)
                for entry in ahead:
                    entry.indexed()
                raise
        self._went_ahead(ahead)
        return Position(end.segment, end.offset - sum(len(encode(line)) for line in lines)), end

    def _write(self, ahead: list[_Ahead], lines: list[bytes]) -> Position:
        first = [line for entry in ahead for line in entry.records()]
        return self._journal.append(first + lines) if first or lines else self._journal.end

    def _went_ahead(self, ahead: list[_Ahead]) -> None:
        self._ahead += ahead
        for entry in ahead:
            entry.done.set_result(None)
        if len(self._ahead) < MOST_AHEAD:
            self._index_later()
        else:
            self._index_now()

    async def _commit(self, group: list[_Entry]) -> list[Any]:
        start, end = await self._append(group)
        ahead = list(self._ahead)

        def index(conn: Connection) -> list[Any]:
            for entry in ahead:
                entry.commit(conn)
            results = [entry.commit(conn) for entry in group]
            set_meta(conn, self.name, str(end))
            return results

        try:
            results = await self._database.write(index)
        except Exception as error:
            self._index_later()
            if not group:
                log.warning("the index of a log is late", log=self.name, records=len(ahead), reason=str(error))
                return []
            # What went ahead lies before or behind, and stays.
            self._void = (start, end)
            async with self._appending:
                await self._write_void()
            raise
        del self._ahead[: len(ahead)]
        for entry in ahead:
            entry.indexed()
        return results

    def _index_later(self) -> None:
        if self._ahead and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(INDEX_SECONDS, self._index_now)

    def _index_now(self) -> None:
        self._stop_timer()
        self._due = True
        self._start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
        await self._idle()
        if self._ahead:
            # Once: what cannot be indexed now is read from the log at the next start.
            self._index_now()
            await self._idle()
        self._stop_timer()

    async def _idle(self) -> None:
        while working := [task for task in (self._worker, self._runner) if task is not None]:
            await asyncio.wait(working)


def _fail(waiting: list[asyncio.Future[Any]], error: BaseException) -> None:
    for done in waiting:
        if not done.done():
            done.set_exception(error)
            # The caller may have gone away; its error must not be reported as unseen.
            done.exception()


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
