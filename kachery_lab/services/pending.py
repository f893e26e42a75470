"""Uploads that were announced and are not finished: they hold room in their channel until they are finished or expire.

One belongs to a channel, a path and a principal; announcing the same again renews it. The bytes of an upload that is
never finished get no reference, so nobody reads them through the channel.

All are held in memory. The database has those that a restart must not lose: whose bytes arrived, that hold room under a
limit, and that carry what a ticket does not (a label, a size that is no number of bytes). Any other one is announced
anew by its ticket when that is used after a kill.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog
from sqlalchemy import Connection, bindparam, delete, select, update
from sqlalchemy.dialects.sqlite import Insert, insert

from kachery_lab.core.tickets import PUT_SECONDS, SKEW_SECONDS
from kachery_lab.db.engine import Database
from kachery_lab.db.models import channels, pending_uploads
from kachery_lab.db.prepared import Prepared
from kachery_lab.errors import KacheryLabError, StorageFull, TooManyRequests
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.quotas import Charge, Held, Quotas

SECONDS = PUT_SECONDS + 5 * SKEW_SECONDS
"""How long room is held: a little longer than the ticket, and as long again after the bytes came."""
MOST = 2000
"""Unfinished uploads that one principal may have."""
MOST_OF_ALL = 100_000
"""Unfinished uploads of all principals together: they are held in memory."""
_AT_ONCE = 1000

log = structlog.get_logger(__name__)
_Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Pending:
    """One announced upload. `size` as announced; when `received`, the real one. `durable`: the database has it too."""

    charge: Charge
    exact: bool
    label: str
    received: bool
    expires_at: int
    durable: bool


def _make_insert() -> Insert:
    """Nothing is inserted for a channel that is gone meanwhile."""
    values = [bindparam(column.name, type_=column.type) for column in pending_uploads.c]
    there = select(channels.c.name).where(channels.c.name == bindparam("channel")).exists()
    return insert(pending_uploads).from_select(list(pending_uploads.c.keys()), select(*values).where(there))


def _make_receive() -> Insert:
    statement, changing = _make_insert(), ("size", "received", "expires_at")
    return statement.on_conflict_do_update(
        index_elements=list(pending_uploads.primary_key), set_={name: statement.excluded[name] for name in changing}
    )


# Made once: making a statement takes longer than running it.
_ANNOUNCE = _make_insert().on_conflict_do_nothing()
_RECEIVE = Prepared(_make_receive())
_RENEW = (
    update(pending_uploads)
    .where(
        pending_uploads.c.channel == bindparam("in_channel"),
        pending_uploads.c.path == bindparam("at_path"),
        pending_uploads.c.principal == bindparam("of_principal"),
    )
    .values(label=bindparam("new_label"), expires_at=bindparam("new_expiry"))
)
_DROP = delete(pending_uploads).where(
    pending_uploads.c.channel == bindparam("channel"),
    pending_uploads.c.path == bindparam("path"),
    pending_uploads.c.principal == bindparam("principal"),
)
_DROP_ONE = Prepared(_DROP)
_DROP_ANNOUNCED = _DROP.where(pending_uploads.c.received.is_(False))


class PendingUploads:
    """Changed on the event loop; write functions only look up in what is held."""

    def __init__(self, database: Database, data: AccessData, quotas: Quotas) -> None:
        self._database = database
        self._data = data
        self._quotas = quotas
        self._held: dict[_Key, Pending] = {}
        self._count: Counter[str] = Counter()
        self._reserving: Counter[str] = Counter()
        # Uploads whose bytes are on their way now: they do not expire meanwhile.
        self._arriving: dict[_Key, int] = {}
        self._writing: set[asyncio.Task[None]] = set()
        data.listeners.append(self._follow_changes)

    def load(self) -> None:
        """Blocking: read the table, once, at start."""
        for row in self._database.read_sync(lambda conn: conn.execute(select(pending_uploads)).all()):
            charge = Charge(row.channel, row.path, row.principal, row.size)
            self._hold(Pending(charge, row.exact, row.label, row.received, row.expires_at, True))

    # -- announced -----------------------------------------------------------------------------------------------

    async def reserve(self, charge: Charge, *, exact: bool, label: str) -> None:
        """Hold room for an upload; durably, when a limit counts it or its ticket cannot say what was announced.

        Raises StorageFull, TooManyRequests with more than MOST of the principal's or MOST_OF_ALL, NotFound.
        """
        known = self._held.get(_key(charge))
        if known is not None and known.received:
            await self._renew(known, label)
            return
        if known is None and self._is_full(charge.owner):
            await self.purge()
            if self._is_full(charge.owner):
                raise TooManyRequests(
                    f"{charge.owner} has {MOST} uploads that were announced and not finished, or all together have "
                    f"{MOST_OF_ALL}",
                    hint="Finish them, or wait until they expire",
                )
        durable = not exact or bool(label) or self._quotas.limits(charge) or (known is not None and known.durable)
        made = Pending(charge, exact, label, False, _expiry(), durable)
        if durable:
            self._reserving[charge.owner] += 1
            try:
                await self._write(made)
            finally:
                self._reserving[charge.owner] -= 1
        known = self._held.get(_key(charge))
        if known is None or not known.received:
            self._hold(made)

    def _is_full(self, owner: str) -> bool:
        return self._count[owner] + self._reserving[owner] >= MOST or len(self._held) >= MOST_OF_ALL

    async def _renew(self, known: Pending, label: str) -> None:
        """The same file on its way twice: what has arrived stays arrived."""
        renewed = replace(known, label=label or known.label, expires_at=_expiry())
        place = {"in_channel": known.charge.channel, "at_path": known.charge.path, "of_principal": known.charge.owner}
        row = {**place, "new_label": renewed.label, "new_expiry": renewed.expires_at}
        await self._database.write(lambda conn: conn.execute(_RENEW, row).rowcount)
        if self._held.get(_key(known.charge)) is known:
            self._hold(renewed)

    async def _write(self, made: Pending) -> None:
        def work(conn: Connection) -> None:
            conn.execute(_DROP_ANNOUNCED, _place(made.charge))
            self._quotas.require(conn, made.charge)
            conn.execute(_ANNOUNCE, _row(made))

        try:
            await self._database.write(work)
        except StorageFull:
            if not await self.purge():
                raise
            await self._database.write(work)

    def is_over(self, issued: int) -> bool:
        """Whether what was announced at a time, in seconds since 1970, has expired."""
        return (issued + SECONDS) * 1000 < _now()

    def find(self, channel: str, path: str, owner: str) -> Pending | None:
        """An upload that is announced and has not expired."""
        key = (channel, path, owner)
        found = self._held.get(key)
        if found is None or (found.expires_at < _now() and key not in self._arriving):
            return None
        return found

    def unwritten(self, owners: Collection[str]) -> Held:
        """What the database does not know of these principals' uploads."""
        found = [one.charge.size for one in self._held.values() if not one.durable and one.charge.owner in owners]
        return Held(len(found), sum(found))

    # -- arriving ------------------------------------------------------------------------------------------------

    @contextmanager
    def arriving(self, charge: Charge) -> Iterator[None]:
        """While the block runs, this upload does not expire."""
        key = _key(charge)
        self._arriving[key] = self._arriving.get(key, 0) + 1
        try:
            yield
        finally:
            left = self._arriving.pop(key) - 1
            if left:
                self._arriving[key] = left

    def receive(self, conn: Connection, charge: Charge, size: int) -> bool:
        """The bytes are stored and verified: note that, with their real size, inside the commit that indexes them. Then
        `received` is to follow; False: there is nothing to note, they were here before or the upload is finished.
        Raises StorageFull when they are more than was announced and do not fit."""
        known = self._held.get(_key(charge))
        if known is None or known.received:
            return False
        if size > known.charge.size:
            self._quotas.require(conn, replace(charge, size=size - known.charge.size))
        _RECEIVE(conn, _row(_arrived(known, size)))
        return True

    def received(self, charge: Charge, size: int) -> None:
        """What `receive` noted is committed."""
        known = self._held.get(_key(charge))
        if known is not None and not known.received:
            self._hold(_arrived(known, size))

    # -- ending --------------------------------------------------------------------------------------------------

    def forget(self, charge: Charge) -> None:
        """An upload is finished, and `drop` committed."""
        if self._held.pop(_key(charge), None) is not None:
            self._uncount(charge.owner)

    async def purge(self) -> int:
        """Free the room of what was never finished; how many."""
        now = _now()
        gone = [one for key, one in self._held.items() if one.expires_at < now and key not in self._arriving]
        written = [_place(one.charge) for one in gone if one.durable]
        for first in range(0, len(written), _AT_ONCE):
            some = written[first : first + _AT_ONCE]
            await self._database.write(lambda conn, rows=some: conn.execute(_DROP, rows).rowcount)  # type: ignore[misc]
        for one in gone:
            if self._held.get(_key(one.charge)) is one:
                self.forget(one.charge)
        return len(gone)

    # -- helpers -------------------------------------------------------------------------------------------------

    def _hold(self, made: Pending) -> None:
        if _key(made.charge) not in self._held:
            self._count[made.charge.owner] += 1
        self._held[_key(made.charge)] = made

    def _uncount(self, owner: str) -> None:
        self._count[owner] -= 1
        if not self._count[owner]:
            del self._count[owner]

    def _follow_changes(self) -> None:
        """Channels may be gone, with their rows; and what no limit counted may be under one now."""
        limited: dict[tuple[str, str], bool] = {}
        found = []
        for one in list(self._held.values()):
            charge = one.charge
            if charge.channel not in self._data.channels:
                self.forget(charge)
            elif not one.durable:
                where = charge.channel, charge.owner
                if where not in limited:
                    limited[where] = self._quotas.limits(charge)
                if limited[where]:
                    found.append(one)
        if found:
            task = asyncio.create_task(self._write_down(found))
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _write_down(self, found: Sequence[Pending]) -> None:
        def work(conn: Connection) -> list[Pending]:
            # Who is another one by now arrived, and is written, or ended.
            still = [one for one in found if self._held.get(_key(one.charge)) is one]
            for one in still:
                conn.execute(_ANNOUNCE, _row(one))
            return still

        try:
            written = await self._database.write(work)
        except KacheryLabError as error:
            log.warning("announced uploads do not count towards a new limit", code=error.code, reason=error.message)
            return
        for one in written:
            if self._held.get(_key(one.charge)) is one:
                self._held[_key(one.charge)] = replace(one, durable=True)


def drop(conn: Connection, charge: Charge) -> None:
    """Forget an upload that is finished; for use inside a write."""
    _DROP_ONE(conn, _place(charge))


def _arrived(known: Pending, size: int) -> Pending:
    return replace(known, charge=replace(known.charge, size=size), received=True, expires_at=_expiry(), durable=True)


def _key(charge: Charge) -> _Key:
    return charge.channel, charge.path, charge.owner


def _place(charge: Charge) -> dict[str, Any]:
    return {"channel": charge.channel, "path": charge.path, "principal": charge.owner}


def _row(one: Pending) -> dict[str, Any]:
    row = {"size": one.charge.size, "exact": one.exact, "label": one.label, "received": one.received}
    return {**_place(one.charge), **row, "expires_at": one.expires_at}


def _now() -> int:
    return int(time.time() * 1000)


def _expiry() -> int:
    return _now() + SECONDS * 1000
