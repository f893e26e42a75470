"""`/api/v1/bands`: the bands of this hub's channels, one WebSocket for each node (docs/api.md, "Bands")."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from kachery_lab.core.band_messages import MAX_PAYLOAD, parse_messages, payload_size
from kachery_lab.core.canonical_json import loads_2021
from kachery_lab.core.ids import ChannelName, NodeId, parse_whole_number
from kachery_lab.core.roles import Role, role_names
from kachery_lab.core.strict_json import shorten
from kachery_lab.errors import InvalidInput, KacheryLabError, TooLarge, Unavailable
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.errors import problem
from kachery_lab.http.websocket import until_first
from kachery_lab.services.broker import HubBands
from kachery_lab.services.member_connections import ConnectionEnded, Delivery, End, MemberConnection
from kachery_lab.services.node_requests import HEADER

PATH = "/api/v1/bands"
MAX_ITEMS = 100
"""Objects in one frame."""
_CLOSE = {"stopping": 1012, "closed": 1000}
_POLICY = 1008
_MAX_REASON = 120


async def serve(websocket: WebSocket) -> None:
    """A node proves who it is in the upgrade request, and is refused there; then frames go both ways until one ends
    it."""
    node = node_of(websocket)
    try:
        if node.stopping.is_set():
            raise Unavailable("the server stops")
        subject = node.node_requests.verify(websocket.headers.get(HEADER), "GET", PATH, b"")
        node_id = NodeId(subject.name)
        bell = asyncio.Event()
        connection = node.hub_bands.open(node_id, peer_of(websocket), on_change=bell.set, alone=True)
    except KacheryLabError as error:
        await websocket.send_denial_response(problem(error))
        return
    member = _Member(websocket, node.hub_bands, connection, bell)
    try:
        await websocket.accept()
        member.greet(node.identity.node_id)
        end = await member.run()
    except WebSocketDisconnect:
        return
    finally:
        node.hub_bands.close(connection)
    if end is not None and websocket.application_state == WebSocketState.CONNECTED:
        reason = f"{end.code}: {end.reason}".encode()[:_MAX_REASON].decode(errors="ignore")
        # A peer that does not read does not take this either; the edge cuts it off then.
        await _at_most(1, websocket.close(_CLOSE.get(end.code, _POLICY), reason))


async def _at_most(seconds: float, work: Any) -> None:
    try:
        async with asyncio.timeout(seconds):
            await work
    except (TimeoutError, WebSocketDisconnect):
        return


class _BadFrame(Exception):
    pass


class _Member:
    """One connection: a reader, a writer, and the rights that are told after each change."""

    def __init__(
        self, websocket: WebSocket, hub: HubBands, connection: MemberConnection, changed: asyncio.Event
    ) -> None:
        self._websocket = websocket
        self._hub = hub
        self._connection = connection
        self._changed = changed
        self._told: dict[str, Role] | None = None

    def greet(self, hub_id: NodeId) -> None:
        """The first frame: who the hub is, and what this node may."""
        self._put({"type": "hello", "hubId": hub_id, "maxPayload": MAX_PAYLOAD, "maxItems": MAX_ITEMS})
        self._tell_roles()

    async def run(self) -> End | None:
        """Until the peer goes (None) or the hub ends it."""
        work = (self._read(), self._write(), self._watch_roles())
        for one in await until_first(self._connection.wait_end(), *work):
            if not isinstance(one, ConnectionEnded | WebSocketDisconnect):
                raise one
        return self._connection.end

    # -- out -----------------------------------------------------------------------------------------------------

    def _put(self, item: dict[str, Any]) -> None:
        text = json.dumps(item, separators=(",", ":"))
        self._connection.put(text, len(text))

    def _tell_roles(self) -> None:
        roles = self._hub.roles(self._connection.node_id)
        if roles != self._told:
            self._told = roles
            self._put({"type": "roles", "channels": {name: role_names(one) for name, one in sorted(roles.items())}})

    async def _watch_roles(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._tell_roles()

    async def _write(self) -> None:
        while True:
            items = await self._connection.take()
            texts = [_text(item) if isinstance(item, Delivery) else item for item in items]
            await self._websocket.send({"type": "websocket.send", "text": f"[{','.join(texts)}]"})

    # -- in ------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while True:
            event = await self._websocket.receive()
            if event["type"] == "websocket.disconnect":
                return
            text = event.get("text")
            try:
                items = _items(text)
            except InvalidInput as error:
                self._connection.finish(End("bad_frame", error.message))
                return
            await self._connection.throttle(sum(map(_weight, items)), len(text or ""))
            for item in items:
                await self._answer(item)

    async def _answer(self, item: dict[str, Any]) -> None:
        number = item.get("id")
        known = number if isinstance(number, int) and not isinstance(number, bool) else None
        try:
            parse_whole_number(number, "id")
            await self._do(item)
        except KacheryLabError as error:
            found = {"type": "error", "id": known, "code": error.code, "detail": error.message}
            self._put(found if error.hint is None else {**found, "hint": error.hint})
        else:
            text = f'{{"type":"done","id":{known}}}'
            self._connection.put(text, len(text))

    async def _do(self, item: dict[str, Any]) -> None:
        kind = item.get("type")
        channel = ChannelName.parse(item.get("channel"), "channel")
        band = item.get("band")
        if not isinstance(band, str):
            raise InvalidInput("band: expected a text")
        if kind == "publish":
            messages = parse_messages({"messages": item.get("messages")}, kind)
            if (size := payload_size(messages)) > MAX_PAYLOAD:
                raise TooLarge(f"a payload on a band may have {MAX_PAYLOAD} bytes, this one has {size}")
            await self._hub.publish(self._connection, channel, band, messages)
        elif kind == "subscribe":
            await self._hub.subscribe(self._connection, channel, band)
        elif kind == "unsubscribe":
            self._hub.unsubscribe(self._connection, channel, band)
        else:
            raise InvalidInput(f"type: expected publish, subscribe or unsubscribe, got {shorten(kind)}")


def _items(text: str | None) -> list[dict[str, Any]]:
    """The objects of a frame. Raises InvalidInput for what is no frame."""
    if text is None:
        raise InvalidInput("frames are text")
    found = loads_2021(text)
    if not isinstance(found, list) or len(found) > MAX_ITEMS or not all(isinstance(one, dict) for one in found):
        raise InvalidInput(f"a frame is an array of at most {MAX_ITEMS} objects")
    return found  # type: ignore[return-value]


def _weight(item: dict[str, Any]) -> int:
    """How many messages an object counts for."""
    messages = item.get("messages")
    return max(1, len(messages)) if isinstance(messages, list) else 1


def _text(delivery: Delivery) -> str:
    """A message as all members get it: made once."""
    text: str | None = delivery.forms.get("v1")
    if text is None:
        head = json.dumps({"type": "message", "channel": delivery.channel, "band": delivery.band})
        text = delivery.forms["v1"] = f'{head[:-1]},"data":{delivery.message.text}}}'
    return text
