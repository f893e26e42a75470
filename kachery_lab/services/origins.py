"""Where blobs came from. A blob that was fetched through a channel may be offered in that channel only.

An origin is `local`, or `<hub node id>/<channel>`; origins of a blob are a set. A blob without any record is local. The
record is durable before the blob gets its name, so a kill in between never makes a fetched blob look local.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, bindparam, delete, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.blobs.disk import from_os_error
from kachery_lab.core.ids import Sha1
from kachery_lab.db.engine import Database
from kachery_lab.db.models import blob_origins
from kachery_lab.db.prepared import Prepared
from kachery_lab.services.logs import LogWriter, to_line

LOCAL = "local"
# Made once: making a statement takes longer than running it.
_OF = select(blob_origins.c.origin).where(blob_origins.c.sha1 == bindparam("sha1"))
_INSERT = Prepared(insert(blob_origins).on_conflict_do_nothing())


class OriginService:
    """Kept in the records log, indexed in the database."""

    def __init__(self, database: Database, log: LogWriter) -> None:
        self._database = database
        self._log = log
        # Durable in the log, or on the way there, and not in the index yet.
        self._ahead: dict[str, list[str]] = {}

    async def of(self, sha1: str) -> frozenset[str]:
        """All origins of a blob; `local` alone when nothing is recorded."""
        return frozenset(await self._recorded(sha1)) or frozenset({LOCAL})

    async def record(self, sha1: Sha1, origin: str) -> None:
        """Note that a blob comes from a channel, before it is stored."""
        if origin not in await self._recorded(sha1):
            await self._append(sha1, origin)

    async def arriving(self, sha1: Sha1, origin: str, *, here: bool) -> None:
        """Note, durably, where a blob is about to come from. `here`: it is stored already, so without a record it is
        local."""
        # Of what is not here there is seldom a record, and a second one says no more than the first.
        known = await self._recorded(sha1) if here else set()
        if here and not known:
            await self._append(sha1, LOCAL)
        if origin not in known:
            await self._append(sha1, origin)

    async def arriving_unless(self, sha1: Sha1, origin: str, is_here: Callable[[], bool]) -> None:
        """As `arriving`, with a look at the volume on the way to the log; the index follows."""
        line, record = _record(sha1, origin)
        seen: list[bool | OSError] = []
        # Before the record is there: from then on the blob may get its name.
        forget = self._remember(sha1, origin)

        def records() -> list[bytes]:
            try:
                seen.append(is_here())
            except OSError as error:
                seen.append(error)
            return [line] if seen[0] is False else []

        def index(conn: Connection) -> None:
            if seen[0] is False:
                apply_record(conn, record)

        await self._log.append_ahead(records, index, forget)
        if isinstance(seen[0], OSError):
            forget()
            raise from_os_error(seen[0])
        if seen[0]:
            forget()
            await self.arriving(sha1, origin, here=True)

    def _remember(self, sha1: str, origin: str) -> Callable[[], None]:
        """Count an origin that the index does not have yet; what ends that."""
        ahead = self._ahead.setdefault(sha1, [])
        ahead.append(origin)

        def forget() -> None:
            nonlocal ahead
            if origin in ahead:
                ahead.remove(origin)
                if not ahead:
                    self._ahead.pop(sha1, None)
                ahead = []

        return forget

    async def _append(self, sha1: Sha1, origin: str) -> None:
        line, record = _record(sha1, origin)
        await self._log.append([line], lambda conn: apply_record(conn, record))

    async def stored_here(self, sha1: Sha1) -> None:
        """A local client stored what was here already: if it had come from a channel, it is local as well now."""
        found = await self._recorded(sha1)
        if found and LOCAL not in found:
            await self.record(sha1, LOCAL)

    async def _recorded(self, sha1: str) -> set[str]:
        # Looked at first: what is indexed meanwhile is read below.
        ahead = self._ahead.get(sha1, [])
        indexed = await self._database.read(lambda conn: conn.execute(_OF, {"sha1": sha1}).scalars().all())
        return {*ahead, *indexed}


def _record(sha1: str, origin: str) -> tuple[bytes, dict[str, Any]]:
    """A record, as the log keeps it and as it is indexed."""
    record = {"type": "origin", "sha1": sha1, "origin": origin, "at": int(time.time() * 1000)}
    return to_line(record), record


def apply_record(conn: Connection, record: dict[str, Any]) -> None:
    """Index one `origin` record."""
    row = {"sha1": record["sha1"], "origin": record["origin"], "recorded_at": record["at"]}
    _INSERT(conn, row)


def clear(conn: Connection) -> None:
    """Forget the index, before the records log is read anew."""
    conn.execute(delete(blob_origins))
