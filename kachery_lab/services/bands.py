"""Bands as the services of a node use them: messages go out on a channel, and come in to whoever handles their type.

The channels belong to this server's own hub, or to another's; each has its `ChannelBands`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from kachery_lab.core.band_messages import band_of, parse_message, sign_message
from kachery_lab.core.bands import rights
from kachery_lab.core.ids import ChannelName, NodeId
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role, parse_roles
from kachery_lab.core.strict_json import shorten
from kachery_lab.errors import InvalidInput, KacheryLabError, Unavailable
from kachery_lab.observability.logging import RateLimited
from kachery_lab.services.broker import HubBands
from kachery_lab.services.member_connections import ConnectionEnded, MemberConnection

if TYPE_CHECKING:
    from kachery_lab.client.hub import HubClient

MAX_AT_ONCE = 64
"""Messages of one type that are handled at the same time."""
MAX_WAITING = 2000
"""Messages of one type that wait for that; further ones are dropped, as when nobody had listened."""
MAX_WAITING_PER_SENDER = 1000
MAX_WAITING_BYTES = 16 << 20
RETRY_SECONDS = 2.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BandMessage:
    """A message that came in: its signature is right, its shape is that of its type and band, and the hub says that
    `sender` published it and may. `body` has the fields of spec/pubsub-bands.md section 3; handlers share it and do not
    change it."""

    channel: str
    band: str
    sender: NodeId
    body: dict[str, Any]


class ChannelBands(Protocol):
    """This node's part in the bands of one hub's channels."""

    async def publish(self, channel: str, body: dict[str, Any]) -> None:
        """Sign a message and send it on the band that its type belongs to. Those who listen now get it, nobody later;
        this node too, if its roles let it listen there.

        Raises Forbidden (naming role and channel), NotFound (no such channel), TooLarge, Unavailable (no connection),
        InvalidInput for a body that is not of its type's shape.
        """

    def channels(self) -> Mapping[str, Role]:
        """This node's channels at the hub with its effective roles, as last known; empty without a connection."""


Handler = Callable[[BandMessage, ChannelBands], Awaitable[None]]
"""Called once for each message of a type, in a task of its own; answers go out on the bands that it came from."""


class BandHandlers:
    """Which services handle which message types. Filled while the node is built."""

    def __init__(self) -> None:
        self._handlers: dict[str, list[Handler]] = {}

    def on(self, kind: str, handler: Handler) -> None:
        """Have `handler` called for messages whose `type` is `kind`."""
        self._handlers.setdefault(kind, []).append(handler)

    def of(self, kind: str) -> tuple[Handler, ...]:
        """Who handles a type, in the order of `on`."""
        return tuple(self._handlers.get(kind, ()))

    def bands(self) -> frozenset[str]:
        """The bands on which messages come that somebody handles."""
        return frozenset(band_of(kind) for kind in self._handlers)


@dataclass(slots=True)
class _Line:
    """Messages of one type: how many are being handled, and those that wait."""

    running: int = 0
    waiting: deque[tuple[BandMessage, ChannelBands, int]] = field(default_factory=deque)
    bytes: int = 0
    senders: Counter[NodeId] = field(default_factory=Counter)


class Dispatcher:
    """Calls the handlers: each message in a task of its own, in the order of arrival, a bounded number at a time. A
    type whose handlers are slow, or a sender that floods it, holds up no other type."""

    def __init__(self, handlers: BandHandlers) -> None:
        self._handlers = handlers
        self._lines: dict[str, _Line] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._dropped = RateLimited(3)

    def put(self, message: BandMessage, bands: ChannelBands, size: int) -> None:
        """Have a message handled. It is dropped when too many of its type wait already; the log says so."""
        kind = str(message.body["type"])
        if not self._handlers.of(kind):
            return
        line = self._lines.setdefault(kind, _Line())
        if line.running < MAX_AT_ONCE:
            self._begin(line, message, bands)
        elif (
            len(line.waiting) >= MAX_WAITING
            or line.bytes + size > MAX_WAITING_BYTES
            or line.senders[message.sender] >= MAX_WAITING_PER_SENDER
        ):
            self._dropped.note("band_message_dropped", kind=kind, channel=message.channel, sender=message.sender)
        else:
            line.waiting.append((message, bands, size))
            line.bytes += size
            line.senders[message.sender] += 1

    def _begin(self, line: _Line, message: BandMessage, bands: ChannelBands) -> None:
        line.running += 1
        task = asyncio.create_task(self._handle(line, message, bands))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, line: _Line, message: BandMessage, bands: ChannelBands) -> None:
        kind = str(message.body["type"])
        try:
            for handler in self._handlers.of(kind):
                try:
                    await handler(message, bands)
                except KacheryLabError as error:
                    log.info("a band message was not handled", kind=kind, channel=message.channel, reason=error.message)
                except Exception:
                    log.exception("handler_failed", kind=kind, channel=message.channel)
        finally:
            line.running -= 1
            if line.waiting:
                following, its_bands, size = line.waiting.popleft()
                line.bytes -= size
                line.senders[following.sender] -= 1
                if not line.senders[following.sender]:
                    del line.senders[following.sender]
                self._begin(line, following, its_bands)

    async def close(self) -> None:
        """Cancel what is being handled."""
        for line in self._lines.values():
            line.waiting.clear()
            line.bytes = 0
            line.senders.clear()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class OwnBands:
    """`ChannelBands` of this server's own hub: no socket, the same checks."""

    def __init__(self, hub: HubBands, key: PrivateKey, dispatcher: Dispatcher, handlers: BandHandlers) -> None:
        self._hub = hub
        self._key = key
        self._node_id = NodeId(key.public_hex)
        self._dispatcher = dispatcher
        self._handlers = handlers
        self._connection: MemberConnection | None = None
        self._changed = asyncio.Event()

    async def publish(self, channel: str, body: dict[str, Any]) -> None:
        """As `ChannelBands.publish`."""
        message = sign_message(self._key, body)
        connection = self._connection
        if connection is None or connection.end is not None:
            raise Unavailable("this node is not connected to the bands of its own hub at the moment")
        await self._hub.publish(connection, channel, band_of(message.kind), [message])

    def channels(self) -> Mapping[str, Role]:
        """As `ChannelBands.channels`."""
        return self._hub.roles(self._node_id)

    async def run(self) -> None:
        """Listen, for ever. A connection that the hub ended (too many messages waited) is opened anew."""
        while True:
            self._connection = connection = self._hub.open(self._node_id, on_change=self._changed.set)
            following = asyncio.create_task(self._follow(connection))
            try:
                while True:
                    for delivery in await connection.take():
                        message = delivery.message
                        found = BandMessage(delivery.channel, delivery.band, message.from_node_id, message.body)
                        self._dispatcher.put(found, self, delivery.size)
                    # Nothing above waits for a socket: others get their turn.
                    await asyncio.sleep(0)
            except ConnectionEnded as ended:
                log.warning("the bands of this server's own node were closed", reason=ended.end.reason)
                if ended.end.code == "stopping":
                    return
            finally:
                following.cancel()
                self._hub.close(connection)
            await asyncio.sleep(1)

    async def _follow(self, connection: MemberConnection) -> None:
        """Subscribe to what somebody handles and the roles allow, at once and after each change."""
        while True:
            self._changed.clear()
            for channel, band in wanted(self.channels(), self._handlers):
                if (channel, band) not in connection.wanted:
                    try:
                        await self._hub.subscribe(connection, channel, band)
                    except KacheryLabError as error:
                        # The roles changed between the look and the subscription; the next change comes.
                        log.info("no subscription", channel=channel, band=band, reason=error.message)
            await self._changed.wait()


class JoinedBands:
    """`ChannelBands` of another server's hub, over one WebSocket."""

    def __init__(self, hub: HubClient, key: PrivateKey, dispatcher: Dispatcher, handlers: BandHandlers) -> None:
        self._key = key
        self._dispatcher = dispatcher
        self._handlers = handlers
        self._roles: dict[str, Role] = {}
        self._subscribed: set[tuple[str, str]] = set()
        self._changed = asyncio.Event()
        self._odd = RateLimited(3)
        # Only here: importing it takes long, and most nodes have no other hub.
        from kachery_lab.client.bands import BandsClient

        self._client = BandsClient(hub, receive=self._receive, opened=self._changed.set, lost=self._forget)

    async def publish(self, channel: str, body: dict[str, Any]) -> None:
        """As `ChannelBands.publish`; the hub's word on rights is waited for."""
        message = sign_message(self._key, body)
        await self._client.request("publish", {"channel": channel, "band": band_of(message.kind)}, [message])

    def channels(self) -> Mapping[str, Role]:
        """As `ChannelBands.channels`."""
        return self._roles

    async def run(self) -> None:
        """Keep the connection and its subscriptions, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._client.run())
            tasks.create_task(self._follow())

    def _forget(self) -> None:
        self._roles = {}
        self._subscribed.clear()

    def _receive(self, item: dict[str, Any]) -> None:
        kind = item.get("type")
        try:
            if kind == "roles":
                self._take_roles(item)
            elif kind == "message":
                self._take_message(item)
        except InvalidInput as error:
            self._odd.note("the hub sent what cannot be used", kind=shorten(kind), reason=error.message)

    def _take_roles(self, item: dict[str, Any]) -> None:
        channels = item.get("channels")
        if not isinstance(channels, dict):
            raise InvalidInput("channels: expected an object")
        self._roles = {ChannelName.parse(name): parse_roles(roles) for name, roles in channels.items()}
        # What may be heard no more was ended by the hub; when it may again, it is asked for again.
        self._subscribed &= set(wanted(self._roles, self._handlers))
        self._changed.set()

    def _take_message(self, item: dict[str, Any]) -> None:
        channel, band = ChannelName.parse(item.get("channel"), "channel"), item.get("band")
        message = parse_message(item.get("data"), "data")
        if band_of(message.kind) != band:
            raise InvalidInput(f"a {message.kind} on the band {shorten(band)}")
        if not message.verify():
            raise InvalidInput(f"a {message.kind} that {message.from_node_id} did not sign")
        found = BandMessage(channel, band, message.from_node_id, message.body)
        self._dispatcher.put(found, self, len(message.canonical))

    async def _follow(self) -> None:
        """Subscribe to what somebody handles and the roles allow, after each change of roles or connection."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            for topic in wanted(self._roles, self._handlers):
                if topic in self._subscribed or not self._client.connected:
                    continue
                try:
                    await self._client.request("subscribe", {"channel": topic[0], "band": topic[1]})
                    self._subscribed.add(topic)
                except KacheryLabError as error:
                    log.info("no subscription", channel=topic[0], band=topic[1], reason=error.message)
                    asyncio.get_running_loop().call_later(RETRY_SECONDS, self._changed.set)


def wanted(channels: Mapping[str, Role], handlers: BandHandlers) -> list[tuple[str, str]]:
    """(Channel, band) of everything that roles allow to hear and somebody handles."""
    handled = handlers.bands()
    return [
        (channel, band)
        for channel, roles in sorted(channels.items())
        for band, allowed in rights(roles).items()
        if band in handled and "subscribe" in allowed
    ]
