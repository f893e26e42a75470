"""Providing feeds to the nodes of a channel (spec/pubsub-bands.md section 5, the owner).

Nothing leaves this node before somebody subscribes. Then the bucket gets what it lacks, once however many subscribe,
and appended messages go out at once on the band, into the bucket a little later. A feed that was received through a
channel is provided in that channel only, when nobody else has put it into the bucket.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from kachery_lab.core.band_messages import split_feed_messages
from kachery_lab.core.canonical_json import loads_2021
from kachery_lab.core.ids import NodeId
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden, KacheryLabError
from kachery_lab.observability.logging import RateLimited
from kachery_lab.services.bands import BandHandlers, BandMessage, ChannelBands
from kachery_lab.services.channel_subfeeds import ChannelSubfeed
from kachery_lab.services.events import Events
from kachery_lab.services.feed_channels import FeedChannelFinder
from kachery_lab.services.received_feeds import ReceivedFeeds
from kachery_lab.services.received_index import Place
from kachery_lab.services.watches import Span, Watch, WatchService

EXPIRES_SECONDS = 90.0
"""A subscription ends so long after the last `subscribeToSubfeed`."""
UPLOAD_SECONDS = 5.0
"""Messages that went out live follow into the bucket within this time."""
CHECKPOINT_SECONDS = 1.0
"""A checkpoint follows live messages, not more often than this."""
RELAY_SECONDS = 1.0
"""A node that only received a feed waits so long, and up to twice that, for somebody who has it first."""
RETRY_SECONDS = 2.0
ANSWER_SECONDS = 0.5
"""Subscriptions that come within this time after an answer are answered together."""
LIVE_CHARACTERS = 256 * 1024
"""What was appended at once goes out live up to this much; more goes by the bucket."""
MAX_PROVIDED = 5_000

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Provided:
    """A subfeed that somebody in a channel follows."""

    subfeed: ChannelSubfeed
    expires: float
    lowest: int
    asked: bool = True
    sent: int = 0
    upload_at: float = 0.0
    answered_at: float = 0.0
    checkpoint_at: float = 0.0
    vouched: int = 0
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class FeedProviders:
    """Everything that is provided now. `expires`, `upload` and `relay` in seconds."""

    def __init__(
        self,
        finder: FeedChannelFinder,
        received: ReceivedFeeds,
        watches: WatchService,
        events: Events,
        handlers: BandHandlers,
        own_node: NodeId,
        *,
        expires: float = EXPIRES_SECONDS,
        upload: float = UPLOAD_SECONDS,
        relay: float = RELAY_SECONDS,
    ) -> None:
        self._finder = finder
        self._received = received
        self._watches = watches
        self._events = events
        self._own_node = own_node
        self._expires = expires
        self._upload = upload
        self._relay = relay
        self._provided: dict[ChannelSubfeed, _Provided] = {}
        self._notes = RateLimited()
        handlers.on("subscribeToSubfeed", self._heard)

    async def close(self) -> None:
        """End everything that runs in the background."""
        tasks = [one.task for one in self._provided.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _heard(self, message: BandMessage, bands: ChannelBands) -> None:
        """`subscribeToSubfeed`. What is not here, or not for this channel, is not answered."""
        subfeed = ChannelSubfeed.of(self._finder.of(bands), message)
        if message.sender == self._own_node or not subfeed.may(Role.PROVIDE_FEEDS):
            return
        position = message.body["position"]
        if self._asked_again(subfeed, position):
            return
        place = await self._place(subfeed)
        if self._asked_again(subfeed, position) or (not place.writeable and place.received <= position):
            return
        if len(self._provided) >= MAX_PROVIDED:
            self._notes.note("feed_not_provided", channel=message.channel, most=MAX_PROVIDED)
            return
        provided = _Provided(subfeed, time.monotonic() + self._expires, position, sent=place.head.num_messages)
        self._provided[subfeed] = provided
        work = self._provide(provided) if place.writeable else self._pass_on(provided)
        provided.task = asyncio.create_task(self._run(provided, work))

    def _asked_again(self, subfeed: ChannelSubfeed, position: int) -> bool:
        """Whether the subfeed is provided already; then it goes on, for this subscriber too."""
        known = self._provided.get(subfeed)
        if known is None:
            return False
        known.expires, known.asked = time.monotonic() + self._expires, True
        known.lowest = min(known.lowest, position)
        known.wake.set()
        return True

    async def _run(self, provided: _Provided, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except KacheryLabError as error:
            self._note_failure(provided, error)
        except Exception:
            log.exception("feed_provider_failed")
        finally:
            del self._provided[provided.subfeed]

    def _note_failure(self, provided: _Provided, error: KacheryLabError) -> None:
        self._notes.note("feed_not_provided", **provided.subfeed.failure(error))

    async def _place(self, subfeed: ChannelSubfeed) -> Place:
        return await self._received.place(*subfeed.name, await subfeed.origin())

    # -- feeds that are written here -----------------------------------------------------------------------------

    async def _provide(self, provided: _Provided) -> None:
        """Until the subscription expires: answer subscriptions, send what is appended, put it into the bucket."""
        with self._events.subscribe([provided.subfeed.name], flag=provided.wake):
            while time.monotonic() < provided.expires and not self._events.closed:
                provided.wake.clear()
                try:
                    wait = await self._step(provided)
                except Forbidden as error:
                    self._note_failure(provided, error)
                    return
                except KacheryLabError as error:
                    self._note_failure(provided, error)
                    provided.asked, wait = True, RETRY_SECONDS
                try:
                    async with asyncio.timeout(min(wait, max(provided.expires - time.monotonic(), 0))):
                        await provided.wake.wait()
                except TimeoutError:
                    continue

    async def _step(self, provided: _Provided) -> float:
        """Send and upload what is due; in how many seconds something is due again."""
        place = await self._place(provided.subfeed)
        if not place.writeable:
            provided.expires = 0
            return 0
        count, now = place.head.num_messages, time.monotonic()
        if count > provided.sent:
            await self._send_live(provided, place)
            if provided.upload_at == 0:
                provided.upload_at = now + self._upload
        answer_at = provided.answered_at + ANSWER_SECONDS
        if (provided.asked and now >= answer_at) or (provided.upload_at and now >= provided.upload_at):
            provided.answered_at = now
            await self._send_by_bucket(provided, place)
        await self._send_checkpoint(provided, place)
        due = [answer_at - now if provided.asked else self._expires]
        if provided.upload_at:
            due.append(provided.upload_at - now)
        if provided.vouched < count:
            due.append(provided.checkpoint_at + CHECKPOINT_SECONDS - now)
        return max(min(due), 0.0)

    async def _send_live(self, provided: _Provided, place: Place) -> None:
        """`newSubfeedMessages` for what was appended. What does not fit goes by the bucket, at once."""
        start, end = provided.sent, place.head.num_messages
        watch = Watch(*provided.subfeed.name, start)
        characters = 0
        async for page in self._watches.read(Span(watch, start, end), signed=True):
            characters += sum(len(text) for text in page)
            sent = await self._publish_messages(provided, page) if characters <= LIVE_CHARACTERS else 0
            if sent < len(page):
                provided.asked, provided.lowest = True, min(provided.lowest, provided.sent)
                break
        provided.sent = end

    async def _publish_messages(self, provided: _Provided, page: Sequence[str]) -> int:
        """How many of a page fitted."""
        messages = [loads_2021(text.encode()) for text in page]
        sent = 0
        for part in split_feed_messages(provided.subfeed.body("newSubfeedMessages", messages=messages)):
            await provided.subfeed.publish(part)
            sent += len(part["messages"])
            provided.sent += len(part["messages"])
        return sent

    async def _send_by_bucket(self, provided: _Provided, place: Place) -> None:
        """Upload what the bucket lacks, then say how many there are; unless those who asked have everything."""
        count, due = place.head.num_messages, provided.upload_at
        lowest, provided.asked, provided.lowest = provided.lowest, False, count
        if count <= lowest and not (due and time.monotonic() >= due):
            return
        provided.upload_at = 0
        try:
            shown = await provided.subfeed.provide(count, place.checkpoint)
        except BaseException:
            provided.lowest, provided.upload_at = min(lowest, provided.lowest), due
            raise
        if shown > count:
            log.warning(
                "the channel has more of a feed than this node, which writes it",
                **provided.subfeed.log_fields,
                channel_has=shown,
                here=count,
            )
        await self._publish_count(provided, count)

    async def _publish_count(self, provided: _Provided, count: int) -> None:
        await provided.subfeed.publish(provided.subfeed.body("numSubfeedMessagesUploaded", numMessages=count))

    async def _send_checkpoint(self, provided: _Provided, place: Place) -> None:
        """The newest checkpoint, on the way that messages do not take."""
        now = time.monotonic()
        newest = place.checkpoint
        if newest is None or newest.count <= provided.vouched or now < provided.checkpoint_at + CHECKPOINT_SECONDS:
            return
        provided.vouched, provided.checkpoint_at = newest.count, now
        await provided.subfeed.publish({"type": "subfeedCheckpoint", **newest.to_json()})

    # -- feeds that were received --------------------------------------------------------------------------------

    async def _pass_on(self, provided: _Provided) -> None:
        """Put what came through this very channel into its bucket, unless somebody else does first."""
        await asyncio.sleep(self._relay * (1 + secrets.randbelow(1000) / 1000))
        place = await self._place(provided.subfeed)
        shown, _ = await provided.subfeed.state()
        if place.received > shown:
            await provided.subfeed.provide(place.received, place.checkpoint)
            await self._publish_count(provided, place.received)
        if place.checkpoint is not None:
            provided.vouched = 0
            await self._send_checkpoint(provided, place)
