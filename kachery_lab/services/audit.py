"""The audit: every change of rights, every administrative act and every refusal of one, for a stated time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection, delete, insert, select

from kachery_lab.db.engine import Database
from kachery_lab.db.models import audit
from kachery_lab.errors import Forbidden, KacheryLabError
from kachery_lab.observability.logging import redact_text
from kachery_lab.services.principals import Principal

MAX_DETAIL = 500
REPEAT_SECONDS = 60.0
"""The same refusal within this time is one entry: what polls does not fill the table."""
_REPEATS = 10_000

T = TypeVar("T")

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


class Act:
    """An act under way. Its entry is written with the change, in one transaction, or when the act ends without one."""

    def __init__(self, actor: Principal, action: str, what: str, detail: str) -> None:
        self._who = f"{actor.kind}:{actor.name}", actor.peer
        self._what = action, what
        self._notes = [detail] if detail else []
        self.written = False

    def __call__(self, text: str) -> None:
        """Add to the detail; before the change."""
        self._notes.append(text)

    def row(self, outcome: str, message: str = "") -> dict[str, Any]:
        """The entry as it stands now."""
        return _row(*self._who, *self._what, outcome, "; ".join([*self._notes, *([message] if message else [])]))

    def recorded(self, fn: Callable[[Connection], T]) -> Callable[[Connection], T]:
        """`fn`, a change in a transaction, and the entry that it is done. An act has one such change."""

        def run(conn: Connection) -> T:
            result = fn(conn)
            conn.execute(insert(audit).values(self.row("done")))
            self.written = True
            return result

        return run


class Refusals:
    """A block whose refusal is recorded (`AuditService.refusals`). No generator: it is around every read."""

    __slots__ = ("_audit", "_what")

    def __init__(self, audit: AuditService, *what: *tuple[str, str | None, str, str]) -> None:
        self._audit = audit
        self._what = what

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Forbidden):
            await self._audit.refused(*self._what, error)


class AuditService:
    """Writes entries; keeps them `retention_days`."""

    def __init__(self, database: Database, retention_days: int) -> None:
        self._database = database
        self.retention_days = retention_days
        self._refused: OrderedDict[tuple[str, str, str], float] = OrderedDict()

    @asynccontextmanager
    async def action(self, actor: Principal, action: str, what: str, detail: str = "") -> AsyncIterator[Act]:
        """Records what the block does: `done`, or the code of the KacheryLabError that ends it, which passes on.

        A block that changes the database hands its change to `Act.recorded`, so that no kill comes between the two.
        """
        act = Act(actor, action, what, detail)
        try:
            yield act
        except KacheryLabError as error:
            await self._write(act.row(error.code, error.message))
            raise
        if not act.written:
            await self._write(act.row("done"))

    def refusals(self, who: str, peer: str | None, action: str, what: str) -> Refusals:
        """Records that the block is refused: a Forbidden that ends it, which passes on. `who` is proved (`kind:name`).

        The log has it too. The same refusal again within REPEAT_SECONDS is not recorded again.
        """
        return Refusals(self, who, peer, action, what)

    async def refused(self, who: str, peer: str | None, action: str, what: str, error: Forbidden) -> None:
        """See `refusals`."""
        if self._is_new((who, action, what)):
            log.warning("refused", who=who, peer=peer, action=action, object=what, reason=error.message)
            await self._write(_row(who, peer, action, what, error.code, error.message))

    def _is_new(self, refusal: tuple[str, str, str]) -> bool:
        now = time.monotonic()
        before = self._refused.get(refusal)
        if before is not None and now - before < REPEAT_SECONDS:
            return False
        self._refused[refusal] = now
        self._refused.move_to_end(refusal)
        if len(self._refused) > _REPEATS:
            self._refused.popitem(last=False)
        return True

    async def record(self, actor: Principal, action: str, what: str, outcome: str, detail: str = "") -> None:
        """Write one entry. A database that cannot be written loses it, but not the answer; the log has it then."""
        await self._write(_row(f"{actor.kind}:{actor.name}", actor.peer, action, what, outcome, detail))

    async def _write(self, row: dict[str, Any]) -> None:
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


def _row(who: str, peer: str | None, action: str, what: str, outcome: str, detail: str) -> dict[str, Any]:
    return {
        "at": int(time.time() * 1000),
        "principal": who,
        "peer": peer,
        "action": action,
        "object": redact_text(what[:MAX_DETAIL]),
        "outcome": outcome,
        "detail": redact_text(detail[:MAX_DETAIL]),
    }


def _entry(row: Any) -> Entry:
    return Entry(*row)
