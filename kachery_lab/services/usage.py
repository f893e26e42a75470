"""What was moved through channels: uploads and downloads by day, channel and principal.

Uploads are counted with the commit of their reference. Downloads are counted in memory and written every few seconds,
so a kill loses the last of them; usage decides nothing. Days are in UTC.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import Insert, insert

from kachery_lab.db.engine import Database
from kachery_lab.db.models import usage_days
from kachery_lab.db.prepared import Prepared
from kachery_lab.errors import KacheryLabError

FLUSH_SECONDS = 5.0
_MOST_ROWS = 10_000
_COUNTS = ("uploads", "bytes_uploaded", "downloads", "bytes_downloaded")
log = structlog.get_logger(__name__)

ANYBODY = ""
"""The principal of downloads without a credential."""


@dataclass(frozen=True, slots=True)
class UsageDay:
    """What one principal moved through one channel on one day. Sizes in bytes."""

    day: str
    channel: str
    principal: str
    uploads: int
    bytes_uploaded: int
    downloads: int
    bytes_downloaded: int


class UsageService:
    """Counts and tells."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._downloads: dict[tuple[str, str, str], tuple[int, int]] = {}
        self._days: tuple[int, str] = (-1, "")

    def downloaded(self, channel: str, principal: str, size: int) -> None:
        """Count one answer with so many bytes. What does not fit in memory any more is not counted by name."""
        key = (self._today(), channel, principal)
        if key not in self._downloads and len(self._downloads) >= _MOST_ROWS:
            key = (key[0], channel, ANYBODY)
        count, total = self._downloads.get(key, (0, 0))
        self._downloads[key] = (count + 1, total + size)

    def _today(self) -> str:
        number = int(time.time() // 86400)
        if self._days[0] != number:
            self._days = (number, today())
        return self._days[1]

    async def flush(self) -> None:
        """Write what was counted. Raises Unavailable or StorageFull; then it is kept for the next time."""
        taken, self._downloads = self._downloads, {}
        if not taken:
            return

        def work(conn: Connection) -> None:
            for (day, channel, principal), (count, size) in taken.items():
                _add(conn, day, channel, principal, downloads=count, bytes_downloaded=size)

        try:
            await self._database.write(work)
        except BaseException:
            for key, (count, size) in taken.items():
                more, total = self._downloads.get(key, (0, 0))
                self._downloads[key] = (count + more, size + total)
            raise

    async def keep_flushing(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                await self.flush()
            except KacheryLabError:
                # The database says so itself in /readyz and in the log of what needs it; nothing is lost yet.
                continue

    async def close(self) -> None:
        """Write what was counted since; a database that cannot be written loses that."""
        try:
            await self.flush()
        except KacheryLabError as error:
            log.warning("the last downloads were not counted", code=error.code, reason=error.message)

    async def days(
        self,
        limit: int,
        *,
        channels: frozenset[str] | None = None,
        principal: str | None = None,
        since: str = "",
        until: str = "",
        after: tuple[str, str, str] | None = None,
    ) -> list[UsageDay]:
        """Rows in order of day, channel and principal, those behind `after`. `since` and `until` are days, inclusive;
        `channels`: only these. What was counted until now is in it."""
        await self.flush()
        table = usage_days.c
        statement = select(usage_days).order_by(table.day, table.channel, table.principal).limit(limit)
        if channels is not None:
            statement = statement.where(table.channel.in_(channels))
        if principal is not None:
            statement = statement.where(table.principal == principal)
        if since:
            statement = statement.where(table.day >= since)
        if until:
            statement = statement.where(table.day <= until)
        if after is not None:
            day, channel, who = after
            behind = (table.channel > channel) | ((table.channel == channel) & (table.principal > who))
            statement = statement.where((table.day > day) | ((table.day == day) & behind))
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [UsageDay(*row) for row in rows]


def today() -> str:
    """The present day, `yyyy-mm-dd` in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d")


def count_upload(conn: Connection, channel: str, principal: str, size: int) -> None:
    """Count an upload; for use inside the write that makes its reference."""
    _add(conn, today(), channel, principal, uploads=1, bytes_uploaded=size)


def _make_add() -> Insert:
    statement = insert(usage_days)
    return statement.on_conflict_do_update(
        index_elements=[usage_days.c.day, usage_days.c.channel, usage_days.c.principal],
        set_={name: usage_days.c[name] + statement.excluded[name] for name in _COUNTS},
    )


_ADD = Prepared(_make_add())
"""Made once: making it takes longer than running it."""


def _add(conn: Connection, day: str, channel: str, principal: str, **counts: int) -> None:
    row = {name: counts.get(name, 0) for name in _COUNTS}
    _ADD(conn, {"day": day, "channel": channel, "principal": principal, **row})
