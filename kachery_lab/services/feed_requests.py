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
from dataclasses import dataclass, field
from typing import Any

import structlog

from kachery_lab.core.feeds import ChainRefused, Checkpoint, ReceivedMessage, parse_signed_message
from kachery_lab.core.ids import ChannelName, FeedId, NodeId, SubfeedHash
from kachery_lab.core.roles import Role
from kachery_lab.errors import FeedFork, Forbidden, InvalidInput, KacheryLabError, NotFound, Unavailable
from kachery_lab.observability.logging import RateLimited
from kachery_lab.services.bands import BandHandlers, BandMessage, ChannelBands
from kachery_lab.services.feed_channels import FeedChannelFinder, FeedChannels
from kachery_lab.services.feeds import FeedService
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
PROBLEM_SECONDS = 600.0
RIGHTS_SECONDS = 2.0
"""A watch waits so long for the hub's word on rights; then only what is here counts."""
MAX_OPEN = 10_000

_Key = tuple[int, str, str, str]

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Remote:
    """A subfeed that is open through a channel."""

    side: FeedChannels
    channel: str
    origin: str
    feed_id: FeedId
    subfeed_hash: SubfeedHash
    used: float
    waiting: int = 0
    subscribed: float = -1e9
    fetched: float = -1e9
    fetch: asyncio.Task[None] | None = None
    again: bool = False
    renewal: asyncio.Task[None] | None = None
    vouched: int = 0
    vouched_at: float = 0.0
    problem: str | None = None
    problem_at: float = 0.0
    tried: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def idle(self) -> bool:
        return not self.waiting and self.fetch is None and self.renewal is None


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
        self._remotes: OrderedDict[_Key, _Remote] = OrderedDict()
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
        remotes: dict[str, _Remote] = {}
        for name, watch in watches.items():
            remote = await self._open(watch, channels.get(name, LOCAL), principal)
            if remote is not None:
                remotes[name] = remote
        first = [remote for remote in remotes.values() if self._refresh(remote) and not remote.tried.is_set()]
        if first:
            await asyncio.wait(
                [asyncio.create_task(remote.tried.wait()) for remote in first], timeout=FIRST_FETCH_SECONDS
            )
        found, waited = await self._watches.watch(
            watches, wait_ms=wait_ms, max_messages=max_messages, waiting=lambda: self._waiting(remotes.values())
        )
        if waited:
            await self._require_still(remotes.values(), principal)
        problems = {name: text for name, remote in remotes.items() if (text := self._problem(remote)) is not None}
        return found, waited, problems

    async def _open(self, watch: Watch, channel: str, principal: Principal) -> _Remote | None:
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
                remote = await self._allowed(place, principal)
        except Forbidden:
            raise
        except NotFound:
            return None
        except (KacheryLabError, TimeoutError) as error:
            self._notes.note("feed_channel_unreachable", channel=name, reason=str(error) or "the hub does not answer")
            # What is followed already goes on when the hub is back.
            remote = next((found for key, found in self._remotes.items() if key[1:] == place), None)
        if remote is not None:
            remote.used = time.monotonic()
        return remote

    async def _allowed(self, place: tuple[ChannelName, FeedId, SubfeedHash], principal: Principal) -> _Remote | None:
        """The subfeed in a channel where this node may follow it. Raises Forbidden, NotFound, Unavailable."""
        channel, feed_id, subfeed_hash = place
        side = await self._finder.find(channel)
        await side.require(channel, Role.REQUEST_FEEDS, principal)
        key = (id(side), *place)
        if key not in self._remotes:
            origin = await side.origin(channel)
            self._forget_idle()
            if len(self._remotes) >= MAX_OPEN:
                raise Unavailable(f"{MAX_OPEN} subfeeds are followed already")
            self._remotes.setdefault(key, _Remote(side, channel, origin, feed_id, subfeed_hash, time.monotonic()))
        self._remotes.move_to_end(key)
        return self._remotes[key]

    @staticmethod
    async def _require_still(remotes: Iterable[_Remote], principal: Principal) -> None:
        """A role that was taken away while somebody waited ends the watch. Raises Forbidden."""
        for remote in remotes:
            if not remote.side.may(remote.channel, Role.REQUEST_FEEDS):
                try:
                    await remote.side.require(remote.channel, Role.REQUEST_FEEDS, principal)
                except Forbidden:
                    raise
                except KacheryLabError as error:
                    # A hub that is away for a moment takes nothing from what is here.
                    log.debug("rights are not known", channel=remote.channel, code=error.code)

    def _forget_idle(self) -> None:
        """Close a few of those that were unused the longest."""
        before = time.monotonic() - OPEN_SECONDS
        for key, remote in list(itertools.islice(self._remotes.items(), 10)):
            if remote.idle and (remote.used < before or len(self._remotes) >= MAX_OPEN):
                del self._remotes[key]

    def _problem(self, remote: _Remote) -> str | None:
        if remote.problem is not None and time.monotonic() - remote.problem_at < PROBLEM_SECONDS:
            return remote.problem
        return None

    @contextmanager
    def _waiting(self, remotes: Iterable[_Remote]) -> Iterator[None]:
        """While the block runs somebody waits for these."""
        chosen = list({id(remote): remote for remote in remotes}.values())
        for remote in chosen:
            remote.waiting += 1
            if remote.renewal is None:
                remote.renewal = self._spawn(self._keep_subscribed(remote))
        try:
            yield
        finally:
            for remote in chosen:
                remote.waiting -= 1
                remote.used = time.monotonic()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- asking --------------------------------------------------------------------------------------------------

    async def _keep_subscribed(self, remote: _Remote) -> None:
        """Subscribe now if it is due, and again and again while somebody waits."""
        try:
            while remote.waiting:
                due = remote.subscribed + self._renew - time.monotonic()
                if due <= 0:
                    due = self._renew if await self._subscribe(remote) else RETRY_SECONDS
                await asyncio.sleep(due)
        finally:
            remote.renewal = None

    async def _subscribe(self, remote: _Remote) -> bool:
        """Ask the channel's nodes for what comes after what is here; whether it could be sent."""
        position = await self._watches.num_messages(remote.feed_id, remote.subfeed_hash)
        body = {"type": "subscribeToSubfeed", "feedId": remote.feed_id, "subfeedHash": remote.subfeed_hash}
        try:
            await remote.side.bands.publish(remote.channel, {**body, "position": position})
        except KacheryLabError as error:
            self._notes.note(
                "feed_subscription_failed",
                channel=remote.channel,
                feed_id=remote.feed_id,
                code=error.code,
                reason=error.message,
            )
            return False
        remote.subscribed = time.monotonic()
        self._check_vouched(remote, position)
        if time.monotonic() - remote.fetched > REFRESH_SECONDS:
            self._start_fetch(remote)
        return True

    # -- the bucket ----------------------------------------------------------------------------------------------

    def _refresh(self, remote: _Remote) -> bool:
        """Look at the bucket when nobody did for a while; whether that is going on."""
        if remote.fetch is None and time.monotonic() - remote.fetched > REFRESH_SECONDS:
            self._start_fetch(remote)
        return remote.fetch is not None

    def _start_fetch(self, remote: _Remote) -> None:
        if remote.fetch is None:
            remote.fetch = self._spawn(self._fetch(remote))
        else:
            remote.again = True

    async def _fetch(self, remote: _Remote) -> None:
        """Bring what the bucket has. One at a time for each subfeed; asked again meanwhile, it looks once more."""
        try:
            while True:
                remote.again = False
                await self._fetch_once(remote)
                remote.tried.set()
                if not remote.again:
                    return
        finally:
            remote.tried.set()
            remote.fetch = None

    async def _fetch_once(self, remote: _Remote) -> None:
        remote.fetched = time.monotonic()
        place = (remote.feed_id, remote.subfeed_hash)
        try:
            count, checkpoint = await remote.side.state(remote.channel, *place)
            if checkpoint is not None:
                await self._take(remote, (), checkpoint)
            known = await self._received.place(*place, remote.origin)
            have = known.head.num_messages
            if known.checkpoint is not None:
                self._note_vouched(remote, known.checkpoint.count, have)
            while have < count:
                page = await remote.side.messages(remote.channel, *place, have, count)
                if not page:
                    self._report(remote, f"the bucket says that it has {count} messages and gives {have}")
                    break
                before, have = have, await self._take(remote, page, None)
                if have <= before:
                    break
            self._check_vouched(remote, have)
        except (ChainRefused, FeedFork, InvalidInput) as error:
            self._report(remote, error.message)
        except KacheryLabError as error:
            self._notes.note(
                "feed_fetch_failed",
                channel=remote.channel,
                feed_id=remote.feed_id,
                code=error.code,
                reason=error.message,
            )

    # -- what comes in -------------------------------------------------------------------------------------------

    async def _take(self, remote: _Remote, messages: Sequence[ReceivedMessage], checkpoint: Checkpoint | None) -> int:
        have = await self._received.take(
            remote.feed_id, remote.subfeed_hash, remote.origin, messages, checkpoint=checkpoint
        )
        if checkpoint is not None:
            self._note_vouched(remote, checkpoint.count, have)
        return have

    @staticmethod
    def _note_vouched(remote: _Remote, count: int, have: int) -> None:
        if count > max(have, remote.vouched):
            remote.vouched, remote.vouched_at = count, time.monotonic()

    def _find(self, message: BandMessage, bands: ChannelBands) -> _Remote | None:
        """The open subfeed that a message is about. None also for our own messages, and without the role."""
        side = self._finder.of(bands)
        body = message.body
        remote = self._remotes.get((id(side), message.channel, body["feedId"], body["subfeedHash"]))
        if remote is None or message.sender == self._own_node:
            return None
        return remote if side.may(message.channel, Role.REQUEST_FEEDS) else None

    async def _heard_messages(self, message: BandMessage, bands: ChannelBands) -> None:
        remote = self._find(message, bands)
        if remote is None:
            return
        messages = [parse_signed_message(one) for one in message.body["messages"]]
        await self._heard(remote, message.sender, messages, None)

    async def _heard_checkpoint(self, message: BandMessage, bands: ChannelBands) -> None:
        remote = self._find(message, bands)
        if remote is None:
            return
        fields = {name: value for name, value in message.body.items() if name != "type"}
        await self._heard(remote, message.sender, (), Checkpoint.parse(fields))

    async def _heard(
        self,
        remote: _Remote,
        sender: NodeId,
        messages: Sequence[ReceivedMessage],
        checkpoint: Checkpoint | None,
    ) -> None:
        try:
            have = await self._take(remote, messages, checkpoint)
        except ChainRefused as error:
            if error.reason != "gap":
                self._report(remote, error.message, sender)
            elif time.monotonic() - remote.subscribed > GAP_SECONDS:
                # Lost on the way, or an upload is not done: whoever has them is asked.
                remote.subscribed = time.monotonic()
                await self._subscribe(remote)
        except (FeedFork, InvalidInput) as error:
            self._report(remote, error.message, sender)
        except KacheryLabError as error:
            self._notes.note("feed_message_lost", channel=remote.channel, code=error.code, reason=error.message)
        else:
            if messages and have >= remote.vouched and remote.problem is not None and remote.vouched:
                self._settled(remote)

    async def _heard_count(self, message: BandMessage, bands: ChannelBands) -> None:
        remote = self._find(message, bands)
        if remote is None:
            return
        have = await self._watches.num_messages(remote.feed_id, remote.subfeed_hash)
        if message.body["numMessages"] > have:
            self._start_fetch(remote)

    # -- what is wrong -------------------------------------------------------------------------------------------

    def _check_vouched(self, remote: _Remote, have: int) -> None:
        """Messages that the feed's key vouches for have to come."""
        if remote.vouched <= have:
            if remote.vouched:
                self._settled(remote)
        elif time.monotonic() - remote.vouched_at > self._unmet:
            self._report(
                remote,
                f"the feed's key vouches for {remote.vouched} messages, the channel gives {have}: "
                "the rest is held back, or late",
            )

    def _settled(self, remote: _Remote) -> None:
        remote.vouched = 0
        if remote.problem is not None and remote.problem.endswith("late"):
            remote.problem = None

    def _report(self, remote: _Remote, text: str, sender: NodeId | None = None) -> None:
        """For the log, and for whoever watches. Nothing of it was stored."""
        remote.problem, remote.problem_at = text, time.monotonic()
        self._notes.note(
            "feed_refused",
            channel=remote.channel,
            feed_id=remote.feed_id,
            subfeed_hash=remote.subfeed_hash,
            node=sender,
            reason=text,
        )
