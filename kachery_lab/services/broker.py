"""The broker of this server's channels: connections of member nodes, what they subscribe to, and the way of a message.

    room (v1 socket, ably2021 socket, this server's own node)
      -> HubBands.open -> MemberConnection       who it is, a bounded queue of what goes out to it
      -> HubBands.subscribe / publish            rights, sender, signature, type: looked at on each use
      -> Broker                                  who gets it; one process needs no more than LocalBroker

Messages are for those who listen at that moment; nothing is kept for later, nothing is passed on to another hub.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from kachery_lab.core.band_messages import SignedBody, band_of
from kachery_lab.core.bands import BANDS, Right, role_for
from kachery_lab.core.ids import NodeId
from kachery_lab.core.rates import Allowance
from kachery_lab.core.roles import Role, role_names
from kachery_lab.errors import Forbidden, InvalidInput, NotFound, TooManyRequests
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.member_connections import Delivery, End, MemberConnection, Topic, new_allowances

MAX_QUEUED_TOTAL = 128 << 20
"""Bytes that may wait for all connections together; then the one with the most is cut off."""
MAX_CONNECTIONS_PER_NODE = 100
REFRESH_SECONDS = 0.25
"""Rights of open connections follow a change of the access data within this time."""
_SEEN_NODES = 10_000


class Broker(Protocol):
    """Who gets what. Knows nothing of rights. Several server processes would share one of another kind."""

    def subscribe(self, connection: MemberConnection, topic: Topic) -> None:
        """Have messages of a topic put into the connection's queue. Twice is once."""

    def unsubscribe(self, connection: MemberConnection, topic: Topic) -> None:
        """No more of them; no error when there were none."""

    async def publish(self, delivery: Delivery) -> int:
        """Hand it to everybody who subscribes now, the publisher included; how many. Waits for no reader."""


class LocalBroker:
    """The broker of one process."""

    def __init__(self) -> None:
        self._subscribers: dict[Topic, dict[MemberConnection, None]] = {}

    def subscribe(self, connection: MemberConnection, topic: Topic) -> None:
        """As `Broker`."""
        self._subscribers.setdefault(topic, {})[connection] = None

    def unsubscribe(self, connection: MemberConnection, topic: Topic) -> None:
        """As `Broker`."""
        found = self._subscribers.get(topic)
        if found is not None:
            found.pop(connection, None)
            if not found:
                del self._subscribers[topic]

    async def publish(self, delivery: Delivery) -> int:
        """As `Broker`."""
        found = tuple(self._subscribers.get((delivery.channel, delivery.band), ()))
        for connection in found:
            connection.put(delivery, delivery.size)
        return len(found)


class HubBands:
    """The bands of this server's own channels, for connections of any kind."""

    def __init__(self, data: AccessData, audit: AuditService, broker: Broker | None = None) -> None:
        self._data = data
        self._audit = audit
        self._broker: Broker = broker or LocalBroker()
        self._connections: dict[NodeId, list[MemberConnection]] = {}
        self._seen: OrderedDict[NodeId, float] = OrderedDict()
        self._allowances: OrderedDict[NodeId, tuple[Allowance, Allowance]] = OrderedDict()
        self._queued = 0
        self._refresh_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        data.listeners.append(self._changed)

    # -- connections ---------------------------------------------------------------------------------------------

    def open(
        self,
        node_id: NodeId,
        peer: str | None = None,
        *,
        on_change: Callable[[], None] | None = None,
        alone: bool = False,
    ) -> MemberConnection:
        """A connection of a node whose identity the room has proved. `on_change` is called when its rights may have
        changed; `alone` ends the node's other connections that were opened so.

        Raises Forbidden for a node that is not approved here, TooManyRequests.
        """
        self._require_approved(node_id)
        mine = self._connections.setdefault(node_id, [])
        if len(mine) >= MAX_CONNECTIONS_PER_NODE:
            raise TooManyRequests(f"the node {node_id} has {len(mine)} connections open", retry_after=30)
        connection = MemberConnection(node_id, peer, on_change)
        connection.on_queued = self._count
        connection.on_end = lambda: self._forget(connection)
        connection.alone = alone
        connection.allowances = self._allowances_of(node_id)
        if alone:
            for other in [one for one in mine if one.alone]:
                self.close(other, End("replaced", "this node opened a newer connection"))
        self._connections.setdefault(node_id, []).append(connection)
        return connection

    def _allowances_of(self, node_id: NodeId) -> tuple[Allowance, Allowance]:
        """Of the node, so that a new connection is no new allowance."""
        found = self._allowances.pop(node_id, None) or new_allowances()
        self._allowances[node_id] = found
        if len(self._allowances) > _SEEN_NODES:
            self._allowances.popitem(last=False)
        return found

    def close(self, connection: MemberConnection, end: End | None = None) -> None:
        """End and forget a connection, for a reason that its room is told. Again is no error."""
        connection.finish(end or End("closed", "the connection was closed"))

    def _forget(self, connection: MemberConnection) -> None:
        for topic in connection.active:
            self._broker.unsubscribe(connection, topic)
        connection.active.clear()
        connection.wanted.clear()
        mine = self._connections.get(connection.node_id, [])
        if connection in mine:
            mine.remove(connection)
            self._seen[connection.node_id] = time.monotonic()
            self._seen.move_to_end(connection.node_id)
            if len(self._seen) > _SEEN_NODES:
                self._seen.popitem(last=False)
        if not mine:
            self._connections.pop(connection.node_id, None)

    def close_all(self) -> None:
        """End every connection: the server stops."""
        for connection in self.connections:
            self.close(connection, End("stopping", "the server stops"))
        if self._timer is not None:
            self._timer.cancel()

    @property
    def connections(self) -> list[MemberConnection]:
        """All open ones."""
        return [one for mine in self._connections.values() for one in mine]

    def present(self, node_id: NodeId) -> bool:
        """Whether a node has a connection now."""
        return node_id in self._connections

    def connected_at(self, node_id: NodeId) -> int | None:
        """When the oldest of a node's connections was opened, in ms since 1970; None while it has none."""
        return min((one.opened_at for one in self._connections.get(node_id, ())), default=None)

    def absent_for(self, node_id: NodeId) -> float | None:
        """Seconds since a node's last connection ended: 0 while it has one, None when it had none lately."""
        if node_id in self._connections:
            return 0.0
        at = self._seen.get(node_id)
        return None if at is None else time.monotonic() - at

    # -- rights --------------------------------------------------------------------------------------------------

    def _require_approved(self, node_id: NodeId) -> None:
        known = self._data.nodes.get(node_id)
        if known is None or known.approved_at is None:
            raise Forbidden(
                f"the node {node_id} is not approved at this hub", hint="An admin runs: kachery-lab node approve"
            )

    def roles(self, node_id: NodeId) -> dict[str, Role]:
        """The node's effective roles now in each of its channels; nothing for one that is not approved."""
        mine = [channel for channel, member in self._data.memberships if member == node_id]
        return {channel: self._data.node_roles(channel, node_id) for channel in mine}

    def _allows(self, node_id: NodeId, channel: str, band: str, right: Right) -> bool:
        return bool(self._data.node_roles(channel, node_id) & role_for(band, right))

    async def _require(self, connection: MemberConnection, channel: str, band: str, right: Right) -> None:
        """Raises NotFound for a channel that the node is no member of, Forbidden that names role and channel."""
        if band not in BANDS:
            raise InvalidInput(f"band: expected one of {', '.join(BANDS)}")
        node_id = connection.node_id
        if self._allows(node_id, channel, band, right):
            return
        if (channel, node_id) not in self._data.memberships:
            raise NotFound(f"there is no channel {channel!r} of this node")
        role = role_names(role_for(band, right))[0]
        async with self._audit.refusals(f"node:{node_id}", connection.peer, f"band.{right}", f"{channel}-{band}"):
            raise Forbidden(
                f"node {node_id} lacks {role} in the channel {channel}",
                hint="The channel's owner grants roles; a node must also be a member and ask for them",
            )

    def _changed(self) -> None:
        """The access data changed. Several changes within REFRESH_SECONDS are looked at together."""
        if self._timer is None and self._connections:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._refresh_at), self._refresh)

    def _refresh(self) -> None:
        self._timer = None
        self._refresh_at = asyncio.get_running_loop().time() + REFRESH_SECONDS
        for connection in self.connections:
            try:
                self._require_approved(connection.node_id)
            except Forbidden as error:
                self.close(connection, End("not_approved", error.message))
                continue
            self._refresh_topics(connection)
            if connection.on_change is not None:
                connection.on_change()

    def _refresh_topics(self, connection: MemberConnection) -> None:
        allowed = {topic for topic in connection.wanted if self._allows(connection.node_id, *topic, "subscribe")}
        lost = connection.active - allowed
        for topic in lost:
            self._broker.unsubscribe(connection, topic)
        for topic in allowed - connection.active:
            self._broker.subscribe(connection, topic)
        connection.active = allowed
        if lost:
            connection.drop(lost)

    # -- flow ----------------------------------------------------------------------------------------------------

    async def subscribe(self, connection: MemberConnection, channel: str, band: str) -> None:
        """From now on the connection gets what is published there, while its node's roles allow it: it stops when they
        are taken away and goes on when they come back. Raises InvalidInput, NotFound, Forbidden."""
        await self._require(connection, channel, band, "subscribe")
        topic = (channel, band)
        if connection.end is None:
            connection.wanted.add(topic)
            connection.active.add(topic)
            self._broker.subscribe(connection, topic)

    def unsubscribe(self, connection: MemberConnection, channel: str, band: str) -> None:
        """No more of it; no error when there was no subscription."""
        topic = (channel, band)
        connection.wanted.discard(topic)
        connection.active.discard(topic)
        self._broker.unsubscribe(connection, topic)

    async def publish(
        self, connection: MemberConnection, channel: str, band: str, messages: Sequence[SignedBody]
    ) -> None:
        """Hand messages to all who subscribe now, all or none of them. Each must be of its sender's own node, signed by
        it, and of a type of this band. Raises InvalidInput, NotFound, Forbidden."""
        await self._require(connection, channel, band, "publish")
        for message in messages:
            if message.from_node_id != connection.node_id:
                raise Forbidden(f"fromNodeId: this connection speaks for {connection.node_id} only")
            if band_of(message.kind) != band:
                raise InvalidInput(f"type: {message.kind} belongs on the band {band_of(message.kind)}, not on {band}")
            if not message.verify():
                raise InvalidInput("signature: it is not of this body, or not by fromNodeId")
        for message in messages:
            await self._broker.publish(Delivery(channel, band, message, len(message.canonical) + 256))

    def _count(self, change: int) -> None:
        self._queued += change
        if self._queued > MAX_QUEUED_TOTAL:
            most = max(self.connections, key=lambda one: one.queued_bytes, default=None)
            if most is not None:
                self.close(most, End("slow_reader", f"{len(most)} messages were waiting to be read"))
