"""Uploads that were announced and are not finished: they hold room in their channel until they are finished or expire.

A row belongs to a channel, a path and a principal; announcing the same again renews it. The bytes of an upload that is
never finished get no reference, so nobody reads them through the channel.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, select, update

from kachery_lab.core.tickets import PUT_SECONDS, SKEW_SECONDS
from kachery_lab.db.engine import Database
from kachery_lab.db.models import pending_uploads
from kachery_lab.errors import StorageFull, TooManyRequests
from kachery_lab.services.quotas import Charge, Quotas

SECONDS = PUT_SECONDS + 5 * SKEW_SECONDS
"""How long room is held: a little longer than the ticket, and as long again after the bytes came."""
MOST = 2000
"""Unfinished uploads that one principal may have."""
_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Pending:
    """One announced upload. `size` as announced; when `received`, the real one."""

    charge: Charge
    exact: bool
    label: str
    received: bool


class PendingUploads:
    """Kept in the database, so that a restart between two requests of a client does not matter."""

    def __init__(self, database: Database, quotas: Quotas) -> None:
        self._database = database
        self._quotas = quotas
        # Uploads whose bytes are on their way now: they do not expire meanwhile.
        self._arriving: dict[tuple[str, str, str], int] = {}

    async def reserve(self, charge: Charge, *, exact: bool, label: str) -> None:
        """Hold room for an upload, durably. Raises StorageFull, and TooManyRequests with more than MOST of them."""
        row = {"size": charge.size, "exact": exact, "label": label, "expires_at": _expiry(), "received": False}
        arriving = set(self._arriving)

        def work(conn: Connection) -> None:
            known = conn.execute(select(pending_uploads).where(_key(charge))).first()
            if known is not None:
                if known.received:
                    # The same file on its way twice: what has arrived stays arrived.
                    renewed = {"expires_at": row["expires_at"], "label": label or known.label}
                    conn.execute(update(pending_uploads).where(_key(charge)).values(renewed))
                    return
                drop(conn, charge)
            try:
                self._admit(conn, charge)
            except (StorageFull, TooManyRequests):
                if not _purge(conn, arriving):
                    raise
                self._admit(conn, charge)
            place = {"channel": charge.channel, "path": charge.path, "principal": charge.owner}
            conn.execute(insert(pending_uploads).values(**place, **row))

        await self._database.write(work)

    def _admit(self, conn: Connection, charge: Charge) -> None:
        mine = select(func.count()).where(pending_uploads.c.principal == charge.owner)
        if conn.execute(mine).scalar_one() >= MOST:
            raise TooManyRequests(
                f"{charge.owner} has {MOST} uploads that were announced and not finished",
                hint="Finish them, or wait until they expire",
            )
        self._quotas.require(conn, charge)

    async def find(self, channel: str, path: str, owner: str) -> Pending | None:
        """An upload that is announced and has not expired."""
        charge = Charge(channel, path, owner, 0)
        row = await self._database.read(lambda conn: conn.execute(select(pending_uploads).where(_key(charge))).first())
        if row is None or (row.expires_at < _now() and (channel, path, owner) not in self._arriving):
            return None
        return Pending(Charge(channel, path, owner, row.size), row.exact, row.label, row.received)

    @contextmanager
    def arriving(self, found: Pending) -> Iterator[None]:
        """While the block runs, this upload does not expire."""
        charge = found.charge
        key = (charge.channel, charge.path, charge.owner)
        self._arriving[key] = self._arriving.get(key, 0) + 1
        try:
            yield
        finally:
            left = self._arriving.pop(key) - 1
            if left:
                self._arriving[key] = left

    def received(self, conn: Connection, found: Pending, size: int) -> None:
        """The bytes are stored and verified: note that, with their real size, inside the commit that indexes them.
        Raises StorageFull when they are more than was announced and do not fit."""
        charge = found.charge
        if size > charge.size:
            self._quotas.require(conn, Charge(charge.channel, charge.path, charge.owner, size - charge.size))
        statement = update(pending_uploads).where(_key(charge))
        conn.execute(statement.values(received=True, size=size, expires_at=_expiry()))

    async def drop(self, charge: Charge) -> None:
        """Forget an upload that is finished."""
        await self._database.write(lambda conn: drop(conn, charge))

    async def purge(self) -> int:
        """Free the room of what was never finished; how many."""
        arriving = set(self._arriving)
        return await self._database.write(lambda conn: _purge(conn, arriving))


def drop(conn: Connection, charge: Charge) -> None:
    """For use inside a write."""
    conn.execute(delete(pending_uploads).where(_key(charge)))


def _purge(conn: Connection, arriving: set[tuple[str, str, str]]) -> int:
    table = pending_uploads.c
    expired = select(table.channel, table.path, table.principal).where(table.expires_at < _now())
    gone = [Charge(*row, 0) for row in conn.execute(expired.limit(_AT_ONCE)) if tuple(row) not in arriving]
    for charge in gone:
        drop(conn, charge)
    return len(gone)


def _key(charge: Charge) -> ColumnElement[bool]:
    return and_(
        pending_uploads.c.channel == charge.channel,
        pending_uploads.c.path == charge.path,
        pending_uploads.c.principal == charge.owner,
    )


def _now() -> int:
    return int(time.time() * 1000)


def _expiry() -> int:
    return _now() + SECONDS * 1000
