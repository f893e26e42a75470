"""Limits on what lies in channels: of each channel, and of each principal over all channels.

Counted are logical bytes and objects, those of uploads that were announced and are not finished included. A user's
client keys count for the user as well.

A reference is refused before the log is written, and counts when its commit follows. Between the two its room is held:
the check is a write function, these run one at a time, and what one takes the next one sees.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, delete, func, select
from sqlalchemy.dialects.sqlite import Insert, insert

from kachery_lab.core.strict_json import MAX_SAFE_INTEGER
from kachery_lab.db.engine import Database
from kachery_lab.db.models import bucket_totals, pending_uploads
from kachery_lab.db.models import quotas as quotas_table
from kachery_lab.db.prepared import Prepared
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
    """One more object of so many bytes that somebody brings into a channel at a path. `objects`: 0 for what is counted
    by its bytes alone."""

    channel: str
    path: str
    owner: str
    size: int
    objects: int = 1


class Hold:
    """The room of one change that is on its way, from `take` until `release`."""

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self.released = False

    def take(self, conn: Connection, charge: Charge, replaces: Charge | None = None) -> None:
        """Hold the room, unless it is released already: who asked for it may have given up. For use inside a write; in
        a read it holds too, but two reads at once may both find the last room. Raises StorageFull."""
        self._quotas.require(conn, charge, replaces)
        self._quotas.keep(self, charge)

    def release(self) -> None:
        """The change is counted, or is not made. Also inside its commit; doing it again is no error."""
        self._quotas.drop(self)


class Quotas:
    """The limits in force and what counts towards them; for use inside a read or write of the database."""

    def __init__(self, data: AccessData, feeds: Callable[[Connection, str], int] = lambda _conn, _channel: 0) -> None:
        """`feeds`: logical bytes of the feeds that a channel shows."""
        self._data = data
        self._feeds = feeds
        # Changed by the writer's thread and by the loop's.
        self._lock = threading.Lock()
        self._holds: dict[Hold, Charge] = {}

    def hold(self) -> Hold:
        """Room for a change, not taken yet."""
        return Hold(self)

    def keep(self, hold: Hold, charge: Charge) -> None:
        """See `Hold.take`."""
        with self._lock:
            if not hold.released:
                self._holds[hold] = charge

    def drop(self, hold: Hold) -> None:
        """See `Hold.release`."""
        with self._lock:
            hold.released = True
            self._holds.pop(hold, None)

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

    def limits(self, charge: Charge) -> bool:
        """Whether any limit counts such an object now. Raises NotFound."""
        channel = self._data.channel(charge.channel)
        if channel.max_bytes is not None or channel.max_objects is not None:
            return True
        return bool(self._data.quotas) and any(one in self._data.quotas for one, _ in self.accounts(charge.owner))

    def require(self, conn: Connection, charge: Charge, replaces: Charge | None = None) -> None:
        """Raises StorageFull, naming whose limit it is, when one more object does not fit in place of another."""
        channel = self._data.channel(charge.channel)
        if channel.max_bytes is not None or channel.max_objects is not None:
            held = _held(conn, bucket_totals.c.channel == charge.channel, pending_uploads.c.channel == charge.channel)
            shown = Held(0, self._feeds(conn, charge.channel))
            held = _sum(
                held, shown, _less(replaces), self._on_the_way(charge, lambda one: one.channel == charge.channel)
            )
            _fits(f"the channel {charge.channel}", held, charge, channel.max_bytes, channel.max_objects)
        for subject, names in self.accounts(charge.owner):
            quota = self._data.quotas.get(subject)
            if quota is not None:
                own = replaces if replaces is not None and replaces.owner in names else None
                coming = self._on_the_way(charge, lambda one, names=names: one.owner in names)  # type: ignore[misc]
                held = _sum(_held_by(conn, names), _less(own), coming)
                _fits(f"{subject} in all channels", held, charge, quota.max_bytes, quota.max_objects)

    def _on_the_way(self, charge: Charge, counts: Callable[[Charge], bool]) -> Held:
        """Held room, without that for the same path: two changes there make one object. To be read after the database:
        a commit gives its room back before the database shows it."""
        with self._lock:
            found = [one for one in self._holds.values() if counts(one)]
        largest: dict[tuple[str, str], Charge] = {}
        for one in found:
            place = one.channel, one.path
            if place != (charge.channel, charge.path) and (place not in largest or largest[place].size < one.size):
                largest[place] = one
        return Held(sum(one.objects for one in largest.values()), sum(one.size for one in largest.values()))


def _less(replaced: Charge | None) -> Held:
    return Held(0, 0) if replaced is None else Held(-replaced.objects, -replaced.size)


def _sum(*parts: Held) -> Held:
    return Held(sum(one.objects for one in parts), sum(one.bytes for one in parts))


def _held_by(conn: Connection, names: Collection[str]) -> Held:
    return _held(conn, bucket_totals.c.principal.in_(names), pending_uploads.c.principal.in_(names))


def _held(conn: Connection, stored: ColumnElement[bool], pending: ColumnElement[bool]) -> Held:
    there = select(
        func.coalesce(func.sum(bucket_totals.c.objects), 0), func.coalesce(func.sum(bucket_totals.c.bytes), 0)
    )
    coming = select(func.count(), func.coalesce(func.sum(pending_uploads.c.size), 0)).select_from(pending_uploads)
    first, second = conn.execute(there.where(stored)).one(), conn.execute(coming.where(pending)).one()
    return Held(int(first[0]) + int(second[0]), int(first[1]) + int(second[1]))


def _fits(whose: str, held: Held, charge: Charge, max_bytes: int | None, max_objects: int | None) -> None:
    hint = "Delete what is not needed, wait until announced uploads expire, or ask for a higher limit"
    if max_bytes is not None and held.bytes + charge.size > max_bytes:
        raise StorageFull(
            f"{charge.size} bytes more do not fit: {whose} may have {max_bytes} bytes, {held.bytes} are taken",
            hint=hint,
        )
    if max_objects is not None and charge.objects and held.objects + charge.objects > max_objects:
        raise StorageFull(
            f"one object more does not fit: {whose} may have {max_objects} objects, {held.objects} are taken", hint=hint
        )


def _make_add() -> Insert:
    statement, table = insert(bucket_totals), bucket_totals.c
    return statement.on_conflict_do_update(
        index_elements=[table.channel, table.principal],
        set_={
            "objects": table.objects + statement.excluded.objects,
            "bytes": table.bytes + statement.excluded.bytes,
        },
    )


_ADD = Prepared(_make_add())
"""Made once: making it takes longer than running it."""


def add_total(conn: Connection, channel: str, principal: str, objects: int, size: int) -> None:
    """Change what is counted for a principal in a channel. For use where bucket_objects changes."""
    _ADD(conn, {"channel": channel, "principal": principal, "objects": objects, "bytes": size})


def channel_bytes(conn: Connection, channel: str) -> int:
    """Logical bytes of a channel's objects."""
    total = select(func.coalesce(func.sum(bucket_totals.c.bytes), 0)).where(bucket_totals.c.channel == channel)
    return int(conn.execute(total).scalar_one())


class QuotaService:
    """Quotas are seen and set by admins."""

    def __init__(
        self,
        database: Database,
        data: AccessData,
        audit: AuditService,
        unwritten: Callable[[Collection[str]], Held] = lambda _owners: Held(0, 0),
    ) -> None:
        """`unwritten`: what counts for principals and is not in the database."""
        self._database = database
        self._data = data
        self._audit = audit
        self._unwritten = unwritten

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
        written, more = await self._database.read(lambda conn: _held_by(conn, names)), self._unwritten(names)
        return quota, Held(written.objects + more.objects, written.bytes + more.bytes)

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
