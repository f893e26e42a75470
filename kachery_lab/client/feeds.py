"""What buckets of another server's hub say of feeds: the count, checkpoints, and messages, parsed and not verified."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from kachery_lab.core.canonical_json import loads_2021
from kachery_lab.core.feeds import Checkpoint, ReceivedMessage, parse_signed_message
from kachery_lab.core.ids import FeedId, SubfeedHash, parse_fields
from kachery_lab.core.objects import subfeed_folder
from kachery_lab.errors import InvalidInput

if TYPE_CHECKING:
    from kachery_lab.client.hub import HubClient

MAX_STATE = 64 * 1024
MAX_PAGE = 104_000_000
"""Bytes of one answer with messages; a single message may have nearly as many."""
_THREAD_BYTES = 256 * 1024


class FeedObjects:
    """The feed objects of buckets. `bucket_url` is that of a membership."""

    def __init__(self, hub: HubClient) -> None:
        self._hub = hub

    async def state(self, bucket_url: str, feed_id: FeedId, subfeed_hash: SubfeedHash) -> tuple[int, Checkpoint | None]:
        """How many messages the bucket shows, 0 when it does not know the subfeed, and the newest checkpoint that the
        hub knows. Raises InvalidInput for what is no such document, and what reading from a bucket raises."""
        data = await self._hub.document(bucket_url, f"{subfeed_folder(feed_id, subfeed_hash)}/subfeed.json", MAX_STATE)
        if data is None:
            return 0, None
        found = loads_2021(data)
        count = found.get("messageCount") if isinstance(found, dict) else None
        if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count <= 2**53 or count % 1:
            raise InvalidInput("subfeed.json: expected an object with a whole number `messageCount`")
        checkpoint = None
        if isinstance(found, dict) and "checkpoint" in found:
            checkpoint = Checkpoint.parse(found["checkpoint"])
        return int(count), checkpoint

    async def messages(
        self, bucket_url: str, feed_id: FeedId, subfeed_hash: SubfeedHash, start: int, end: int
    ) -> list[ReceivedMessage]:
        """Messages from `start` on, at most to `end` (exclusive); perhaps fewer, none when the bucket does not show
        them. Raises InvalidInput for what is no such document."""
        path = f"{subfeed_folder(feed_id, subfeed_hash)}/{start}-{end}"
        data = await self._hub.document(bucket_url, path, MAX_PAGE)
        if data is None:
            return []
        if len(data) > _THREAD_BYTES:
            return await asyncio.to_thread(_parse_messages, data, end - start)
        return _parse_messages(data, end - start)

    async def upload(
        self,
        channel: str,
        feed_id: FeedId,
        subfeed_hash: SubfeedHash,
        start: int,
        envelopes: list[str],
        checkpoint: Checkpoint | None,
    ) -> int:
        """Put messages from `start` on, as JSON texts, into the channel's bucket; how many bytes travelled. Raises
        Forbidden, Conflict (a gap), FeedFork, ContentMismatch, TooLarge, StorageFull, Unavailable."""
        tail = "" if checkpoint is None else f',"checkpoint":{json.dumps(checkpoint.to_json())}'
        data = f'{{"messages":[{",".join(envelopes)}]{tail}}}'.encode()
        end = start + len(envelopes)
        url = await self._hub.feed_upload_url(channel, feed_id, subfeed_hash, start, end, len(data))

        await self._hub.put(url, data, len(data))
        return len(data)


def _parse_messages(data: bytes, limit: int) -> list[ReceivedMessage]:
    fields = parse_fields(loads_2021(data), "the messages", frozenset({"messages"}), frozenset())
    found = fields["messages"]
    if not isinstance(found, list) or len(found) > limit:
        raise InvalidInput(f"messages: expected a list of at most {limit}")
    return [parse_signed_message(one, f"messages[{index}]") for index, one in enumerate(found)]
