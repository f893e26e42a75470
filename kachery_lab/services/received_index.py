"""The index of feeds that came through channels, and of what channels' buckets show; records of the feeds log apply it.

`receive`  messages that came through a channel (possibly none), how far the channel has them, a checkpoint
`hide`     a channel's bucket shows a subfeed, or all of them, no longer; `forget`: nor did they come through it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, LargeBinary, cast, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.feeds import Checkpoint, SubfeedHead
from kachery_lab.core.ids import FeedId, SubfeedHash
from kachery_lab.db.models import feed_channels, feeds, messages, subfeed_checkpoints, subfeeds
from kachery_lab.services import feed_index

OVERHEAD_BYTES = 400
"""What a message counts against a channel's limit beyond its own text: numbers, time and two signatures."""


@dataclass(frozen=True, slots=True)
class Place:
    """What is known of a subfeed, and of it in one channel. `checkpoint` is the newest one, perhaps beyond the end."""

    head: SubfeedHead
    writeable: bool
    checkpoint: Checkpoint | None
    received: int
    shown: int


def load_place(conn: Connection, feed_id: FeedId, subfeed_hash: SubfeedHash, origin: str) -> Place:
    """Nothing known is a place without messages."""
    statement = (
        select(
            subfeeds, feeds.c.sealed_key, subfeed_checkpoints, feed_channels.c.num_received, feed_channels.c.num_shown
        )
        .join(feeds, feeds.c.feed_id == subfeeds.c.feed_id)
        .outerjoin(subfeed_checkpoints, subfeed_checkpoints.c.subfeed_id == subfeeds.c.id)
        .outerjoin(feed_channels, (feed_channels.c.subfeed_id == subfeeds.c.id) & (feed_channels.c.origin == origin))
        .where(subfeeds.c.feed_id == feed_id, subfeeds.c.subfeed_hash == subfeed_hash)
    )
    row = conn.execute(statement).mappings().one_or_none()
    if row is None:
        key = conn.execute(select(feeds.c.sealed_key).where(feeds.c.feed_id == feed_id)).scalar_one_or_none()
        return Place(SubfeedHead(), key is not None, None, 0, 0)
    end = SubfeedHead(row[subfeeds.c.num_messages], row[subfeeds.c.signature], row[subfeeds.c.head])
    checkpoint = None
    if row[subfeeds.c.checkpoint_signature] is not None:
        # Made here, with the feed's key, for the end of the subfeed.
        made = row[subfeeds.c.checkpoint_signature]
        checkpoint = Checkpoint(feed_id, subfeed_hash, end.num_messages, end.head, made)
    elif row[subfeed_checkpoints.c.count] is not None:
        checkpoint = Checkpoint(
            feed_id,
            subfeed_hash,
            row[subfeed_checkpoints.c.count],
            row[subfeed_checkpoints.c.head],
            row[subfeed_checkpoints.c.signature],
        )
    return Place(
        end,
        row[feeds.c.sealed_key] is not None,
        checkpoint,
        row[feed_channels.c.num_received] or 0,
        row[feed_channels.c.num_shown] or 0,
    )


def signatures(conn: Connection, feed_id: str, subfeed_hash: str, start: int, end: int) -> list[str]:
    """Signatures of the stored messages `start` to `end` (exclusive), in order."""
    statement = (
        select(messages.c.signature)
        .where(
            messages.c.subfeed_id == feed_index.subfeed_id(feed_id, subfeed_hash),
            messages.c.position >= start,
            messages.c.position < end,
        )
        .order_by(messages.c.position)
    )
    return [bytes(found).hex() for found in conn.execute(statement).scalars()]


def links(conn: Connection, feed_id: str, subfeed_hash: str, start: int, end: int) -> list[tuple[bytes, str]]:
    """(SHA-256 of the body, signature) of stored messages: what the rolling head is made of."""
    statement = (
        select(messages.c.body_sha256, messages.c.signature)
        .where(
            messages.c.subfeed_id == feed_index.subfeed_id(feed_id, subfeed_hash),
            messages.c.position >= start,
            messages.c.position < end,
        )
        .order_by(messages.c.position)
    )
    return [(row.body_sha256, bytes(row.signature).hex()) for row in conn.execute(statement)]


def size_of(conn: Connection, feed_id: str, subfeed_hash: str, start: int, end: int) -> int:
    """What stored messages count against a channel's limit, in bytes."""
    statement = select(
        func.coalesce(func.sum(func.length(cast(messages.c.message, LargeBinary))), 0) + OVERHEAD_BYTES * func.count()
    ).where(
        messages.c.subfeed_id == feed_index.subfeed_id(feed_id, subfeed_hash),
        messages.c.position >= start,
        messages.c.position < end,
    )
    return int(conn.execute(statement).scalar_one())


def used(conn: Connection, origin: str) -> int:
    """Bytes that a channel's bucket shows of feeds."""
    total = select(func.coalesce(func.sum(feed_channels.c.shown_bytes), 0)).where(feed_channels.c.origin == origin)
    return int(conn.execute(total).scalar_one())


def expired(conn: Connection, origin: str, before: int) -> bool:
    """Whether a bucket shows a subfeed that was last added to before a time (ms since 1970)."""
    statement = select(feed_channels.c.subfeed_id).where(
        feed_channels.c.origin == origin, feed_channels.c.num_shown > 0, feed_channels.c.shown_at < before
    )
    return conn.execute(statement.limit(1)).first() is not None


# -- records -----------------------------------------------------------------------------------------------------


def apply_receive(conn: Connection, record: Mapping[str, Any]) -> bool:
    """Index one `receive` record; whether it counts: messages that do not continue what is here do not, as when the
    feed was deleted meanwhile. Applying again is harmless."""
    feed_id, subfeed_hash, added = record["feedId"], record["subfeedHash"], record["messages"]
    head = feed_index.load_head(conn, feed_id, subfeed_hash)
    if added and record["position"] + len(added) > head.num_messages:
        if record["position"] != head.num_messages:
            return False
        feed_index.add_feed(conn, record)
        signed = list(feed_index.signed_messages(record, head))
        head = head.extended(signed)
        feed_index.add_messages(conn, feed_id, subfeed_hash, head, None, signed, {}, record["at"])
    if head.num_messages < max(record["received"], record["shown"] or 0):
        return False
    subfeed_id = _subfeed(conn, record)
    _channel(conn, subfeed_id, record)
    if record["checkpoint"] is not None:
        _checkpoint(conn, subfeed_id, Checkpoint.parse(record["checkpoint"]))
    return True


def _subfeed(conn: Connection, record: Mapping[str, Any]) -> int:
    place = {"feed_id": record["feedId"], "subfeed_hash": record["subfeedHash"]}
    feed_index.add_feed(conn, record)
    conn.execute(insert(subfeeds).values(**place, num_messages=0, head=SubfeedHead().head).on_conflict_do_nothing())
    statement = select(subfeeds.c.id).filter_by(**place)
    return int(conn.execute(statement).scalar_one())


def _channel(conn: Connection, subfeed_id: int, record: Mapping[str, Any]) -> None:
    known = conn.execute(
        select(feed_channels).where(
            feed_channels.c.subfeed_id == subfeed_id, feed_channels.c.origin == record["origin"]
        )
    ).one_or_none()
    before = (known.num_received, known.num_shown, known.shown_bytes, known.shown_at) if known else (0, 0, 0, 0)
    received, shown, size, at = before
    received = max(received, record["received"])
    if record["shown"] is not None and record["shown"] > shown:
        size += size_of(conn, record["feedId"], record["subfeedHash"], shown, record["shown"])
        shown, at = record["shown"], record["at"]
    if known is None or before != (received, shown, size, at):
        row = {"num_received": received, "num_shown": shown, "shown_bytes": size, "shown_at": at}
        statement = insert(feed_channels).values(subfeed_id=subfeed_id, origin=record["origin"], **row)
        conn.execute(
            statement.on_conflict_do_update(
                index_elements=[feed_channels.c.subfeed_id, feed_channels.c.origin], set_=row
            )
        )


def _checkpoint(conn: Connection, subfeed_id: int, checkpoint: Checkpoint) -> None:
    row = {"count": checkpoint.count, "head": checkpoint.head, "signature": checkpoint.signature}
    statement = insert(subfeed_checkpoints).values(subfeed_id=subfeed_id, **row)
    conn.execute(
        statement.on_conflict_do_update(
            index_elements=[subfeed_checkpoints.c.subfeed_id],
            set_=row,
            where=subfeed_checkpoints.c.count < checkpoint.count,
        )
    )


def apply_hide(conn: Connection, record: Mapping[str, Any]) -> int:
    """Index one `hide` record; of how many subfeeds."""
    chosen = feed_channels.c.origin == record["origin"]
    if record["feedId"] is not None:
        chosen &= feed_channels.c.subfeed_id == feed_index.subfeed_id(record["feedId"], record["subfeedHash"])
    if record["before"] is not None:
        chosen &= feed_channels.c.shown_at < record["before"]
    if record["forget"]:
        return conn.execute(delete(feed_channels).where(chosen)).rowcount
    hidden = update(feed_channels).where(chosen, feed_channels.c.num_shown > 0).values(num_shown=0, shown_bytes=0)
    return conn.execute(hidden).rowcount


_APPLY = {"receive": apply_receive, "hide": apply_hide}


def apply_record(conn: Connection, record: Mapping[str, Any]) -> None:
    """Index one record of the feeds log. Applying again is harmless."""
    apply = _APPLY.get(record["type"])
    if apply is None:
        feed_index.apply_record(conn, record)
    else:
        apply(conn, record)
