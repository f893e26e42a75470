"""The index of what lies in buckets: rows made from the records log, and looked at by `services.buckets`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import Sha1
from kachery_lab.core.objects import ObjectPath
from kachery_lab.db.models import bucket_objects, bucket_totals, channels, tombstones
from kachery_lab.services.quotas import add_total

_REMEMBERED = ("sha1", "size", "label", "principal", "stored_at")


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
        row.channel, row.path, Sha1(row.sha1), row.size, row.label, row.principal, row.stored_at, row.on_demand
    )


def deleted_reference(row: Any) -> Reference:
    """What a tombstone remembers; only for one that does."""
    return Reference(row.channel, row.path, Sha1(row.sha1), row.size, row.label, row.principal, row.stored_at, False)


def one(channel: str, path: str) -> Any:
    """The row at a path."""
    return select(bucket_objects).where(bucket_objects.c.channel == channel, bucket_objects.c.path == path)


def tombstone(channel: str, path: str) -> Any:
    """The tombstone at a path."""
    return select(tombstones).where(tombstones.c.channel == channel, tombstones.c.path == path)


def is_deleted(conn: Connection, channel: str, path: str) -> bool:
    """Whether a tombstone lies at a path."""
    return conn.execute(tombstone(channel, path)).first() is not None


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


def apply_reference(conn: Connection, record: dict[str, Any]) -> bool:
    """Index one `reference` record. False for a channel that is gone, where an object that never changes lies, and for
    an on-demand one of what was deleted."""
    if conn.execute(select(channels.c.name).where(channels.c.name == record["channel"])).first() is None:
        return False
    known = conn.execute(one(record["channel"], record["path"])).one_or_none()
    if known is not None and known.sha1 != record["sha1"] and ObjectPath.parse(record["path"]).immutable:
        return False
    if known is not None and (record["onDemand"] or is_kept(known, record["sha1"], False)):
        return True
    if record["onDemand"] and is_deleted(conn, record["channel"], record["path"]):
        return False
    if known is not None:
        add_total(conn, known.channel, known.principal, -1, -known.size)
    add_total(conn, record["channel"], record["principal"], 1, record["size"])
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
    """Index one `referenceDelete` record. The tombstone remembers what was there."""
    known = conn.execute(one(record["channel"], record["path"])).one_or_none()
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
    known = conn.execute(tombstone(record["channel"], record["path"])).one_or_none()
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
