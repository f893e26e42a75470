"""Channels as feeds use them: what a bucket shows of a subfeed, and adding to it.

`OwnFeedChannels` are those of this server's own hub, whose buckets are views of the one store; `JoinedFeedChannels`
those of another server's hub. `FeedChannelFinder` says whose a bare name means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from kachery_lab.client.feeds import FeedObjects
from kachery_lab.core.feeds import Checkpoint, ReceivedMessage
from kachery_lab.core.ids import FeedId, NodeId, SubfeedHash
from kachery_lab.core.roles import Role, parse_roles, role_names
from kachery_lab.errors import Forbidden, NotFound
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.bands import ChannelBands
from kachery_lab.services.bucket_feeds import BucketFeeds
from kachery_lab.services.federation import JoinedHub
from kachery_lab.services.identity import Identity
from kachery_lab.services.offers import ChannelFinder
from kachery_lab.services.principals import Principal
from kachery_lab.services.stats import Stats
from kachery_lab.services.subjects import RoleService, subject_of
from kachery_lab.services.watches import Span, Watch, WatchService

DOCUMENTS_AT_ONCE = 2
"""Answers of a hub with messages that are held at the same time; each may be large."""
PAGE_MESSAGES = 1000
"""Messages that are asked of a hub at once."""


class FeedChannels(Protocol):
    """The channels of one hub."""

    bands: ChannelBands

    async def origin(self, channel: str) -> str:
        """The channel's identity: hub node id and name."""

    async def require(self, channel: str, role: Role, principal: Principal) -> None:
        """Raises Forbidden naming role and channel, which the audit has then; NotFound when this node is no member."""

    def may(self, channel: str, role: Role) -> bool:
        """Whether this node has a role now, as far as it knows."""

    async def state(self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash) -> tuple[int, Checkpoint | None]:
        """How many messages the bucket shows, and the newest checkpoint that the hub knows. Not verified."""

    async def messages(
        self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash, start: int, end: int
    ) -> Sequence[ReceivedMessage]:
        """Messages from `start` on out of the bucket, perhaps fewer; not verified."""

    async def provide(
        self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash, count: int, checkpoint: Checkpoint | None
    ) -> int:
        """Have the bucket show the first `count` messages, which are here; how many it shows then. Raises Forbidden,
        FeedFork, TooLarge, StorageFull, Unavailable."""


class OwnFeedChannels:
    """Adding to a bucket is a row in the index; there is nothing to fetch, whatever arrived is in the store."""

    def __init__(
        self,
        data: AccessData,
        roles: RoleService,
        audit: AuditService,
        feeds: BucketFeeds,
        own_node: NodeId,
        bands: ChannelBands,
    ) -> None:
        self.bands = bands
        self._data = data
        self._roles = roles
        self._audit = audit
        self._feeds = feeds
        self._own_node = own_node

    async def origin(self, channel: str) -> str:
        """As `FeedChannels.origin`."""
        return self._feeds.origin(channel)

    async def require(self, channel: str, role: Role, principal: Principal) -> None:
        """As `FeedChannels.require`."""
        if channel not in self._data.channels or (channel, self._own_node) not in self._data.memberships:
            raise NotFound(f"this node is no member of a channel {channel!r}")
        async with self._audit.refusals(
            f"{principal.kind}:{principal.name}", principal.peer, f"channel.{role_names(role)[0]}", channel
        ):
            if not principal.covers(channel):
                raise Forbidden(f"the token does not reach the channel {channel}")
            self._roles.require(subject_of(principal, self._own_node), channel, role)

    def may(self, channel: str, role: Role) -> bool:
        """As `FeedChannels.may`."""
        return bool(self._data.node_roles(channel, self._own_node) & role)

    async def state(self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash) -> tuple[int, Checkpoint | None]:
        """As `FeedChannels.state`."""
        place = await self._feeds.place(channel, feed_id, subfeed_hash)
        return place.shown, None

    async def messages(
        self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash, start: int, end: int
    ) -> Sequence[ReceivedMessage]:
        """As `FeedChannels.messages`."""
        return ()

    async def provide(
        self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash, count: int, checkpoint: Checkpoint | None
    ) -> int:
        """As `FeedChannels.provide`."""
        if not self.may(channel, Role.PROVIDE_FEEDS):
            raise Forbidden(f"node {self._own_node} lacks provideFeeds in the channel {channel}")
        await self._feeds.show(channel, feed_id, subfeed_hash, count)
        return count


class JoinedFeedChannels:
    """Buckets of another server's hub, which checks rights at each use."""

    def __init__(
        self,
        joined: JoinedHub,
        objects: FeedObjects,
        watches: WatchService,
        identity: Identity,
        stats: Stats,
        audit: AuditService,
    ) -> None:
        self.bands = joined.bands
        self._joined = joined
        self._objects = objects
        self._watches = watches
        self._identity = identity
        self._stats = stats
        self._audit = audit
        self._gate = asyncio.Semaphore(DOCUMENTS_AT_ONCE)

    async def origin(self, channel: str) -> str:
        """As `FeedChannels.origin`."""
        return await self._joined.origin(channel)

    async def require(self, channel: str, role: Role, principal: Principal) -> None:
        """As `FeedChannels.require`. The hub tells of changes over the bands; without a connection it is asked."""
        async with self._audit.refusals(
            f"{principal.kind}:{principal.name}", principal.peer, f"channel.{role_names(role)[0]}", channel
        ):
            if not principal.covers(channel):
                raise Forbidden(f"the token does not reach the channel {channel}")
            roles = self.bands.channels().get(channel)
            if roles is None:
                membership = await self._joined.membership(channel)
                if membership is None:
                    raise NotFound(f"this node is no member of a channel {channel!r} at the hub")
                roles = parse_roles(membership.roles)
            if not roles & role:
                raise self._lacks(role, channel)

    def _lacks(self, role: Role, channel: str) -> Forbidden:
        return Forbidden(
            f"node {self._identity.node_id} lacks {role_names(role)[0]} in the channel {channel}",
            hint="The channel's owner grants roles at the hub",
        )

    def may(self, channel: str, role: Role) -> bool:
        """As `FeedChannels.may`."""
        return bool(self.bands.channels().get(channel, Role.NONE) & role)

    async def state(self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash) -> tuple[int, Checkpoint | None]:
        """As `FeedChannels.state`. Raises what reading from a bucket raises, and InvalidInput."""
        return await self._objects.state(await self._bucket(channel), feed_id, subfeed_hash)

    async def messages(
        self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash, start: int, end: int
    ) -> Sequence[ReceivedMessage]:
        """As `FeedChannels.messages`. Raises what reading from a bucket raises, and InvalidInput."""
        bucket = await self._bucket(channel)
        async with self._gate:
            found = await self._objects.messages(bucket, feed_id, subfeed_hash, start, min(end, start + PAGE_MESSAGES))
        self._stats.bytes_received += sum(len(message.canonical_body) for message in found)
        return found

    async def provide(
        self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash, count: int, checkpoint: Checkpoint | None
    ) -> int:
        """As `FeedChannels.provide`: what the bucket lacks travels, many messages at once."""
        start, _ = await self.state(channel, feed_id, subfeed_hash)
        if start >= count:
            return start
        span = Span(Watch(feed_id, subfeed_hash, start), start, count)
        async for page in self._watches.read(span, signed=True):
            last = start + len(page) >= count
            self._stats.bytes_sent += await self._objects.upload(
                channel, feed_id, subfeed_hash, start, page, checkpoint if last else None
            )
            start += len(page)
        return start

    async def _bucket(self, channel: str) -> str:
        membership = await self._joined.membership(channel)
        if membership is None:
            raise NotFound(f"this node is no member of a channel {channel!r} at the hub")
        return membership.bucket_url


class FeedChannelFinder:
    """Whose channel a bare name means, as `ChannelFinder` says. `sides`: the preferred hub first."""

    def __init__(self, finder: ChannelFinder, *sides: FeedChannels) -> None:
        self._finder = finder
        self._first = sides[0]
        self._sides = {id(side.bands): side for side in sides}

    async def find(self, channel: str) -> FeedChannels:
        """The side to ask for a channel."""
        # What the hub told over the bands saves a question.
        if channel in self._first.bands.channels():
            return self._first
        return self.of((await self._finder.find(channel)).bands)

    def of(self, bands: ChannelBands) -> FeedChannels:
        """The side that messages of these bands belong to."""
        return self._sides[id(bands)]
