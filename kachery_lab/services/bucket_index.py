"""The index of what lies in buckets: rows made from the records log, and looked at by `services.buckets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, bindparam, delete, func, select, update
from sqlalchemy.dialects.sqlite import Insert, insert

from kachery_lab.core.ids import Sha1
from kachery_lab.core.objects import ObjectPath
from kachery_lab.db.models import bucket_objects, bucket_totals, channels, tombstones
from kachery_lab.db.prepared import Prepared
from kachery_lab.services.quotas import add_total

_REMEMBERED = ("sha1", "size", "label", "principal", "stored_at")
_CONTENT = (*_REMEMBERED, "on_demand")


def _make_upsert() -> Insert:
    statement = insert(bucket_objects)
    key = [bucket_objects.c.channel, bucket_objects.c.path]
    return statement.on_conflict_do_update(
        index_elements=key, set_={name: statement.excluded[name] for name in _CONTENT}
    )


# Made once: making a statement takes longer than running it.
_UPSERT = Prepared(_make_upsert())
_AT = Prepared(
    select(bucket_objects).where(
        bucket_objects.c.channel == bindparam("channel"), bucket_objects.c.path == bindparam("path")
    )
)
_TOMBSTONE_AT = select(tombstones).where(
    tombstones.c.channel == bindparam("channel"), tombstones.c.path == bindparam("path")
)
_END_TOMBSTONE = delete(tombstones).where(
    tombstones.c.channel == bindparam("channel"), tombstones.c.path == bindparam("path")
)
_STATE = Prepared(
    select(
        bucket_objects.c.sha1,
        bucket_objects.c.size,
        bucket_objects.c.principal,
        bucket_objects.c.on_demand,
        tombstones.c.path.label("tombstone"),
    )
    .select_from(channels)
    .outerjoin(
        bucket_objects,
        and_(bucket_objects.c.channel == channels.c.name, bucket_objects.c.path == bindparam("path")),
    )
    .outerjoin(
        tombstones,
        and_(tombstones.c.channel == channels.c.name, tombstones.c.path == bindparam("path")),
    )
    .where(channels.c.name == bindparam("channel"))
)
"""What lies at a path of a channel, NULLs when nothing does; no row without the channel."""


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


def reference(row: Any) -> Reference:
    """A row of bucket_objects."""
    return Reference(
        row.channel, row.path, Sha1(row.sha1), row.size, row.label, row.principal, row.stored_at, bool(row.on_demand)
    )


def deleted_reference(row: Any) -> Reference:
    """What a tombstone remembers; only for one that does."""
    return Reference(row.channel, row.path, Sha1(row.sha1), row.size, row.label, row.principal, row.stored_at, False)


def at(conn: Connection, channel: str, path: str) -> Any:
    """The row at a path, or None."""
    return _AT(conn, {"channel": channel, "path": path}).one_or_none()


def tombstone_at(conn: Connection, channel: str, path: str) -> Any:
    """The tombstone at a path, or None."""
    return conn.execute(_TOMBSTONE_AT, {"channel": channel, "path": path}).one_or_none()


def is_deleted(conn: Connection, channel: str, path: str) -> bool:
    """Whether a tombstone lies at a path."""
    return tombstone_at(conn, channel, path) is not None


def has_old_deletions(conn: Connection, record: dict[str, Any]) -> bool:
    """Whether a `deletionsExpire` record has anything to end."""
    old = tombstones.c.deleted_at < record["before"]
    return (
        conn.execute(select(tombstones.c.path).where(old, tombstones.c.sha1.is_not(None)).limit(1)).first() is not None
    )


def expired(conn: Connection, record: dict[str, Any]) -> bool:
    """Whether a `referenceExpire` record has anything to drop."""
    old = select(bucket_objects.c.path).where(
        bucket_objects.c.channel == record["channel"], bucket_objects.c.stored_at < record["before"]
    )
    return conn.execute(old.limit(1)).first() is not None


def is_kept(known: Any, sha1: str, on_demand: bool) -> bool:
    """Whether a row stays as it is, with its first uploader, when the same content is referred to again."""
    return known.sha1 == sha1 and (on_demand or not known.on_demand)


def refer(conn: Connection, record: dict[str, Any]) -> bool | None:
    """Index one `reference` record; whether it is new or changed what was there. None for a channel that is gone, where
    an object that never changes lies, and for an on-demand one of what was deleted."""
    place = {"channel": record["channel"], "path": record["path"]}
    state = _STATE(conn, place).one_or_none()
    if state is None:
        return None
    known = None if state.sha1 is None else state
    if known is not None and known.sha1 != record["sha1"] and ObjectPath.parse(record["path"]).immutable:
        return None
    if known is not None and (record["onDemand"] or is_kept(known, record["sha1"], False)):
        return False
    if record["onDemand"] and state.tombstone is not None:
        return None
    if known is not None:
        add_total(conn, record["channel"], known.principal, -1, -known.size)
    add_total(conn, record["channel"], record["principal"], 1, record["size"])
    row = {name: record[name] for name in ("sha1", "size", "label", "principal")}
    _UPSERT(conn, {**place, **row, "stored_at": record["at"], "on_demand": record["onDemand"]})
    if not record["onDemand"] and state.tombstone is not None:
        conn.execute(_END_TOMBSTONE, place)
    return True


def apply_reference(conn: Connection, record: dict[str, Any]) -> bool:
    """As `refer`, for replays; whether what it refers to is there now."""
    return refer(conn, record) is not None


def apply_delete(conn: Connection, record: dict[str, Any]) -> bool:
    """Index one `referenceDelete` record. The tombstone remembers what was there."""
    known = at(conn, record["channel"], record["path"])
    if known is None:
        return False
    conn.execute(
        delete(bucket_objects).where(
            bucket_objects.c.channel == record["channel"], bucket_objects.c.path == record["path"]
        )
    )
    add_total(conn, known.channel, known.principal, -1, -known.size)
    row = {"deleted_at": record["at"], "deleted_by": record["by"]}
    if not known.on_demand:
        row |= {name: getattr(known, name) for name in _REMEMBERED}
    statement = insert(tombstones).values(channel=record["channel"], path=record["path"], **row)
    conn.execute(statement.on_conflict_do_update(index_elements=[tombstones.c.channel, tombstones.c.path], set_=row))
    return True


def apply_restore(conn: Connection, record: dict[str, Any]) -> bool:
    """Index one `referenceRestore` record."""
    known = tombstone_at(conn, record["channel"], record["path"])
    if known is None or known.sha1 is None:
        return False
    again = {name: getattr(known, name) for name in ("channel", "path", *_REMEMBERED)}
    return apply_reference(conn, {**again, "at": again["stored_at"], "onDemand": False})


def apply_deletions_expire(conn: Connection, record: dict[str, Any]) -> int:
    """Index one `deletionsExpire` record; how many deletions became final. The tombstones stay."""
    old = tombstones.c.deleted_at < record["before"]
    forgotten = update(tombstones).where(old, tombstones.c.sha1.is_not(None))
    return conn.execute(forgotten.values(dict.fromkeys(_REMEMBERED))).rowcount


def apply_expire(conn: Connection, record: dict[str, Any]) -> int:
    """Index one `referenceExpire` record; how many references went."""
    gone = conn.execute(
        delete(bucket_objects).where(
            bucket_objects.c.channel == record["channel"], bucket_objects.c.stored_at < record["before"]
        )
    ).rowcount
    _count_anew(conn, record["channel"])
    return gone


def apply_clear(conn: Connection, record: dict[str, Any]) -> int:
    """Index one `referenceClear` record; how many references went."""
    statement = delete(bucket_objects).where(bucket_objects.c.channel == record["channel"])
    if record["onDemandOnly"]:
        statement = statement.where(bucket_objects.c.on_demand.is_(True))
    gone = conn.execute(statement).rowcount
    _count_anew(conn, record["channel"])
    return gone


def _count_anew(conn: Connection, channel: str) -> None:
    conn.execute(delete(bucket_totals).where(bucket_totals.c.channel == channel))
    mine = bucket_objects.c.channel == channel
    columns = (bucket_objects.c.channel, bucket_objects.c.principal, func.count(), func.sum(bucket_objects.c.size))
    rows = select(*columns).where(mine).group_by(bucket_objects.c.principal)
    conn.execute(insert(bucket_totals).from_select(["channel", "principal", "objects", "bytes"], rows))


APPLY = {
    "reference": apply_reference,
    "referenceDelete": apply_delete,
    "referenceExpire": apply_expire,
    "referenceClear": apply_clear,
    "referenceRestore": apply_restore,
    "deletionsExpire": apply_deletions_expire,
}
"""By record type, for replays of the records log."""


def clear_index(conn: Connection) -> None:
    """Forget all references, before the records log is read anew."""
    conn.execute(delete(bucket_objects))
    conn.execute(delete(bucket_totals))
    conn.execute(delete(tombstones))
