"""Feeds in the buckets of this server's own channels: a view of the one store, never a copy.

A bucket shows the first messages of a subfeed, as many as were uploaded or provided there. What it answers is made when
somebody asks: `subfeed.json`, single messages as the older nodes read them, and `<n>-<m>` with many at once.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection

from kachery_lab.core.feeds import ChainRefused, Checkpoint, ReceivedMessage, parse_signed_message
from kachery_lab.core.ids import FeedId, NodeId, SubfeedHash, parse_fields
from kachery_lab.core.objects import ObjectPath, subfeed_folder
from kachery_lab.errors import Conflict, ContentMismatch, InvalidInput
from kachery_lab.services import received_index
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.quotas import Charge, Quotas, channel_bytes
from kachery_lab.services.received_feeds import ReceivedFeeds, Room
from kachery_lab.services.received_index import Place
from kachery_lab.services.watches import Span, Watch, WatchService

FEED_KINDS = ("message", "messages", "subfeed")


class BucketFeeds:
    """Reads and adds to what buckets of this hub show. Rights are the caller's business."""

    def __init__(self, data: AccessData, feeds: ReceivedFeeds, watches: WatchService, hub_id: NodeId) -> None:
        self._data = data
        self._feeds = feeds
        self._watches = watches
        self._hub_id = hub_id
        self.quotas = Quotas(data, self.shown_bytes)

    def origin(self, channel: str) -> str:
        """A channel's identity, the same at every node."""
        return f"{self._hub_id}/{channel}"

    async def place(self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash) -> Place:
        """What is known of a subfeed, and of it in the channel."""
        return await self._feeds.place(feed_id, subfeed_hash, self.origin(channel))

    def used(self, conn: Connection, channel: str) -> int:
        """Bytes of everything that the channel's bucket shows: objects and feeds."""
        return channel_bytes(conn, channel) + self.shown_bytes(conn, channel)

    def shown_bytes(self, conn: Connection, channel: str) -> int:
        """Bytes of the feeds that the channel's bucket shows."""
        return received_index.used(conn, self.origin(channel))

    # -- reading -------------------------------------------------------------------------------------------------

    async def document(self, channel: str, path: ObjectPath) -> bytes | None:
        """The JSON at a path; None when the bucket does not show it. A range may end early, never before its first
        message: who asks goes on from there."""
        assert path.feed_id is not None and path.subfeed_hash is not None
        place = await self.place(channel, path.feed_id, path.subfeed_hash)
        if path.kind == "subfeed":
            return _subfeed_json(place).encode() if place.shown else None
        assert path.position is not None
        if path.position >= place.shown:
            return None
        end = min(path.end or path.position + 1, place.shown)
        span = Span(Watch(path.feed_id, path.subfeed_hash, path.position), path.position, end)
        async for page in self._watches.read(span, signed=True):
            return page[0].encode() if path.kind == "message" else f'{{"messages":[{",".join(page)}]}}'.encode()
        return None

    # -- adding --------------------------------------------------------------------------------------------------

    def room(self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash) -> Room:
        """Room for more of a subfeed, for `ReceivedFeeds`; nobody but the channel has a limit for it."""
        charge = Charge(channel, subfeed_folder(feed_id, subfeed_hash), "", 0, 0)
        limited, hold = self.quotas.limits(charge), self.quotas.hold()
        return Room(limited, lambda conn, size: hold.take(conn, replace(charge, size=size)), hold.release)

    async def put(self, channel: str, path: ObjectPath, value: Any) -> None:
        """Take in an uploaded document; the same again is no error. Raises ContentMismatch for what the feed's key did
        not sign at that place, Conflict for a gap, FeedFork, StorageFull."""
        assert path.feed_id is not None and path.subfeed_hash is not None
        if path.kind == "subfeed":
            await self._check_count(channel, path.feed_id, path.subfeed_hash, value)
            return
        assert path.position is not None
        try:
            messages, checkpoint = _messages(path, value)
            if [m.position for m in messages] != list(range(path.position, path.end or path.position + 1)):
                raise ContentMismatch("the messages are not those that the path names")
            room = self.room(channel, path.feed_id, path.subfeed_hash)
            await self._feeds.take(
                path.feed_id, path.subfeed_hash, self.origin(channel), messages, checkpoint=checkpoint, show=room
            )
        except ChainRefused as error:
            if error.reason == "gap":
                raise Conflict(f"message {error.position} is not here yet", hint="Upload messages in order") from error
            raise ContentMismatch(error.message) from error
        except InvalidInput as error:
            raise ContentMismatch(error.message) from error

    async def _check_count(self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash, value: object) -> None:
        """The count follows from the messages; what an upload says of it is only compared."""
        count = value.get("messageCount") if isinstance(value, dict) else None
        if isinstance(count, bool) or not isinstance(count, int | float) or count < 0:
            raise ContentMismatch("subfeed.json: expected an object with a number `messageCount`")
        shown = (await self.place(channel, feed_id, subfeed_hash)).shown
        if count > shown:
            raise Conflict(f"subfeed.json: {count:g} messages, here are {shown}", hint="Upload the messages first")

    async def show(self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash, count: int) -> None:
        """Provide the first `count` messages, which are here. Raises StorageFull."""
        room = self.room(channel, feed_id, subfeed_hash)
        await self._feeds.show(feed_id, subfeed_hash, self.origin(channel), count, room)

    # -- removing ------------------------------------------------------------------------------------------------

    async def hide(self, channel: str, path: ObjectPath) -> bool:
        """Show a subfeed no longer; whether it was shown. Raises InvalidInput for single messages."""
        assert path.feed_id is not None and path.subfeed_hash is not None
        if path.kind != "subfeed":
            raise InvalidInput("messages are not deleted singly", hint="Delete the subfeed.json beside them")
        if not (await self.place(channel, path.feed_id, path.subfeed_hash)).shown:
            return False
        await self._feeds.hide(self.origin(channel), subfeed=(path.feed_id, path.subfeed_hash))
        return True

    async def clear(self, channel: str, *, gone: bool) -> None:
        """Show nothing any more; `gone`: the channel is removed, and another of its name starts anew."""
        await self._feeds.hide(self.origin(channel), forget=gone)

    async def expire(self, channel: str, before: int) -> int:
        """Hide subfeeds that were last added to before a time (ms since 1970); how many."""
        return await self._feeds.hide(self.origin(channel), before=before)

    def is_expired(self, conn: Connection, channel: str, before: int) -> bool:
        """Whether `expire` would find anything."""
        return received_index.expired(conn, self.origin(channel), before)


def _subfeed_json(place: Place) -> str:
    found: dict[str, Any] = {"messageCount": place.shown}
    if place.checkpoint is not None:
        # Older nodes read the count and leave the rest.
        found["checkpoint"] = place.checkpoint.to_json()
    return json.dumps(found, separators=(",", ":"))


def _messages(path: ObjectPath, value: Any) -> tuple[list[ReceivedMessage], Checkpoint | None]:
    if path.kind == "message":
        return [parse_signed_message(value)], None
    fields = parse_fields(value, "the upload", frozenset({"messages"}), frozenset({"checkpoint"}))
    found = fields["messages"]
    if not isinstance(found, list):
        raise InvalidInput("messages: expected a list")
    parsed = [parse_signed_message(one, f"messages[{index}]") for index, one in enumerate(found)]
    return parsed, Checkpoint.parse(fields["checkpoint"]) if "checkpoint" in fields else None
