"""One connection of the provider's protocol, between a client's socket and the broker.

    socket -> _read -> one action after the other -> HubBands
    HubBands, answers -> the connection's queue -> _write -> socket

Everything that goes out goes through the queue of the broker's connection, so what a client does not read is bounded
there.

What the token does not give fails for good: nothing but another token can change it. What only the roles do not give at
the moment is told as a band with fewer modes or, when none is left, as a detached one, each with the provider's code;
the library may still use what is left, and hears of it when roles come back.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from kachery_lab.core.band_messages import MAX_PAYLOAD, encode_payload, parse_payload
from kachery_lab.core.bands import Right, band_name, role_for
from kachery_lab.core.ids import parse_whole_number
from kachery_lab.errors import Forbidden, InvalidInput, KacheryLabError, NotFound
from kachery_lab.http.context import peer_of
from kachery_lab.http.protocols.ably2021 import errors
from kachery_lab.http.protocols.ably2021.auth import REMIND_SECONDS, Pass, open_pass
from kachery_lab.http.protocols.ably2021.errors import ConnectionRefused, ErrorInfo
from kachery_lab.http.protocols.ably2021.translate import (
    MODE_PUBLISH,
    MODE_SUBSCRIBE,
    MODES,
    Action,
    Format,
    Frame,
    action_of,
    decode,
    encode,
    payloads,
)
from kachery_lab.node import Node
from kachery_lab.services.member_connections import ConnectionEnded, Delivery, EndCode, MemberConnection

IDLE_SECONDS = 15.0
"""A client hears something at least so often; it takes a longer silence for a lost connection."""
CLOSE_SECONDS = 5.0
"""What a client has to take the last messages; then it is cut off."""
STATE_TTL_MS = 120_000
MAX_NAME = 100
"""Characters of a channel's name that are given back in a refusal."""

_serials = itertools.count(1)
_ENDS: dict[EndCode, ErrorInfo] = {
    "slow_reader": errors.NOT_READ,
    "not_approved": errors.REVOKED,
    "stopping": errors.STOPPING,
}


class Connection:
    """Serves a client that has shown its token. `wire` is the form that is sent; what comes in says its own."""

    def __init__(self, websocket: WebSocket, node: Node, granted: Pass, wire: Format, *, resumed: bool) -> None:
        self._socket = websocket
        self._node = node
        self._hub = node.hub_bands
        self._pass = granted
        self._wire: Format = wire
        self._resumed = resumed
        self._id = secrets.token_urlsafe(8)
        self._asked: dict[str, int] = {}  # by band: the modes that the client attached with
        self._told: dict[str, int] = {}  # by band: those that it was told to have
        self._renewed = asyncio.Event()
        self._member: MemberConnection

    async def run(self) -> None:
        """Until either side ends it. Raises KacheryLabError when the broker refuses the node."""
        self._member = self._hub.open(self._pass.node_id, peer_of(self._socket), on_change=self._rights_changed)
        try:
            self._say_connected()
            await self._work()
        finally:
            self._hub.close(self._member)

    async def _work(self) -> None:
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write())
        ending = asyncio.create_task(self._member.wait_end())
        clock = asyncio.create_task(self._watch_token())
        try:
            await asyncio.wait({reader, writer, ending}, return_when=asyncio.FIRST_COMPLETED)
            # A reader that raises has nobody to write to. One that returns has put its goodbye into the queue, and an
            # end by the broker is told too; a client that does not read is not waited for.
            if not reader.done() or reader.exception() is None:
                await asyncio.wait({writer}, timeout=CLOSE_SECONDS)
        finally:
            for task in (reader, writer, ending, clock):
                task.cancel()
            found = await asyncio.gather(reader, writer, ending, clock, return_exceptions=True)
        for one in found:
            if isinstance(one, Exception) and not isinstance(one, WebSocketDisconnect):
                raise one

    # -- out -----------------------------------------------------------------------------------------------------

    def _put(self, action: Action, **fields: Any) -> None:
        frame = encode({"action": int(action), **fields}, self._wire)
        self._member.put(frame, len(frame))

    def _goodbye(self, action: Action, info: ErrorInfo | None = None) -> None:
        """The last message; the connection ends when it is sent."""
        self._put(action, **({} if info is None else {"error": info.fields()}))
        self._member.put(None, 0)

    def _say_connected(self, *, again: bool = False) -> None:
        details = {
            "connectionKey": self._id,
            "maxMessageSize": MAX_PAYLOAD,
            "maxFrameSize": 2 * MAX_PAYLOAD,
            "connectionStateTtl": STATE_TTL_MS,
            "maxIdleInterval": int(IDLE_SECONDS * 1000),
        }
        lost = {"error": errors.NOT_RECOVERED.fields()} if self._resumed and not again else {}
        self._put(Action.CONNECTED, connectionId=self._id, connectionDetails=details, **lost)

    async def _write(self) -> None:
        """Send what is queued until the goodbye is sent. Raises WebSocketDisconnect."""
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    items = await self._member.take()
            except TimeoutError:
                items = [encode({"action": int(Action.HEARTBEAT)}, self._wire)]
            except ConnectionEnded as ended:
                info = _ENDS.get(ended.end.code, errors.STOPPING)
                await send(
                    self._socket, encode({"action": int(Action.DISCONNECTED), "error": info.fields()}, self._wire)
                )
                return
            for item in items:
                if item is None:
                    return
                await send(self._socket, self._frame(item) if isinstance(item, Delivery) else item)

    def _frame(self, delivery: Delivery) -> Frame:
        """A delivery as a protocol message, made once for all who get it in this form."""
        key = f"ably2021/{self._wire}"
        found: Frame | None = delivery.forms.get(key)
        if found is None:
            message = {
                "action": int(Action.MESSAGE),
                "id": f"{delivery.message.from_node_id[:16]}:{next(_serials)}",
                "connectionId": delivery.message.from_node_id[:16],
                "channel": band_name(delivery.channel, delivery.band),
                "timestamp": int(time.time() * 1000),
                "messages": [{"data": encode_payload([delivery.message])}],
            }
            found = delivery.forms[key] = encode(message, self._wire)
        return found

    # -- bands ---------------------------------------------------------------------------------------------------

    def _given(self, band: str) -> int:
        """The modes of an attached band now: asked for, in the token, and in the roles."""
        channel, given = self._pass.token.channel, 0
        if (channel, band) in self._member.active:
            given |= MODE_SUBSCRIBE
        roles = self._node.data.node_roles(channel, self._pass.node_id)
        if self._pass.allows(band, "publish") and roles & role_for(band, "publish"):
            given |= MODE_PUBLISH
        return given & self._asked[band]

    def _tell(self, band: str, info: ErrorInfo | None) -> None:
        """Tell the client which modes it has. The library may go on publishing on a band only while it has one."""
        name, given = band_name(self._pass.token.channel, band), self._given(band)
        self._told[band] = given
        if given:
            why = {} if info is None else {"error": info.fields()}
            self._put(Action.ATTACHED, channel=name, flags=given, **why)
        else:
            self._put(Action.DETACHED, channel=name, error=(info or errors.denied(name, "publish")).fields())

    def _rights_changed(self) -> None:
        for band, before in self._told.items():
            lost = before & ~self._given(band)
            name = band_name(self._pass.token.channel, band)
            if lost:
                self._tell(band, errors.denied(name, "subscribe" if lost & MODE_SUBSCRIBE else "publish"))
            elif before != self._given(band):
                self._tell(band, None)

    async def _join(self, band: str, modes: int) -> ErrorInfo | None:
        """Take part in a band with these modes; why not with all of them, if so."""
        self._asked[band] = modes
        topic = (self._pass.token.channel, band)
        if not modes & MODE_SUBSCRIBE:
            return None
        try:
            await self._hub.subscribe(self._member, *topic)
        except (Forbidden, NotFound) as error:
            # The broker adds it when the roles come back.
            self._member.wanted.add(topic)
            return errors.of(error)
        return None

    def _leave(self, band: str) -> None:
        self._asked.pop(band, None)
        self._told.pop(band, None)
        self._hub.unsubscribe(self._member, self._pass.token.channel, band)

    # -- in ------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        """Handle what the client sends until one of both says goodbye. Raises WebSocketDisconnect when it is gone."""
        while True:
            frame = await self._receive()
            await self._member.throttle(1, len(frame))
            try:
                fields = decode(frame)
                action = action_of(fields)
                if action in (Action.CLOSE, Action.DISCONNECT):
                    self._goodbye(Action.CLOSED if action == Action.CLOSE else Action.DISCONNECTED)
                    return
                await self._handle(action, fields)
            except KacheryLabError as error:
                self._goodbye(Action.ERROR, errors.malformed(error))
                return
            except ConnectionRefused as refused:
                self._goodbye(Action.ERROR, refused.info)
                return

    async def _receive(self) -> Frame:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
        text: str | None = message.get("text")
        return text if text is not None else bytes(message["bytes"])

    async def _handle(self, action: Action, fields: dict[str, Any]) -> None:
        handlers: dict[Action, Callable[[dict[str, Any]], Awaitable[None]]] = {
            Action.HEARTBEAT: self._heartbeat,
            Action.ATTACH: self._attach,
            Action.DETACH: self._detach,
            Action.MESSAGE: self._message,
            Action.PRESENCE: self._presence,
            Action.SYNC: self._sync,
            Action.AUTH: self._auth,
        }
        handler = handlers.get(action)
        if handler is None:
            raise InvalidInput(f"action: {int(action)} is for the server to send")
        await handler(fields)

    async def _heartbeat(self, fields: dict[str, Any]) -> None:
        asked = fields.get("id")
        self._put(Action.HEARTBEAT, **({"id": asked} if isinstance(asked, str) and len(asked) <= MAX_NAME else {}))

    async def _attach(self, fields: dict[str, Any]) -> None:
        name, flags = _name(fields), fields.get("flags")
        modes = (flags & MODES if isinstance(flags, int) and flags > 0 else 0) or MODES
        try:
            band = await self._band(name, "subscribe" if modes & MODE_SUBSCRIBE else "publish")
        except Forbidden as error:
            self._put(Action.ERROR, channel=name, error=errors.of(error).fields())
            return
        self._tell(band, await self._join(band, modes))

    async def _detach(self, fields: dict[str, Any]) -> None:
        name = _name(fields)
        band = self._pass.band(name)
        if band is not None:
            self._leave(band)
        self._put(Action.DETACHED, channel=name)

    async def _message(self, fields: dict[str, Any]) -> None:
        serial = parse_whole_number(fields.get("msgSerial"), "msgSerial")
        try:
            band = await self._band(_name(fields), "publish")
            messages = [message for data in payloads(fields) for message in parse_payload(data)]
            await self._member.throttle(max(len(messages) - 1, 0), 0)
            await self._hub.publish(self._member, self._pass.token.channel, band, messages)
        except KacheryLabError as error:
            self._put(Action.NACK, msgSerial=serial, count=1, error=errors.of(error).fields())
        else:
            self._put(Action.ACK, msgSerial=serial, count=1)

    async def _presence(self, fields: dict[str, Any]) -> None:
        serial = parse_whole_number(fields.get("msgSerial"), "msgSerial")
        self._put(Action.NACK, msgSerial=serial, count=1, error=errors.NO_PRESENCE.fields())

    async def _sync(self, _fields: dict[str, Any]) -> None:
        """The library asks for presence when it thinks that it missed some; there is none."""

    async def _auth(self, fields: dict[str, Any]) -> None:
        given = fields.get("auth")
        granted = open_pass(self._node, given.get("accessToken") if isinstance(given, dict) else None)
        if not granted.for_same(self._pass):
            raise ConnectionRefused(errors.OTHER_TOKEN)
        self._pass = granted
        self._renewed.set()
        for band in tuple(self._asked):
            if not granted.allows(band, "subscribe") and self._asked[band] & MODE_SUBSCRIBE:
                self._leave(band)
                name = band_name(granted.token.channel, band)
                self._put(Action.ERROR, channel=name, error=errors.denied(name, "subscribe").fields())
        self._say_connected(again=True)

    async def _band(self, name: str, right: Right) -> str:
        """The band of a name for which the token gives a right. Raises Forbidden, which the audit knows."""
        band = self._pass.band(name)
        info = errors.denied(name, right)
        if band is None:
            raise Forbidden(info.message)
        async with self._node.audit.refusals(f"node:{self._pass.node_id}", self._member.peer, f"band.{right}", name):
            if not self._pass.allows(band, right):
                raise Forbidden(info.message)
        return band

    # -- time ----------------------------------------------------------------------------------------------------

    async def _watch_token(self) -> None:
        """Ask for a new token before the present one expires; without one say goodbye when it does."""
        while True:
            self._renewed.clear()
            lead = min(REMIND_SECONDS, self._pass.left / 2)
            if await self._renewed_within(self._pass.left - lead):
                continue
            self._put(Action.AUTH)
            if await self._renewed_within(self._pass.left):
                continue
            self._goodbye(Action.DISCONNECTED, errors.TOKEN_EXPIRED)
            return

    async def _renewed_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(max(seconds, 0)):
                await self._renewed.wait()
        except TimeoutError:
            return False
        return True


async def send(websocket: WebSocket, frame: Frame) -> None:
    """Send a frame as what it is. Raises WebSocketDisconnect."""
    await (websocket.send_text(frame) if isinstance(frame, str) else websocket.send_bytes(frame))


def _name(fields: dict[str, Any]) -> str:
    """The channel of a protocol message. Raises InvalidInput."""
    name = fields.get("channel")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise InvalidInput(f"channel: expected a name of 1 to {MAX_NAME} characters")
    return name
