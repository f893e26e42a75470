"""Following feeds of other nodes through channels (spec/pubsub-bands.md section 5, the subscriber).

A watch with a channel opens its subfeed there: what the bucket has is fetched, then the channel's nodes are asked, as
long as somebody waits. Everything goes through `ReceivedFeeds.take`; watches read the one store and are woken by it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import OrderedDict
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import structlog

from kachery_lab.core.feeds import ChainRefused, Checkpoint, ReceivedMessage, parse_signed_message
from kachery_lab.core.ids import ChannelName, FeedId, NodeId, SubfeedHash
from kachery_lab.core.roles import Role
from kachery_lab.errors import FeedFork, Forbidden, InvalidInput, KacheryLabError, NotFound, Unavailable
from kachery_lab.observability.logging import RateLimited
from kachery_lab.services.bands import BandHandlers, BandMessage, ChannelBands
from kachery_lab.services.channel_subfeeds import ChannelSubfeed
from kachery_lab.services.feed_channels import FeedChannelFinder
from kachery_lab.services.feeds import FeedService
from kachery_lab.services.followed_subfeeds import FollowedSubfeed
from kachery_lab.services.principals import Principal
from kachery_lab.services.received_feeds import ReceivedFeeds
from kachery_lab.services.watches import Span, Watch, WatchService

LOCAL = "*local*"
RENEW_SECONDS = 20.0
"""A subscription is repeated so often while somebody waits: what was lost with a connection is there within 30 s of its
return. Providers forget one after 90 s; the older ones after 60 s."""
RETRY_SECONDS = 2.0
"""How soon a subscription that could not be sent is tried again."""
GAP_SECONDS = 1.0
"""How soon after another a gap makes us ask again."""
OPEN_SECONDS = 480.0
"""A subfeed stays open after its last watch; messages of closed ones are not looked at."""
REFRESH_SECONDS = 10.0
"""An open subfeed's bucket is looked at again by a watch that comes so long after the last look."""
FIRST_FETCH_SECONDS = 10.0
"""A first watch waits so long for what the bucket has; the rest comes in while it answers."""
UNMET_SECONDS = 10.0
"""Messages that a checkpoint vouches for and that have not come after so long are reported."""
RIGHTS_SECONDS = 2.0
"""A watch waits so long for the hub's word on rights; then only what is here counts."""
MAX_OPEN = 10_000

log = structlog.get_logger(__name__)


class FeedRequests:
    """All subfeeds that this node follows. `renew` and `unmet` in seconds."""

    def __init__(
        self,
        finder: FeedChannelFinder,
        received: ReceivedFeeds,
        feeds: FeedService,
        watches: WatchService,
        handlers: BandHandlers,
        own_node: NodeId,
        *,
        renew: float = RENEW_SECONDS,
        unmet: float = UNMET_SECONDS,
    ) -> None:
        self._finder = finder
        self._received = received
        self._feeds = feeds
        self._watches = watches
        self._own_node = own_node
        self._renew = renew
        self._unmet = unmet
        self._followed: OrderedDict[ChannelSubfeed, FollowedSubfeed] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._notes = RateLimited()
        handlers.on("newSubfeedMessages", self._heard_messages)
        handlers.on("numSubfeedMessagesUploaded", self._heard_count)
        handlers.on("subfeedCheckpoint", self._heard_checkpoint)

    async def close(self) -> None:
        """End everything that runs in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- watching ------------------------------------------------------------------------------------------------

    async def watch(
        self,
        watches: Mapping[str, Watch],
        channels: Mapping[str, str],
        principal: Principal,
        *,
        wait_ms: float,
        max_messages: int = 0,
    ) -> tuple[dict[str, Span], bool, dict[str, str]]:
        """As `WatchService.watch`, through the channels by watch name; also what is wrong with feeds, by watch name.

        Raises Forbidden that names role and channel when this node, or the caller's token, may not request feeds there.
        A channel that is unknown, or whose hub cannot be reached, is like one that has nothing.
        """
        opened: dict[str, FollowedSubfeed] = {}
        for name, watch in watches.items():
            followed = await self._open(watch, channels.get(name, LOCAL), principal)
            if followed is not None:
                opened[name] = followed
        first = [followed for followed in opened.values() if self._refresh(followed) and not followed.tried.is_set()]
        if first:
            await asyncio.wait(
                [asyncio.create_task(followed.tried.wait()) for followed in first], timeout=FIRST_FETCH_SECONDS
            )
        found, waited = await self._watches.watch(
            watches, wait_ms=wait_ms, max_messages=max_messages, waiting=lambda: self._waiting(opened.values())
        )
        if waited:
            await self._require_still(opened.values(), principal)
        problems = {name: text for name, followed in opened.items() if (text := followed.told) is not None}
        return found, waited, problems

    async def _open(self, watch: Watch, channel: str, principal: Principal) -> FollowedSubfeed | None:
        """None: only what is here counts. A feed that is written here is whole here."""
        try:
            name = ChannelName.parse(channel)
        except InvalidInput:
            return None
        if await self._feeds.is_writeable(watch.feed_id):
            return None
        place = (name, watch.feed_id, watch.subfeed_hash)
        try:
            async with asyncio.timeout(RIGHTS_SECONDS):
                followed = await self._allowed(place, principal)
        except Forbidden:
            raise
        except NotFound:
            return None
        except (KacheryLabError, TimeoutError) as error:
            self._notes.note("feed_channel_unreachable", channel=name, reason=str(error) or "the hub does not answer")
            # What is followed already goes on when the hub is back.
            followed = next(
                (found for key, found in self._followed.items() if (key.channel, *key.name) == place),
                None,
            )
        if followed is not None:
            followed.used = time.monotonic()
        return followed

    async def _allowed(
        self, place: tuple[ChannelName, FeedId, SubfeedHash], principal: Principal
    ) -> FollowedSubfeed | None:
        """The subfeed in a channel where this node may follow it. Raises Forbidden, NotFound, Unavailable."""
        channel = place[0]
        side = await self._finder.find(channel)
        await side.require(channel, Role.REQUEST_FEEDS, principal)
        key = ChannelSubfeed(side, *place)
        if key not in self._followed:
            origin = await side.origin(channel)
            self._forget_idle()
            if len(self._followed) >= MAX_OPEN:
                raise Unavailable(f"{MAX_OPEN} subfeeds are followed already")
            self._followed.setdefault(key, FollowedSubfeed(key, origin, time.monotonic()))
        self._followed.move_to_end(key)
        return self._followed[key]

    @staticmethod
    async def _require_still(subfeeds: Iterable[FollowedSubfeed], principal: Principal) -> None:
        """A role that was taken away while somebody waited ends the watch. Raises Forbidden."""
        for subfeed in (followed.subfeed for followed in subfeeds):
            if not subfeed.may(Role.REQUEST_FEEDS):
                try:
                    await subfeed.side.require(subfeed.channel, Role.REQUEST_FEEDS, principal)
                except Forbidden:
                    raise
                except KacheryLabError as error:
                    # A hub that is away for a moment takes nothing from what is here.
                    log.debug("rights are not known", channel=subfeed.channel, code=error.code)

    def _forget_idle(self) -> None:
        """Close a few of those that were unused the longest."""
        before = time.monotonic() - OPEN_SECONDS
        for key, followed in list(itertools.islice(self._followed.items(), 10)):
            if followed.idle and (followed.used < before or len(self._followed) >= MAX_OPEN):
                del self._followed[key]

    @contextmanager
    def _waiting(self, subfeeds: Iterable[FollowedSubfeed]) -> Iterator[None]:
        """While the block runs somebody waits for these."""
        chosen = list({id(followed): followed for followed in subfeeds}.values())
        for followed in chosen:
            followed.waiting += 1
            if followed.renewal is None:
                followed.renewal = self._spawn(self._keep_subscribed(followed))
        try:
            yield
        finally:
            for followed in chosen:
                followed.waiting -= 1
                followed.used = time.monotonic()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- asking --------------------------------------------------------------------------------------------------

    async def _keep_subscribed(self, followed: FollowedSubfeed) -> None:
        """Subscribe now if it is due, and again and again while somebody waits."""
        try:
            while followed.waiting:
                due = followed.subscribed + self._renew - time.monotonic()
                if due <= 0:
                    due = self._renew if await self._subscribe(followed) else RETRY_SECONDS
                await asyncio.sleep(due)
        finally:
            followed.renewal = None

    async def _subscribe(self, followed: FollowedSubfeed) -> bool:
        """Ask the channel's nodes for what comes after what is here; whether it could be sent."""
        position = await self._watches.num_messages(*followed.subfeed.name)
        try:
            await followed.subfeed.publish(followed.subfeed.body("subscribeToSubfeed", position=position))
        except KacheryLabError as error:
            self._notes.note("feed_subscription_failed", **followed.subfeed.failure(error))
            return False
        followed.subscribed = time.monotonic()
        self._check_vouched(followed, position)
        if time.monotonic() - followed.fetched > REFRESH_SECONDS:
            self._start_fetch(followed)
        return True

    # -- the bucket ----------------------------------------------------------------------------------------------

    def _refresh(self, followed: FollowedSubfeed) -> bool:
        """Look at the bucket when nobody did for a while; whether that is going on."""
        if followed.fetch is None and time.monotonic() - followed.fetched > REFRESH_SECONDS:
            self._start_fetch(followed)
        return followed.fetch is not None

    def _start_fetch(self, followed: FollowedSubfeed) -> None:
        if followed.fetch is None:
            followed.fetch = self._spawn(self._fetch(followed))
        else:
            followed.again = True

    async def _fetch(self, followed: FollowedSubfeed) -> None:
        """Bring what the bucket has. One at a time for each subfeed; asked again meanwhile, it looks once more."""
        try:
            while True:
                followed.again = False
                await self._fetch_once(followed)
                followed.tried.set()
                if not followed.again:
                    return
        finally:
            followed.tried.set()
            followed.fetch = None

    async def _fetch_once(self, followed: FollowedSubfeed) -> None:
        followed.fetched = time.monotonic()
        subfeed = followed.subfeed
        try:
            count, checkpoint = await subfeed.state()
            if checkpoint is not None:
                await self._take(followed, (), checkpoint)
            known = await self._received.place(*subfeed.name, followed.origin)
            have = known.head.num_messages
            if known.checkpoint is not None:
                followed.note_vouched(known.checkpoint.count, have)
            while have < count:
                page = await subfeed.messages(have, count)
                if not page:
                    self._report(followed, f"the bucket says that it has {count} messages and gives {have}")
                    break
                before, have = have, await self._take(followed, page, None)
                if have <= before:
                    break
            self._check_vouched(followed, have)
        except (ChainRefused, FeedFork, InvalidInput) as error:
            self._report(followed, error.message)
        except KacheryLabError as error:
            self._notes.note("feed_fetch_failed", **subfeed.failure(error))

    # -- what comes in -------------------------------------------------------------------------------------------

    async def _take(
        self, followed: FollowedSubfeed, messages: Sequence[ReceivedMessage], checkpoint: Checkpoint | None
    ) -> int:
        have = await self._received.take(*followed.subfeed.name, followed.origin, messages, checkpoint=checkpoint)
        if checkpoint is not None:
            followed.note_vouched(checkpoint.count, have)
        return have

    def _find(self, message: BandMessage, bands: ChannelBands) -> FollowedSubfeed | None:
        """The open subfeed that a message is about. None also for our own messages, and without the role."""
        followed = self._followed.get(ChannelSubfeed.of(self._finder.of(bands), message))
        if followed is None or message.sender == self._own_node:
            return None
        return followed if followed.subfeed.may(Role.REQUEST_FEEDS) else None

    async def _heard_messages(self, message: BandMessage, bands: ChannelBands) -> None:
        followed = self._find(message, bands)
        if followed is None:
            return
        messages = [parse_signed_message(one) for one in message.body["messages"]]
        await self._heard(followed, message.sender, messages, None)

    async def _heard_checkpoint(self, message: BandMessage, bands: ChannelBands) -> None:
        followed = self._find(message, bands)
        if followed is None:
            return
        fields = {name: value for name, value in message.body.items() if name != "type"}
        await self._heard(followed, message.sender, (), Checkpoint.parse(fields))

    async def _heard(
        self,
        followed: FollowedSubfeed,
        sender: NodeId,
        messages: Sequence[ReceivedMessage],
        checkpoint: Checkpoint | None,
    ) -> None:
        try:
            have = await self._take(followed, messages, checkpoint)
        except ChainRefused as error:
            if error.reason != "gap":
                self._report(followed, error.message, sender)
            elif time.monotonic() - followed.subscribed > GAP_SECONDS:
                # Lost on the way, or an upload is not done: whoever has them is asked.
                followed.subscribed = time.monotonic()
                await self._subscribe(followed)
        except (FeedFork, InvalidInput) as error:
            self._report(followed, error.message, sender)
        except KacheryLabError as error:
            self._notes.note("feed_message_lost", **followed.subfeed.failure(error))
        else:
            followed.settle(have)

    async def _heard_count(self, message: BandMessage, bands: ChannelBands) -> None:
        followed = self._find(message, bands)
        if followed is None:
            return
        have = await self._watches.num_messages(*followed.subfeed.name)
        if message.body["numMessages"] > have:
            self._start_fetch(followed)

    # -- what is wrong -------------------------------------------------------------------------------------------

    def _check_vouched(self, followed: FollowedSubfeed, have: int) -> None:
        """Messages that the feed's key vouches for have to come."""
        followed.settle(have)
        problem = followed.held_back(have, self._unmet)
        if problem is not None:
            self._report(followed, problem, held_back=True)

    def _report(
        self, followed: FollowedSubfeed, text: str, sender: NodeId | None = None, *, held_back: bool = False
    ) -> None:
        """For the log, and for whoever watches. Nothing of it was stored."""
        followed.report(text, held_back=held_back)
        self._notes.note("feed_refused", **followed.subfeed.log_fields, node=sender, reason=text)
