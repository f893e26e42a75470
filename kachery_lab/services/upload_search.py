"""Who uploaded what, into which channel, when and under which label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, or_, select

from kachery_lab.db.engine import Database
from kachery_lab.db.models import bucket_objects
from kachery_lab.errors import InvalidInput
from kachery_lab.services import bucket_index
from kachery_lab.services.bucket_index import Reference
from kachery_lab.services.channels import ChannelService
from kachery_lab.services.principals import Principal
from kachery_lab.services.usage import UsageDay, UsageService


@dataclass(frozen=True, slots=True)
class UploadQuery:
    """What is looked for. `label`: a part of it; the others whole. Times in ms since 1970; None: any."""

    channel: str | None = None
    principal: str | None = None
    label: str | None = None
    sha1: str | None = None
    since: int | None = None
    until: int | None = None


class UploadSearch:
    """Admins look everywhere, owners in their own channels."""

    def __init__(self, database: Database, channels: ChannelService, usage: UsageService) -> None:
        self._database = database
        self._channels = channels
        self._usage = usage

    def _reach(self, actor: Principal, channel: str | None) -> frozenset[str] | None:
        """The channels to look in, None for all, those of the past included. Raises Forbidden, NotFound."""
        if channel is not None:
            if not actor.may("admin"):
                self._channels.require_owner(actor, channel)
            return frozenset({channel})
        found = self._channels.list(actor)
        return None if actor.may("admin") else frozenset(one.name for one in found)

    async def uploads(self, actor: Principal, query: UploadQuery, before: str, limit: int) -> Sequence[Reference]:
        """The newest first, those behind the place `before`. Raises Forbidden, NotFound, InvalidInput."""
        table = bucket_objects.c
        statement = select(bucket_objects).where(table.on_demand.is_(False)).limit(limit)
        statement = statement.order_by(table.stored_at.desc(), table.channel, table.path)
        reach = self._reach(actor, query.channel)
        if reach is not None:
            statement = statement.where(table.channel.in_(reach))
        if query.principal is not None:
            statement = statement.where(table.principal == query.principal)
        if query.label is not None:
            statement = statement.where(table.label.contains(query.label, autoescape=True))
        if query.sha1 is not None:
            statement = statement.where(table.sha1 == query.sha1)
        if query.since is not None:
            statement = statement.where(table.stored_at >= query.since)
        if query.until is not None:
            statement = statement.where(table.stored_at <= query.until)
        if before:
            statement = statement.where(_behind(before))
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [bucket_index.reference(row) for row in rows]

    async def usage(
        self,
        actor: Principal,
        channel: str | None,
        principal: str | None,
        days: tuple[str, str],
        after: str,
        limit: int,
    ) -> Sequence[UsageDay]:
        """Rows of the days from the first to the last, those behind the place `after`. Raises Forbidden, NotFound,
        InvalidInput."""
        reach = self._reach(actor, channel)
        parts = tuple(after.split("/", 2))
        if after and len(parts) != 3:
            raise InvalidInput("after: expected `next` of the page before")
        place = (parts[0], parts[1], parts[2]) if len(parts) == 3 else None
        since, until = days
        return await self._usage.days(limit, channels=reach, principal=principal, since=since, until=until, after=place)


def place_of(found: Reference) -> str:
    """The place of an upload in the order, for `before`."""
    return f"{found.stored_at}/{found.channel}/{found.path}"


def usage_place(found: UsageDay) -> str:
    """The place of a row in the order, for `after`."""
    return f"{found.day}/{found.channel}/{found.principal}"


def _behind(place: str) -> Any:
    at, _, rest = place.partition("/")
    channel, _, path = rest.partition("/")
    if not (at.isascii() and at.isdigit() and len(at) <= 16 and channel and path):
        raise InvalidInput("before: expected `next` of the page before")
    table, when = bucket_objects.c, int(at)
    later = or_(table.channel > channel, and_(table.channel == channel, table.path > path))
    return or_(table.stored_at < when, and_(table.stored_at == when, later))
