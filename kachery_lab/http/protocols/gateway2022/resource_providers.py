"""WebSocket `/p/{token}`: somebody's program offers the files of its machine in a zone (npm `kachery-resource`).

The program knows one address, which it also prints with `/r/<resource>` behind it; so the token stands in the path as
it does for those who ask. Frames are JSON texts:

    -> {"type": "initialize", "resourceName", "zone"?, "proxySecret"?}    once, first; the name is the zone's
    <- {"type": "acknowledge"}
    -> {"type": "ping"}                                                   keeps it open through proxies
    <- {"type": "requestFromClient", "requestId", "resourceName", "zone"?, "request", "timeoutMsec"}
    -> {"type": "responseToClient", "requestId", "response", "error"?}

Every other frame ends the connection with its reason. A program that is gone is noticed by the pings of WebSocket.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, cast, get_args

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from kachery_lab.core.ids import ChannelName, parse_fields
from kachery_lab.core.rates import Allowance
from kachery_lab.core.strict_json import loads, shorten
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, KacheryLabError, Unavailable
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.protocols.gateway2022.auth import DEFAULT_ZONE
from kachery_lab.http.protocols.gateway2022.errors import resource_error
from kachery_lab.http.websocket import until_first
from kachery_lab.node import Node
from kachery_lab.services.resource_providers import End, Provider, Reply, State, Wanted
from kachery_lab.services.subjects import subject_of

INITIALIZE_SECONDS = 10.0
MAX_FRAME = 20_000
"""Characters of one frame; an answer has a few hundred."""
MAX_ERROR = 200
"""Characters of a provider's error text that are passed on."""
FRAMES_PER_SECOND, FRAMES_AT_ONCE = 20.0, 500.0
"""What one connection may send; then it is read more slowly."""
_NONE: frozenset[str] = frozenset()
_INITIALIZE = (frozenset({"type", "resourceName"}), frozenset({"zone", "proxySecret"}))
_RESPONSE = (frozenset({"type", "requestId", "response"}), frozenset({"error"}))
_FILE = (frozenset({"type", "status"}), _NONE)
_STATES: tuple[str, ...] = get_args(State)
_CLOSE = {"stopping": 1012, "closed": 1000}
_POLICY = 1008
_MAX_REASON = 120
_CLOSE_SECONDS = 1.0


async def provide(websocket: WebSocket) -> None:
    """One provider's connection. Who may not provide anything is refused before the upgrade; what is wrong after it
    ends the connection with its reason."""
    node = node_of(websocket)
    try:
        provider = await _enter(websocket, node)
    except KacheryLabError as error:
        await websocket.send_denial_response(resource_error(websocket, error))
        return
    end = None
    try:
        await websocket.accept()
        end = await _Line(websocket, node, provider).run()
    except WebSocketDisconnect:
        return
    finally:
        node.resource_providers.leave(provider, end)
    if end is not None and websocket.application_state == WebSocketState.CONNECTED:
        await _close(websocket, end)


async def _enter(websocket: WebSocket, node: Node) -> Provider:
    """Raises Unauthenticated, Forbidden, TooManyRequests, Unavailable."""
    if node.stopping.is_set():
        raise Unavailable("the server stops")
    peer = peer_of(websocket)
    node.client_requests.check_rate(f"address {peer}")
    principal = node.access.by_token(websocket.path_params["token"], peer)
    subject = subject_of(principal, node.identity.node_id)
    async with node.audit.refusals(str(subject), peer, "resource.provide", "any zone"):
        principal.require("write", "client")
    return node.resource_providers.enter(subject, peer, principal.expires_at)


async def _close(websocket: WebSocket, end: End) -> None:
    reason = f"{end.code}: {end.reason}".encode()[:_MAX_REASON].decode(errors="ignore")
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await websocket.close(_CLOSE.get(end.code, _POLICY), reason)
    except (TimeoutError, WebSocketDisconnect):
        # A peer that does not read does not take this either; the edge cuts it off then.
        return


class _Line:
    """One connection after its upgrade."""

    def __init__(self, websocket: WebSocket, node: Node, provider: Provider) -> None:
        self._websocket = websocket
        self._node = node
        self._provider = provider
        self._says_zone = False

    async def run(self) -> End | None:
        """Until the provider goes (None), is told to, or says something wrong. Raises WebSocketDisconnect."""
        try:
            async with asyncio.timeout(INITIALIZE_SECONDS):
                fields = await self._receive()
            await self._initialize(fields)
        except TimeoutError:
            return End("bad_message", f"no initialize came within {INITIALIZE_SECONDS:.0f} s")
        except Forbidden as error:
            return End("forbidden", error.message)
        except Conflict as error:
            return End("conflict", error.message)
        except KacheryLabError as error:
            return self._provider.end or End("bad_message", error.text)
        await self._websocket.send_text(json.dumps({"type": "acknowledge"}))
        return await self._talk()

    async def _talk(self) -> End | None:
        for one in await until_first(self._provider.wait_end(), self._read(), self._write()):
            if isinstance(one, KacheryLabError):
                return End("bad_message", one.text)
            raise one
        return self._provider.end

    # -- in ------------------------------------------------------------------------------------------------------

    async def _receive(self) -> dict[str, Any]:
        """The next frame. Raises InvalidInput, WebSocketDisconnect."""
        event = await self._websocket.receive()
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", 1005))
        text = event.get("text")
        if text is None or len(text) > MAX_FRAME:
            raise InvalidInput(f"a frame is a text of at most {MAX_FRAME} characters")
        fields = loads(text.encode())
        if not isinstance(fields, dict):
            raise InvalidInput(f"a frame is an object, not {shorten(fields)}")
        return cast("dict[str, Any]", fields)

    async def _initialize(self, fields: dict[str, Any]) -> None:
        """Raises InvalidInput, Forbidden, Conflict, Unavailable."""
        if fields.get("type") != "initialize":
            raise InvalidInput("type: expected initialize first")
        parse_fields(fields, "initialize", *_INITIALIZE)
        self._says_zone = "zone" in fields
        zone = ChannelName.parse(fields["zone"], "zone") if self._says_zone else DEFAULT_ZONE
        if fields["resourceName"] != zone:
            raise InvalidInput(f"resourceName: a resource has the name of its zone, {zone}")
        provider, node = self._provider, self._node
        async with node.audit.refusals(str(provider.subject), provider.peer, "resource.provide", zone):
            node.resource_providers.serve(provider, zone)

    async def _read(self) -> None:
        """Take what comes until it is wrong. Raises InvalidInput, WebSocketDisconnect."""
        allowance = Allowance(FRAMES_PER_SECOND, FRAMES_AT_ONCE)
        while True:
            fields = await self._receive()
            kind = fields.get("type")
            if kind == "responseToClient":
                parse_fields(fields, "responseToClient", *_RESPONSE)
                if not isinstance(fields["requestId"], str):
                    raise InvalidInput(f"requestId: expected a text, got {shorten(fields['requestId'])}")
                self._provider.reply(fields["requestId"], _reply(fields))
            elif kind != "ping":
                raise InvalidInput(f"type: expected ping or responseToClient, got {shorten(kind)}")
            if wait := allowance.take(1, time.monotonic()):
                await asyncio.sleep(wait)

    # -- out -----------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        while True:
            await self._websocket.send_text(json.dumps(self._request(await self._provider.take())))

    def _request(self, wanted: Wanted) -> dict[str, Any]:
        """Closed on the other side: a provider that did not say its zone knows no such field."""
        wait = int(wanted.seconds * 1000)
        return {
            "type": "requestFromClient",
            "resourceName": self._provider.zone,
            **({"zone": self._provider.zone} if self._says_zone else {}),
            "request": {"type": "fileUpload", "uri": f"sha1://{wanted.sha1}", "timeoutMsec": wait},
            "timeoutMsec": wait,
            "requestId": wanted.request_id,
        }


def _reply(fields: dict[str, Any]) -> Reply:
    """What a provider says of a file; where it says that something failed, the rest may be missing. Sizes and times are
    not looked at. Raises InvalidInput."""
    if "error" in fields:
        return Reply("error", _told(fields["error"]))
    response: dict[str, Any] = parse_fields(fields["response"], "response", *_FILE)
    status = response["status"]
    if response["type"] != "fileUpload" or not isinstance(status, dict):
        raise InvalidInput("response: expected the type fileUpload and a status")
    state = status.get("status")
    if state not in _STATES:
        raise InvalidInput(f"response.status.status: expected one of {', '.join(_STATES)}")
    return Reply(cast(State, state), _told(status["error"]) if "error" in status else None)


def _told(text: object) -> str:
    """An error text of a provider, as others are shown it. Raises InvalidInput."""
    if not isinstance(text, str):
        raise InvalidInput(f"error: expected a text, got {shorten(text)}")
    return f"the provider says {shorten(text, MAX_ERROR)}"
