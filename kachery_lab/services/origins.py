"""Where blobs came from. A blob that was fetched through a channel may be offered in that channel only.

An origin is `local`, or `<hub node id>/<channel>`; origins of a blob are a set. A blob without any record is local. The
record is durable before the blob gets its name, so a kill in between never makes a fetched blob look local.
"""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import Sha1
from kachery_lab.db.engine import Database
from kachery_lab.db.models import blob_origins
from kachery_lab.services.logs import LogWriter, to_line

LOCAL = "local"


class OriginService:
    """Kept in the records log, indexed in the database."""

    def __init__(self, database: Database, log: LogWriter) -> None:
        self._database = database
        self._log = log

    async def of(self, sha1: str) -> frozenset[str]:
        """All origins of a blob; `local` alone when nothing is recorded."""
        statement = select(blob_origins.c.origin).where(blob_origins.c.sha1 == sha1)
        found = await self._database.read(lambda conn: conn.execute(statement).scalars().all())
        return frozenset(found) or frozenset({LOCAL})

    async def record(self, sha1: Sha1, origin: str) -> None:
        """Note that a blob comes from a channel, before it is stored."""
        if origin not in await self._recorded(sha1):
            await self._append(sha1, origin)

    async def arriving(self, sha1: Sha1, origin: str, *, here: bool) -> None:
        """Note where a blob is about to come from. `here`: it is stored already, so without a record it is local."""
        # Of what is not here there is seldom a record, and a second one says no more than the first.
        known = await self._recorded(sha1) if here else set()
        if here and not known:
            await self._append(sha1, LOCAL)
        if origin not in known:
            await self._append(sha1, origin)

    async def _append(self, sha1: Sha1, origin: str) -> None:
        record = {"type": "origin", "sha1": sha1, "origin": origin, "at": int(time.time() * 1000)}
        await self._log.append([to_line(record)], lambda conn: apply_record(conn, record))

    async def stored_here(self, sha1: Sha1) -> None:
        """A local client stored what was here already: if it had come from a channel, it is local as well now."""
        found = await self._recorded(sha1)
        if found and LOCAL not in found:
            await self.record(sha1, LOCAL)

    async def _recorded(self, sha1: str) -> set[str]:
        statement = select(blob_origins.c.origin).where(blob_origins.c.sha1 == sha1)
        return set(await self._database.read(lambda conn: conn.execute(statement).scalars().all()))


def apply_record(conn: Connection, record: dict[str, Any]) -> None:
    """Index one `origin` record."""
    row = {"sha1": record["sha1"], "origin": record["origin"], "recorded_at": record["at"]}
    conn.execute(insert(blob_origins).values(row).on_conflict_do_nothing())


def clear(conn: Connection) -> None:
    """Forget the index, before the records log is read anew."""
    conn.execute(delete(blob_origins))
