"""The index of feeds in the database: what an append adds, and how records of the logs are applied when replayed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from sqlalchemy import Connection, ScalarSelect, bindparam, delete, func, select, update
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.sql.expression import ClauseElement

from kachery_lab.core.feeds import HEAD_0, Checkpoint, SignedMessage, SubfeedHead
from kachery_lab.db.models import append_requests, feed_names, feeds, messages, subfeeds
from kachery_lab.db.prepared import Prepared
from kachery_lab.errors import StartRefused


class _Answer(Protocol):
    @property
    def position(self) -> int: ...
    @property
    def count(self) -> int: ...


def _make_set_end() -> ClauseElement:
    names = ("num_messages", "signature", "head", "checkpoint_signature")
    values: dict[str, Any] = {name: bindparam(name) for name in ("feed_id", "subfeed_hash", *names)}
    statement = insert(subfeeds).values(values)
    return statement.on_conflict_do_update(
        index_elements=[subfeeds.c.feed_id, subfeeds.c.subfeed_hash],
        set_={name: statement.excluded[name] for name in names},
    ).returning(subfeeds.c.id)


# Made once: making a statement takes longer than running it.
_SET_END = Prepared(_make_set_end())
_ADD_MESSAGES = insert(messages)
_ADD_REQUESTS = insert(append_requests).on_conflict_do_nothing()


def subfeed_id(feed_id: str, subfeed_hash: str) -> ScalarSelect[int]:
    """The row id of a subfeed, for use inside a statement."""
    return (
        select(subfeeds.c.id)
        .where(subfeeds.c.feed_id == feed_id, subfeeds.c.subfeed_hash == subfeed_hash)
        .scalar_subquery()
    )


def exists(conn: Connection, feed_id: str) -> bool:
    """Whether a feed is here, ours or received."""
    return conn.execute(select(feeds.c.feed_id).where(feeds.c.feed_id == feed_id)).first() is not None


def load_head(conn: Connection, feed_id: str, subfeed_hash: str) -> SubfeedHead:
    """Where a subfeed ends; the empty head when it was never mentioned."""
    row = conn.execute(
        select(subfeeds.c.num_messages, subfeeds.c.signature, subfeeds.c.head).where(
            subfeeds.c.feed_id == feed_id, subfeeds.c.subfeed_hash == subfeed_hash
        )
    ).one_or_none()
    return SubfeedHead() if row is None else SubfeedHead(row.num_messages, row.signature, row.head)


def add_messages(
    conn: Connection,
    feed_id: str,
    subfeed_hash: str,
    head: SubfeedHead,
    checkpoint_signature: str | None,
    added: list[SignedMessage],
    requests: Mapping[str, tuple[str, _Answer]],
    at: int,
) -> None:
    """Index messages that continue a subfeed, its new end, and the request ids that were used (digest, answer)."""
    end = {
        "feed_id": feed_id,
        "subfeed_hash": subfeed_hash,
        "num_messages": head.num_messages,
        "signature": head.signature,
        "head": head.head,
        "checkpoint_signature": checkpoint_signature,
    }
    row_id = _SET_END(conn, end).scalar_one()
    conn.execute(
        _ADD_MESSAGES,
        [
            {
                "subfeed_id": row_id,
                "position": message.position,
                "message": message.message,
                "timestamp": message.timestamp,
                "signature": bytes.fromhex(message.signature),
                "body_sha256": message.body_sha256,
                "meta_data": message.meta_data,
            }
            for message in added
        ],
    )
    if requests:
        conn.execute(
            _ADD_REQUESTS,
            [
                {
                    "subfeed_id": row_id,
                    "request_id": request_id,
                    "digest": digest,
                    "position": answer.position,
                    "count": answer.count,
                    "created_at": at,
                }
                for request_id, (digest, answer) in requests.items()
            ],
        )


def forget_requests(conn: Connection, before: int) -> int:
    """Drop request ids older than `before` (ms since 1970); how many went."""
    return conn.execute(delete(append_requests).where(append_requests.c.created_at < before)).rowcount


def apply_record(conn: Connection, record: Mapping[str, Any]) -> None:
    """Index one record of the feeds log, or a feed's key or name from the records log. Applying again is harmless."""
    _APPLY[record["type"]](conn, record)


def apply_records(conn: Connection, records: Iterable[Mapping[str, Any]]) -> None:
    """Index records in order."""
    for record in records:
        apply_record(conn, record)


def _feed_key(conn: Connection, record: Mapping[str, Any]) -> None:
    sealed = base64.b64decode(record["sealedKey"])
    statement = insert(feeds).values(feed_id=record["feedId"], created_at=record["at"], sealed_key=sealed)
    conn.execute(statement.on_conflict_do_update(index_elements=[feeds.c.feed_id], set_={"sealed_key": sealed}))


def _feed_name(conn: Connection, record: Mapping[str, Any]) -> None:
    statement = insert(feed_names).values(name=record["name"], feed_id=record["feedId"])
    conn.execute(
        statement.on_conflict_do_update(index_elements=[feed_names.c.name], set_={"feed_id": record["feedId"]})
    )


def add_feed(conn: Connection, record: Mapping[str, Any]) -> None:
    """Index that a feed is here, made here or received."""
    conn.execute(insert(feeds).values(feed_id=record["feedId"], created_at=record["at"]).on_conflict_do_nothing())


def _feed_delete(conn: Connection, record: Mapping[str, Any]) -> None:
    conn.execute(delete(feeds).where(feeds.c.feed_id == record["feedId"]))
    conn.execute(delete(feed_names).where(feed_names.c.feed_id == record["feedId"]))


class _Given:
    """An answer as a log record holds it."""

    def __init__(self, position: int, count: int) -> None:
        self.position = position
        self.count = count


def _append(conn: Connection, record: Mapping[str, Any]) -> None:
    feed_id, subfeed_hash = record["feedId"], record["subfeedHash"]
    head = load_head(conn, feed_id, subfeed_hash)
    if record["position"] + len(record["messages"]) <= head.num_messages:
        return
    if record["position"] != head.num_messages:
        raise StartRefused(
            f"the feeds log continues subfeed {subfeed_hash} of {feed_id} at {record['position']}, "
            f"the index ends at {head.num_messages}",
            hint="Restore the feeds log from a backup, then run `kachery-lab reindex`",
        )
    add_feed(conn, record)
    added = list(signed_messages(record, head))
    new_head = head.extended(added)
    checkpoint = Checkpoint.parse(record["checkpoint"]) if "checkpoint" in record else None
    if checkpoint is not None and (checkpoint.count, checkpoint.head) != (new_head.num_messages, new_head.head):
        raise StartRefused(
            f"the feeds log contradicts the checkpoint of subfeed {subfeed_hash} of {feed_id}",
            hint="Restore the feeds log from a backup, then run `kachery-lab reindex`",
        )
    requests = {}
    if "requestId" in record:
        answer = _Given(record["position"], len(record["messages"]))
        requests[record["requestId"]] = (record["digest"], answer)
    signature = None if checkpoint is None else checkpoint.signature
    add_messages(conn, feed_id, subfeed_hash, new_head, signature, added, requests, record["at"])


def signed_messages(record: Mapping[str, Any], head: SubfeedHead) -> Iterator[SignedMessage]:
    """The messages of a record that continue a subfeed which ends at `head`."""
    previous = head.signature
    for number, (text, timestamp, signature, meta_data) in enumerate(record["messages"], start=head.num_messages):
        bare = SignedMessage(number, text, timestamp, signature, HEAD_0, meta_data)
        body_sha256 = hashlib.sha256(bare.canonical_body(previous).encode()).digest()
        yield SignedMessage(number, text, timestamp, signature, body_sha256, meta_data)
        previous = signature


def clear_feeds_log(conn: Connection) -> None:
    """Forget what the feeds log tells; keys and names come from the records log."""
    conn.execute(delete(subfeeds))
    conn.execute(delete(feeds).where(feeds.c.sealed_key.is_(None)))


def clear_records_log(conn: Connection) -> None:
    """Forget what the records log tells of feeds."""
    conn.execute(update(feeds).values(sealed_key=None))
    conn.execute(delete(feed_names))


def counts(conn: Connection) -> tuple[int, int]:
    """(Feeds, messages) in the index."""
    return (
        conn.execute(select(func.count()).select_from(feeds)).scalar_one(),
        conn.execute(select(func.coalesce(func.sum(subfeeds.c.num_messages), 0))).scalar_one(),
    )


_APPLY = {"feedKey": _feed_key, "feedName": _feed_name, "feed": add_feed, "feedDelete": _feed_delete, "append": _append}
