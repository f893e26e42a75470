"""Messages of feeds that came from elsewhere: verified, compared with what is known, then kept in the one store.

Whatever the way (a band, a bucket, an upload to this hub), `ReceivedFeeds.take` is the only door. Nothing that
contradicts the store, the chain or a checkpoint gets in; the first history that was received stays.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

from kachery_lab.core.feeds import (
    HEAD_0,
    ChainRefused,
    Checkpoint,
    ReceivedMessage,
    SignedMessage,
    accept_chain,
    next_head,
)
from kachery_lab.core.ids import FeedId, SubfeedHash
from kachery_lab.core.keys import PublicKey
from kachery_lab.core.signatures import verify_2021
from kachery_lab.db.engine import Database
from kachery_lab.errors import Conflict, FeedFork, InvalidInput
from kachery_lab.services import received_index
from kachery_lab.services.events import Events
from kachery_lab.services.locks import KeyLocks
from kachery_lab.services.logs import LogWriter, to_line
from kachery_lab.services.received_index import Place

THREAD_MESSAGES = 20
THREAD_CHARACTERS = 256 * 1024
ROLL_PAGE = 10_000


@dataclass(frozen=True, slots=True)
class Room:
    """Room in a channel's bucket for more of a subfeed. `take`, inside a write, holds so many bytes or raises
    StorageFull; `release` gives them back, also inside the commit that counts them. Not `limited`: nobody counts."""

    limited: bool
    take: Callable[[Connection, int], None]
    release: Callable[[], None]


class ReceivedFeeds:
    """Takes in messages, one batch of a subfeed at a time."""

    def __init__(self, database: Database, log: LogWriter, events: Events) -> None:
        self._database = database
        self._log = log
        self._events = events
        self._locks: KeyLocks[tuple[FeedId, SubfeedHash]] = KeyLocks()

    async def place(self, feed_id: FeedId, subfeed_hash: SubfeedHash, origin: str) -> Place:
        """What is known of a subfeed, and of it in one channel."""
        return await self._database.read(lambda conn: received_index.load_place(conn, feed_id, subfeed_hash, origin))

    async def take(
        self,
        feed_id: FeedId,
        subfeed_hash: SubfeedHash,
        origin: str,
        messages: Sequence[ReceivedMessage],
        *,
        checkpoint: Checkpoint | None = None,
        show: Room | None = None,
    ) -> int:
        """Keep consecutive messages that came through a channel, durable on return; how many the subfeed has then.

        Known ones are compared and not stored again. `show`: the channel is this hub's, its bucket shows them. Raises
        ChainRefused (gap, or not what the feed's key signed at that place), FeedFork (signed by the feed's key, and
        contradicting what is here), StorageFull over the channel's limit, InvalidInput, Unavailable. Nothing of the
        batch is kept then.
        """
        if messages and [m.position for m in messages] != list(_numbers(messages)):
            raise ChainRefused("wrong-message-number", messages[0].position)
        async with self._locks.hold((feed_id, subfeed_hash)):
            place = await self.place(feed_id, subfeed_hash, origin)
            known, fresh = _split(messages, place.head.num_messages)
            await self._compare(feed_id, subfeed_hash, known)
            if fresh and place.writeable:
                raise FeedFork(
                    f"the channel has message {fresh[0].position} of a feed that is written here, this node has only "
                    f"{place.head.num_messages}",
                    hint="Was this node restored from an older backup? Appending would fork the feed",
                )
            accepted = await _in_thread(fresh, lambda: _accept(feed_id, place, fresh))
            await self._check(feed_id, subfeed_hash, place, accepted, checkpoint)
            return await self._keep(feed_id, subfeed_hash, origin, place, messages, accepted, checkpoint, show)

    # -- comparing -----------------------------------------------------------------------------------------------

    async def _compare(self, feed_id: FeedId, subfeed_hash: SubfeedHash, known: Sequence[ReceivedMessage]) -> None:
        """Messages at places that are taken must be the stored ones."""
        if not known:
            return
        numbers = _numbers(known)
        stored = await self._database.read(
            lambda conn: received_index.signatures(conn, feed_id, subfeed_hash, numbers.start, numbers.stop)
        )
        for message, signature in zip(known, stored, strict=False):
            if message.signature != signature:
                if not verify_2021(PublicKey.parse(feed_id, "feedId"), message.canonical_body, message.signature):
                    raise ChainRefused("bad-signature", message.position)
                raise _fork(f"another message {message.position} is signed by the feed's key")

    async def _check(
        self,
        feed_id: FeedId,
        subfeed_hash: SubfeedHash,
        place: Place,
        accepted: Sequence[SignedMessage],
        given: Checkpoint | None,
    ) -> None:
        """Both checkpoints, the known and the given one, hold for what is here and what is about to be."""
        if given is not None and (given.feed_id != feed_id or given.subfeed_hash != subfeed_hash or not given.verify()):
            raise InvalidInput("checkpoint: it is not signed by the feed's key for this subfeed")
        start = place.head.num_messages
        wanted = {one.count: one for one in (place.checkpoint, given) if one is not None and one.count > start}
        if given is not None and given.count <= start:
            base = place.checkpoint
            # An older one says nothing new: what it vouches for is vouched for already.
            if base is None or not given.count < base.count <= start:
                await self._check_stored(place, given)
        for one in (given, place.checkpoint):
            other = wanted.get(one.count) if one is not None else None
            if one is not None and other is not None and one.head != other.head:
                raise _fork(f"two different checkpoints of {one.count} messages are signed by the feed's key")
        count, head = start, place.head.head
        for message in accepted:
            count, head = count + 1, next_head(head, message.body_sha256, message.signature)
            if count in wanted and wanted[count].head != head:
                raise _fork(f"the messages up to {count} contradict the checkpoint that the feed's key signed")

    async def _check_stored(self, place: Place, given: Checkpoint) -> None:
        """A checkpoint of messages that are all here."""
        if given.count == place.head.num_messages:
            head = place.head.head
        else:
            base = place.checkpoint
            count, head = (0, HEAD_0) if base is None or base.count > given.count else (base.count, base.head)
            while count < given.count:
                end = min(count + ROLL_PAGE, given.count)
                page = await self._database.read(
                    lambda conn, at=count, to=end: received_index.links(  # type: ignore[misc]
                        conn, given.feed_id, given.subfeed_hash, at, to
                    )
                )
                if not page:
                    return  # deleted meanwhile
                for body_sha256, signature in page:
                    head = next_head(head, body_sha256, signature)
                count += len(page)
        if head != given.head:
            raise _fork(f"the feed's key signed a checkpoint of {given.count} messages that are not those here")

    # -- keeping -------------------------------------------------------------------------------------------------

    async def _keep(
        self,
        feed_id: FeedId,
        subfeed_hash: SubfeedHash,
        origin: str,
        place: Place,
        messages: Sequence[ReceivedMessage],
        accepted: Sequence[SignedMessage],
        checkpoint: Checkpoint | None,
        room: Room | None,
    ) -> int:
        start = messages[0].position if messages else 0
        end = messages[-1].position + 1 if messages else 0
        received = max(place.received, end if start <= place.received else 0)
        shown = None
        if room is not None:
            if start > place.shown:
                raise ChainRefused("gap", place.shown)
            shown = max(place.shown, end)
            await self._take_room(feed_id, subfeed_hash, place.shown, shown, accepted, room)
        newer = checkpoint is not None and (place.checkpoint is None or place.checkpoint.count < checkpoint.count)
        total = place.head.num_messages + len(accepted)
        if not accepted and received == place.received and shown in (None, place.shown) and not newer:
            return total
        record: dict[str, Any] = {
            "type": "receive",
            "feedId": feed_id,
            "subfeedHash": subfeed_hash,
            "position": place.head.num_messages,
            "at": int(time.time() * 1000),
            "messages": [[m.message, m.timestamp, m.signature, m.meta_data] for m in accepted],
            "origin": origin,
            "received": received,
            "shown": shown,
            "checkpoint": checkpoint.to_json() if checkpoint is not None and newer else None,
        }
        if not await self._append(record, room):
            raise Conflict("the feed was deleted while messages of it came in", hint="Try again")
        if accepted:
            self._events.publish((feed_id, subfeed_hash))
        return total

    async def _append(self, record: dict[str, Any], room: Room | None) -> bool:
        def commit(conn: Connection) -> bool:
            kept = received_index.apply_receive(conn, record)
            if room is not None:
                room.release()
            return kept

        return await self._log.append([to_line(record)], commit, None if room is None else room.release)

    async def _take_room(
        self,
        feed_id: FeedId,
        subfeed_hash: SubfeedHash,
        shown: int,
        end: int,
        accepted: Sequence[SignedMessage],
        room: Room,
    ) -> None:
        if not room.limited or end <= shown:
            return
        arriving = sum(len(m.message.encode()) + received_index.OVERHEAD_BYTES for m in accepted if m.position < end)
        here = await self._database.read(lambda conn: received_index.size_of(conn, feed_id, subfeed_hash, shown, end))
        try:
            await self._database.write(lambda conn: room.take(conn, here + arriving))
        except BaseException:
            room.release()
            raise

    async def show(self, feed_id: FeedId, subfeed_hash: SubfeedHash, origin: str, count: int, room: Room) -> None:
        """Have a channel's bucket show the first `count` messages, which are here. Raises StorageFull, Conflict."""
        place = await self.place(feed_id, subfeed_hash, origin)
        if count <= place.shown:
            return
        await self._take_room(feed_id, subfeed_hash, place.shown, count, (), room)
        record = {
            "type": "receive",
            "feedId": feed_id,
            "subfeedHash": subfeed_hash,
            "position": 0,
            "at": int(time.time() * 1000),
            "messages": [],
            "origin": origin,
            "received": place.received,
            "shown": count,
            "checkpoint": None,
        }
        if not await self._append(record, room):
            raise Conflict("the feed was deleted while it was provided")

    async def hide(
        self,
        origin: str,
        *,
        subfeed: tuple[FeedId, SubfeedHash] | None = None,
        before: int | None = None,
        forget: bool = False,
    ) -> int:
        """Have a channel's bucket show a subfeed (None: any) no longer, of those last added to before a time (ms since
        1970); how many. `forget`: nor is it known that they came through the channel."""
        record = {
            "type": "hide",
            "origin": origin,
            "feedId": subfeed[0] if subfeed else None,
            "subfeedHash": subfeed[1] if subfeed else None,
            "before": before,
            "forget": forget,
        }
        return await self._log.append([to_line(record)], lambda conn: received_index.apply_hide(conn, record))


def _split(messages: Sequence[ReceivedMessage], have: int) -> tuple[list[ReceivedMessage], list[ReceivedMessage]]:
    """(Messages at places that are taken, those that come behind)."""
    known = [message for message in messages if message.position < have]
    return known, list(messages[len(known) :])


def _numbers(messages: Sequence[ReceivedMessage]) -> range:
    return range(messages[0].position, messages[0].position + len(messages))


def _fork(what: str) -> FeedFork:
    return FeedFork(f"a fork: {what}", hint="The feed's owner signed two histories; the one that is here stays")


def _accept(feed_id: FeedId, place: Place, fresh: Sequence[ReceivedMessage]) -> list[SignedMessage]:
    return accept_chain(feed_id, place.head.num_messages, place.head.signature, fresh)


async def _in_thread(
    messages: Sequence[ReceivedMessage], work: Callable[[], list[SignedMessage]]
) -> list[SignedMessage]:
    """Verifying many or large messages must not keep every other request waiting."""
    if not messages:
        return []
    if len(messages) > THREAD_MESSAGES or sum(len(m.canonical_body) for m in messages) > THREAD_CHARACTERS:
        return await asyncio.to_thread(work)
    return work()
