"""The audit: every change of rights, every administrative act and every refusal of one, for a stated time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import delete, insert, select

from kachery_lab.db.engine import Database
from kachery_lab.db.models import audit
from kachery_lab.errors import KacheryLabError
from kachery_lab.services.principals import Principal

MAX_DETAIL = 500

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One act. `outcome` is `done` or the code of the refusal; `at` in ms since 1970."""

    id: int
    at: int
    principal: str
    peer: str | None
    action: str
    object: str
    outcome: str
    detail: str


class AuditService:
    """Writes entries; keeps them `retention_days`."""

    def __init__(self, database: Database, retention_days: int) -> None:
        self._database = database
        self.retention_days = retention_days

    @asynccontextmanager
    async def action(self, actor: Principal, action: str, what: str, detail: str = "") -> AsyncIterator[None]:
        """Records what the block does: `done`, or the code of the KacheryLabError that ends it, which passes on."""
        try:
            yield
        except KacheryLabError as error:
            await self.record(actor, action, what, error.code, detail or error.message)
            raise
        await self.record(actor, action, what, "done", detail)

    async def record(self, actor: Principal, action: str, what: str, outcome: str, detail: str = "") -> None:
        """Write one entry. A database that cannot be written loses it, but not the answer; the log has it then."""
        row = {
            "at": int(time.time() * 1000),
            "principal": f"{actor.kind}:{actor.name}",
            "peer": actor.peer,
            "action": action,
            "object": what[:MAX_DETAIL],
            "outcome": outcome,
            "detail": detail[:MAX_DETAIL],
        }
        try:
            await self._database.write(lambda conn: conn.execute(insert(audit).values(row)).rowcount)
        except KacheryLabError as error:
            log.warning("an audit entry was not written", **row, reason=error.message)

    async def list(self, before: int | None, limit: int, **equal: str | None) -> list[Entry]:
        """The newest entries first, those with an id below `before`. `equal`: columns that must have a value."""
        statement = select(audit).order_by(audit.c.id.desc()).limit(limit)
        if before is not None:
            statement = statement.where(audit.c.id < before)
        for column, value in equal.items():
            if value is not None:
                statement = statement.where(audit.c[column] == value)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [_entry(row) for row in rows]

    async def prune(self) -> int:
        """Drop entries older than the retention; how many went."""
        before = int((time.time() - self.retention_days * 86400) * 1000)
        return await self._database.write(lambda conn: conn.execute(delete(audit).where(audit.c.at < before)).rowcount)


def _entry(row: Any) -> Entry:
    return Entry(*row)
