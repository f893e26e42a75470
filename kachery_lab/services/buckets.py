"""What lies in a channel's bucket: references to blobs by object path. Bytes lie on disk once, however many refer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import Sha1
from kachery_lab.core.objects import ObjectPath
from kachery_lab.db.engine import Database
from kachery_lab.db.models import bucket_objects, channels, tombstones
from kachery_lab.errors import Conflict, NotFound, StorageFull
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.blobs import BlobService, Content
from kachery_lab.services.logs import LogWriter, to_line
from kachery_lab.services.subjects import RoleService, Subject

Change = Callable[[Connection], bool]


@dataclass(frozen=True, slots=True)
class Reference:
    """An object of a bucket. `stored_at` in ms since 1970."""

    channel: str
    path: str
    sha1: Sha1
    size: int
    label: str
    principal: str
    stored_at: int
    on_demand: bool


class BucketService:
    """References are kept in the records log and indexed; content is read through the blobs' own rules."""

    def __init__(
        self, data: AccessData, roles: RoleService, database: Database, log: LogWriter, blobs: BlobService
    ) -> None:
        self._data = data
        self._roles = roles
        self._database = database
        self._log = log
        self._blobs = blobs

    # -- reading -------------------------------------------------------------------------------------------------

    def may_read(self, channel: str, path: ObjectPath, reader: Subject | None) -> bool:
        """Whether a reader (None: anybody) may read this kind of object. Public channels may be read by anybody."""
        found = self._data.channels.get(channel)
        if found is None:
            return False
        if found.public:
            return True
        return reader is not None and bool(self._roles.roles(reader, channel) & path.request)

    async def find(self, channel: str, path: str) -> Reference | None:
        """The reference at a path, None when there is none. No rights are checked."""
        statement = select(bucket_objects).where(bucket_objects.c.channel == channel, bucket_objects.c.path == path)
        row = await self._database.read(lambda conn: conn.execute(statement).one_or_none())
        return None if row is None else _reference(row)

    async def list(self, channel: str, after: str, limit: int) -> list[Reference]:
        """References whose path comes after `after`, by path. No rights are checked."""
        statement = select(bucket_objects).where(bucket_objects.c.channel == channel, bucket_objects.c.path > after)
        statement = statement.order_by(bucket_objects.c.path).limit(limit)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [_reference(row) for row in rows]

    async def open(self, channel: str, path: ObjectPath, reader: Subject | None) -> tuple[Reference, Content]:
        """Verified content of an object; the caller closes it.

        A known reader without the role gets Forbidden, whether the object is there or not; nobody in particular gets
        NotFound for everything in a private channel.
        """
        allowed = self.may_read(channel, path, reader)
        if reader is not None and not allowed:
            self._roles.require(reader, channel, path.request)
        reference = await self.find(channel, path.text) if allowed else None
        if reference is None or (reference.on_demand and reader is None):
            raise NotFound("there is no such object in this channel")
        return reference, await self._blobs.open(reference.sha1)

    # -- writing -------------------------------------------------------------------------------------------------

    async def refer(
        self,
        channel: str,
        path: ObjectPath,
        sha1: Sha1,
        size: int,
        owner: Subject,
        *,
        label: str = "",
        on_demand: bool = False,
    ) -> bool:
        """Add a reference, durable on return; whether it is new. `sha1` must be stored.

        Raises Forbidden when the right is gone meanwhile, Conflict when a file or message with other content is there,
        StorageFull over the channel's limit. An upload ends a tombstone; an on-demand reference is not made over one.
        """
        self._roles.require(owner, channel, path.provide)
        record = {
            "type": "reference",
            "channel": channel,
            "path": path.text,
            "sha1": sha1,
            "size": size,
            "label": label,
            "principal": str(owner),
            "at": int(time.time() * 1000),
            "onDemand": on_demand,
        }
        limit = self._data.channel(channel).max_bytes

        def check(conn: Connection) -> bool:
            known = conn.execute(_one(channel, path.text)).one_or_none()
            if known is not None and known.sha1 != sha1 and path.immutable:
                raise Conflict(f"another object lies at {path.text} already; it stays")
            if on_demand and known is None and conn.execute(_tombstone(channel, path.text)).first() is not None:
                raise NotFound("this object was deleted in this channel", hint="Upload it again")
            if limit is not None and known is None and _used(conn, channel) + size > limit:
                raise _full(channel, limit)
            return known is None or known.sha1 != sha1

        # Looked at before the log is written, so that a refusal leaves no record.
        if not await self._database.read(check):
            return False

        if not await self._log.append([to_line(record)], lambda conn: apply_reference(conn, record)):
            raise Conflict(f"another object was stored at {path.text} meanwhile; it stays")
        return True

    async def require_room(self, channel: str, path: ObjectPath, size: int) -> None:
        """Raises StorageFull when a new object of this size is over the channel's limit now."""
        limit = self._data.channel(channel).max_bytes
        if limit is None:
            return

        def fits(conn: Connection) -> bool:
            return conn.execute(_one(channel, path.text)).first() is not None or _used(conn, channel) + size <= limit

        if not await self._database.read(fits):
            raise _full(channel, limit)

    async def forget(
        self, channel: str, path: ObjectPath, by: Subject, *, recorded: Callable[[Change], Change] = lambda fn: fn
    ) -> None:
        """Delete an object in a channel: the reference goes, a tombstone stays, the bytes are not touched. `recorded`
        adds to the transaction. Raises NotFound."""
        if await self.find(channel, path.text) is None:
            raise NotFound("there is no such object in this channel")
        record = {
            "type": "referenceDelete",
            "channel": channel,
            "path": path.text,
            "by": str(by),
            "at": int(time.time() * 1000),
        }
        await self._log.append([to_line(record)], recorded(lambda conn: apply_delete(conn, record)))

    async def clear(self, channel: str, *, on_demand_only: bool) -> None:
        """Drop all references of a channel, or those that were made on demand: it is removed, or becomes public."""
        record = {"type": "referenceClear", "channel": channel, "onDemandOnly": on_demand_only}
        await self._log.append([to_line(record)], lambda conn: apply_clear(conn, record))

    async def used(self, channel: str) -> int:
        """Logical bytes of a channel's objects."""
        return await self._database.read(lambda conn: _used(conn, channel))

    async def expire(self) -> int:
        """Drop references older than their channel's stated retention; how many."""
        count = 0
        for channel in list(self._data.channels.values()):
            if channel.retention_days is not None:
                before = int((time.time() - channel.retention_days * 86400) * 1000)
                record = {"type": "referenceExpire", "channel": channel.name, "before": before}
                if await self._database.read(lambda conn, r=record: _expired(conn, r)):  # type: ignore[misc]
                    count += await self._log.append([to_line(record)], lambda conn, r=record: apply_expire(conn, r))  # type: ignore[misc]
        return count


def _full(channel: str, limit: int) -> StorageFull:
    return StorageFull(f"the channel {channel} is full: its limit is {limit} bytes")


def _reference(row: Any) -> Reference:
    return Reference(
        row.channel, row.path, Sha1(row.sha1), row.size, row.label, row.principal, row.stored_at, row.on_demand
    )


def _one(channel: str, path: str) -> Any:
    return select(bucket_objects).where(bucket_objects.c.channel == channel, bucket_objects.c.path == path)


def _tombstone(channel: str, path: str) -> Any:
    return select(tombstones.c.path).where(tombstones.c.channel == channel, tombstones.c.path == path)


def _used(conn: Connection, channel: str) -> int:
    total = select(func.coalesce(func.sum(bucket_objects.c.size), 0)).where(bucket_objects.c.channel == channel)
    return int(conn.execute(total).scalar_one())


def _expired(conn: Connection, record: dict[str, Any]) -> bool:
    old = select(bucket_objects.c.path).where(
        bucket_objects.c.channel == record["channel"], bucket_objects.c.stored_at < record["before"]
    )
    return conn.execute(old.limit(1)).first() is not None


def apply_reference(conn: Connection, record: dict[str, Any]) -> bool:
    """Index one `reference` record. False for a channel that is gone, and where an object that never changes lies."""
    if conn.execute(select(channels.c.name).where(channels.c.name == record["channel"])).first() is None:
        return False
    known = conn.execute(_one(record["channel"], record["path"])).one_or_none()
    if known is not None and known.sha1 != record["sha1"] and ObjectPath.parse(record["path"]).immutable:
        return False
    row = {
        "sha1": record["sha1"],
        "size": record["size"],
        "label": record["label"],
        "principal": record["principal"],
        "stored_at": record["at"],
        "on_demand": record["onDemand"],
    }
    statement = insert(bucket_objects).values(channel=record["channel"], path=record["path"], **row)
    conn.execute(
        statement.on_conflict_do_update(index_elements=[bucket_objects.c.channel, bucket_objects.c.path], set_=row)
    )
    if not record["onDemand"]:
        conn.execute(
            delete(tombstones).where(tombstones.c.channel == record["channel"], tombstones.c.path == record["path"])
        )
    return True


def apply_delete(conn: Connection, record: dict[str, Any]) -> bool:
    """Index one `referenceDelete` record."""
    place = {"channel": record["channel"], "path": record["path"]}
    gone = conn.execute(
        delete(bucket_objects).where(
            bucket_objects.c.channel == record["channel"], bucket_objects.c.path == record["path"]
        )
    ).rowcount
    if gone:
        conn.execute(
            insert(tombstones)
            .values(**place, deleted_at=record["at"], deleted_by=record["by"])
            .on_conflict_do_nothing()
        )
    return gone > 0


def apply_expire(conn: Connection, record: dict[str, Any]) -> int:
    """Index one `referenceExpire` record; how many references went."""
    return conn.execute(
        delete(bucket_objects).where(
            bucket_objects.c.channel == record["channel"], bucket_objects.c.stored_at < record["before"]
        )
    ).rowcount


def apply_clear(conn: Connection, record: dict[str, Any]) -> int:
    """Index one `referenceClear` record; how many references went."""
    statement = delete(bucket_objects).where(bucket_objects.c.channel == record["channel"])
    if record["onDemandOnly"]:
        statement = statement.where(bucket_objects.c.on_demand.is_(True))
    return conn.execute(statement).rowcount


APPLY = {
    "reference": apply_reference,
    "referenceDelete": apply_delete,
    "referenceExpire": apply_expire,
    "referenceClear": apply_clear,
}
"""By record type, for replays of the records log."""


def clear_index(conn: Connection) -> None:
    """Forget all references, before the records log is read anew."""
    conn.execute(delete(bucket_objects))
    conn.execute(delete(tombstones))
