"""Limits on what lies in channels: of each channel, and of each principal over all channels.

Counted are logical bytes and objects, those of uploads that were announced and are not finished included. A user's
client keys count for the user as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, func, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.strict_json import MAX_SAFE_INTEGER
from kachery_lab.db.engine import Database
from kachery_lab.db.models import bucket_totals, pending_uploads
from kachery_lab.db.models import quotas as quotas_table
from kachery_lab.errors import InvalidInput, NotFound, StorageFull
from kachery_lab.services.access_data import AccessData, Quota
from kachery_lab.services.audit import AuditService
from kachery_lab.services.principals import Principal
from kachery_lab.services.subjects import KINDS, Subject


@dataclass(frozen=True, slots=True)
class Held:
    """Objects and logical bytes."""

    objects: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Charge:
    """One more object of so many bytes that somebody brings into a channel at a path."""

    channel: str
    path: str
    owner: str
    size: int


class Quotas:
    """The limits in force and what counts towards them; for use inside a read or write of the database."""

    def __init__(self, data: AccessData, feeds: Callable[[Connection, str], int] = lambda _conn, _channel: 0) -> None:
        """`feeds`: logical bytes of the feeds that a channel shows."""
        self._data = data
        self._feeds = feeds

    def accounts(self, owner: str) -> list[tuple[str, list[str]]]:
        """Whose limits somebody uses up: (subject, all principals that are counted for it)."""
        found = [(owner, [owner])]
        user = owner
        if owner.startswith("client:"):
            client = self._data.clients.get(owner.removeprefix("client:"))
            user = f"user:{client.user}" if client is not None and client.user is not None else ""
        if user.startswith("user:"):
            name = user.removeprefix("user:")
            keys = [f"client:{one.client_id}" for one in self._data.clients.values() if one.user == name]
            found = [one for one in found if one[0] != user] + [(user, [user, *keys])]
        return found

    def require(self, conn: Connection, charge: Charge) -> None:
        """Raises StorageFull, naming whose limit it is, when one more object does not fit."""
        channel = self._data.channel(charge.channel)
        if channel.max_bytes is not None or channel.max_objects is not None:
            held = _held(conn, bucket_totals.c.channel == charge.channel, pending_uploads.c.channel == charge.channel)
            held = Held(held.objects, held.bytes + self._feeds(conn, charge.channel))
            _fits(f"the channel {charge.channel}", held, charge.size, channel.max_bytes, channel.max_objects)
        for subject, names in self.accounts(charge.owner):
            quota = self._data.quotas.get(subject)
            if quota is not None:
                held = _held_by(conn, names)
                _fits(f"{subject} in all channels", held, charge.size, quota.max_bytes, quota.max_objects)


def _held_by(conn: Connection, names: Collection[str]) -> Held:
    return _held(conn, bucket_totals.c.principal.in_(names), pending_uploads.c.principal.in_(names))


def _held(conn: Connection, stored: ColumnElement[bool], pending: ColumnElement[bool]) -> Held:
    there = select(
        func.coalesce(func.sum(bucket_totals.c.objects), 0), func.coalesce(func.sum(bucket_totals.c.bytes), 0)
    )
    coming = select(func.count(), func.coalesce(func.sum(pending_uploads.c.size), 0)).select_from(pending_uploads)
    first, second = conn.execute(there.where(stored)).one(), conn.execute(coming.where(pending)).one()
    return Held(int(first[0]) + int(second[0]), int(first[1]) + int(second[1]))


def _fits(whose: str, held: Held, size: int, max_bytes: int | None, max_objects: int | None) -> None:
    hint = "Delete what is not needed, wait until announced uploads expire, or ask for a higher limit"
    if max_bytes is not None and held.bytes + size > max_bytes:
        raise StorageFull(
            f"{size} bytes more do not fit: {whose} may have {max_bytes} bytes, {held.bytes} are taken", hint=hint
        )
    if max_objects is not None and held.objects + 1 > max_objects:
        raise StorageFull(
            f"one object more does not fit: {whose} may have {max_objects} objects, {held.objects} are taken", hint=hint
        )


def add_total(conn: Connection, channel: str, principal: str, objects: int, size: int) -> None:
    """Change what is counted for a principal in a channel. For use where bucket_objects changes."""
    statement = insert(bucket_totals).values(channel=channel, principal=principal, objects=objects, bytes=size)
    conn.execute(
        statement.on_conflict_do_update(
            index_elements=[bucket_totals.c.channel, bucket_totals.c.principal],
            set_={"objects": bucket_totals.c.objects + objects, "bytes": bucket_totals.c.bytes + size},
        )
    )


def channel_bytes(conn: Connection, channel: str) -> int:
    """Logical bytes of a channel's objects."""
    total = select(func.coalesce(func.sum(bucket_totals.c.bytes), 0)).where(bucket_totals.c.channel == channel)
    return int(conn.execute(total).scalar_one())


class QuotaService:
    """Quotas are seen and set by admins."""

    def __init__(self, database: Database, data: AccessData, audit: AuditService) -> None:
        self._database = database
        self._data = data
        self._audit = audit

    def list(self, actor: Principal) -> list[Quota]:
        """All quotas, by subject. Raises Forbidden."""
        actor.require("admin")
        return sorted(self._data.quotas.values(), key=lambda quota: quota.subject)

    async def get(self, actor: Principal, subject: str) -> tuple[Quota, Held]:
        """A subject's quota and what counts towards it. Raises Forbidden, InvalidInput, NotFound."""
        actor.require("admin")
        _parse(subject)
        quota = self._data.quotas.get(subject, Quota(subject, None, None))
        names = dict(Quotas(self._data).accounts(subject))[subject]
        return quota, await self._database.read(lambda conn: _held_by(conn, names))

    async def set(self, actor: Principal, subject: str, max_bytes: int | None, max_objects: int | None) -> Quota:
        """In force at once; what is over it stays. None: no limit. Raises Forbidden, InvalidInput."""
        async with self._audit.action(actor, "quota.set", subject, f"{max_bytes} bytes, {max_objects} objects"):
            actor.require("admin")
            _parse(subject)
            for name, value in (("maxBytes", max_bytes), ("maxObjects", max_objects)):
                if value is not None and not 0 <= value <= MAX_SAFE_INTEGER:
                    raise InvalidInput(f"{name}: expected a whole number from 0 to {MAX_SAFE_INTEGER}, or null")
            row = {"max_bytes": max_bytes, "max_objects": max_objects}
            statement = insert(quotas_table).values(subject=subject, **row)
            statement = statement.on_conflict_do_update(index_elements=[quotas_table.c.subject], set_=row)
            await self._data.change(lambda conn: conn.execute(statement).rowcount)
            return self._data.quotas[subject]

    async def remove(self, actor: Principal, subject: str) -> None:
        """No limit from now on. Raises Forbidden, NotFound."""
        async with self._audit.action(actor, "quota.remove", subject):
            actor.require("admin")
            if subject not in self._data.quotas:
                raise NotFound(f"{subject} has no quota")
            statement = delete(quotas_table).where(quotas_table.c.subject == subject)
            await self._data.change(lambda conn: conn.execute(statement).rowcount)


def _parse(subject: str) -> Subject:
    kind, _, name = subject.partition(":")
    if kind not in KINDS or not name or len(name) > 100:
        raise InvalidInput(f"subject: expected {', '.join(f'{one}:NAME' for one in KINDS)}")
    return Subject(KINDS[kind], name)
