"""Feeds: creating, naming, deleting and appending. The feeds log is the truth, the tables an index of it."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol, TypeVar

from sqlalchemy import Connection, select

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.ids import FeedId, FeedName, RequestId, SubfeedHash
from kachery_lab.core.keys import PrivateKey, derive_key, seal, unseal
from kachery_lab.core.strict_json import check_signable
from kachery_lab.db.engine import Database
from kachery_lab.db.models import feed_names, feeds
from kachery_lab.errors import Forbidden, InvalidInput
from kachery_lab.services import feed_index
from kachery_lab.services.events import Events
from kachery_lab.services.logs import LogWriter, to_line
from kachery_lab.services.subfeeds import Appended, AppendRequest, Subfeed

_REMEMBERED = 1000


class _Feed:
    """A feed in memory: its key when it is writeable here, and its subfeeds in use."""

    __slots__ = ("deleted", "key", "subfeeds")

    def __init__(self, key: PrivateKey | None) -> None:
        self.key = key
        self.deleted = False
        self.subfeeds: OrderedDict[str, Subfeed] = OrderedDict()

    def idle(self) -> bool:
        return all(subfeed.idle() for subfeed in self.subfeeds.values())


class FeedService:
    """Feeds of this node. `secret` is the node's key; feed keys rest encrypted under a key derived from it."""

    def __init__(
        self, database: Database, feeds_log: LogWriter, records_log: LogWriter, events: Events, secret: PrivateKey
    ) -> None:
        self._database = database
        self._feeds_log = feeds_log
        self._records_log = records_log
        self._events = events
        self._sealing_key = derive_key(secret, "kachery-lab/feed-keys/1")
        self._feeds: OrderedDict[str, _Feed] = OrderedDict()

    # -- feeds ---------------------------------------------------------------------------------------------------

    async def create(self, name: FeedName | None = None) -> FeedId:
        """A new feed, writeable here, durable on return. A name points to the newest feed that was given it."""
        key = PrivateKey.generate()
        feed_id = FeedId(key.public_hex)
        sealed = seal(self._sealing_key, bytes.fromhex(key.seed_hex()), feed_id.encode())
        now = _now()
        records = [{"type": "feedKey", "feedId": feed_id, "sealedKey": base64.b64encode(sealed).decode(), "at": now}]
        if name is not None:
            records.append({"type": "feedName", "name": name, "feedId": feed_id})
        await self._records_log.append(
            [to_line(record) for record in records],
            lambda conn: feed_index.apply_records(conn, records),
        )
        record = {"type": "feed", "feedId": feed_id, "at": now}
        await self._feeds_log.append([to_line(record)], lambda conn: feed_index.apply_record(conn, record))
        return feed_id

    async def delete(self, feed_id: FeedId) -> None:
        """Remove a feed with its key, messages and names, durable on return. An unknown feed is no error."""
        if not await self._database.read(lambda conn: feed_index.exists(conn, feed_id)):
            return
        feed = await self._load(feed_id)
        feed.deleted = True
        running = [subfeed.task for subfeed in feed.subfeeds.values() if subfeed.task is not None]
        if running:
            await asyncio.wait(running)
        record = {"type": "feedDelete", "feedId": feed_id, "at": _now()}
        try:
            await self._feeds_log.append([to_line(record)], lambda conn: feed_index.apply_record(conn, record))
        except BaseException:
            feed.deleted = False
            raise
        self._feeds.pop(feed_id, None)
        for subfeed_hash in feed.subfeeds:
            self._events.publish((feed_id, subfeed_hash))

    async def id_for_name(self, name: FeedName) -> FeedId | None:
        """The feed that was created with a name, None when there is none or it was deleted."""
        statement = select(feed_names.c.feed_id).where(feed_names.c.name == name)
        found = await self._database.read(lambda conn: conn.execute(statement).scalar_one_or_none())
        return None if found is None else FeedId(found)

    async def is_writeable(self, feed_id: FeedId) -> bool:
        """Whether messages can be appended here; False for unknown feeds."""
        feed = await self._load(feed_id)
        return feed.key is not None and not feed.deleted

    # -- appending -----------------------------------------------------------------------------------------------

    async def append(
        self,
        feed_id: FeedId,
        subfeed_hash: SubfeedHash,
        messages: Sequence[object],
        *,
        expected_position: int | None = None,
        request_id: RequestId | None = None,
    ) -> Appended:
        """Append all messages or none, durable on return.

        Raises InvalidInput naming the JSON path of what cannot be signed exactly, Forbidden when the feed is not
        writeable here, FeedPosition when the subfeed does not have `expected_position` messages, RequestIdReused when
        `request_id` came with other messages; the same id with the same messages gets the first answer again.
        """
        for number, message in enumerate(messages):
            if not isinstance(message, dict | list):
                raise InvalidInput(f"messages[{number}]: expected an object or array")
        if len(messages) > 20:
            texts = await asyncio.to_thread(_canonical, messages)
        else:
            texts = _canonical(messages)
        feed = await self._load(feed_id)
        if feed.key is None or feed.deleted:
            raise _not_writeable(feed_id)
        request = AppendRequest(texts, expected_position, request_id)
        subfeed = self._subfeed(feed, feed_id, subfeed_hash)
        return await subfeed.append(request)

    def _subfeed(self, feed: _Feed, feed_id: FeedId, subfeed_hash: SubfeedHash) -> Subfeed:
        subfeed = feed.subfeeds.get(subfeed_hash)
        if subfeed is None:
            assert feed.key is not None
            subfeed = Subfeed(
                feed_id, subfeed_hash, feed.key, self._database, self._feeds_log, self._events, lambda: feed.deleted
            )
            feed.subfeeds[subfeed_hash] = subfeed
            _forget_idle(feed.subfeeds)
        feed.subfeeds.move_to_end(subfeed_hash)
        return subfeed

    async def _load(self, feed_id: FeedId) -> _Feed:
        feed = self._feeds.get(feed_id)
        if feed is None:
            sealed = await self._database.read(lambda conn: _sealed_key(conn, feed_id))
            key = (
                None
                if sealed is None
                else PrivateKey.from_seed(unseal(self._sealing_key, sealed, feed_id.encode()).hex())
            )
            # Another caller may have loaded it while we waited; there must be one.
            feed = self._feeds.setdefault(feed_id, _Feed(key))
            if feed.key is None:
                # Not ours, or not here: it may be created or received at any time, so nothing is remembered.
                self._feeds.pop(feed_id, None)
            else:
                _forget_idle(self._feeds)
        return feed


class _Idle(Protocol):
    def idle(self) -> bool: ...


Entry = TypeVar("Entry", bound=_Idle)


def _forget_idle(entries: OrderedDict[str, Entry]) -> None:
    """Drop the longest unused entries over the limit; those in use stay, whatever their number."""
    excess = len(entries) - _REMEMBERED
    if excess > 0:
        for key in [key for key, entry in list(entries.items())[:-1] if entry.idle()][:excess]:
            del entries[key]


def _canonical(messages: Sequence[object]) -> list[str]:
    for number, message in enumerate(messages):
        check_signable(message, f"messages[{number}]")
    return [canonical_2021(message) for message in messages]


def _sealed_key(conn: Connection, feed_id: FeedId) -> bytes | None:
    return conn.execute(select(feeds.c.sealed_key).where(feeds.c.feed_id == feed_id)).scalar_one_or_none()


def _not_writeable(feed_id: FeedId) -> Forbidden:
    return Forbidden(
        f"the feed {feed_id} is not writeable here", hint="Only the node that made a feed, and still has it, appends"
    )


def _now() -> int:
    return int(time.time() * 1000)
