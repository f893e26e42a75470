"""The one address of the room: the provider's library knows no other path."""

from __future__ import annotations

import asyncio

from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from kachery_lab.errors import Forbidden, KacheryLabError, Unavailable
from kachery_lab.http.context import node_of
from kachery_lab.http.protocols.ably2021.auth import pass_of
from kachery_lab.http.protocols.ably2021.connection import CLOSE_SECONDS, Connection, send
from kachery_lab.http.protocols.ably2021.errors import REVOKED, ConnectionRefused, ErrorInfo, of
from kachery_lab.http.protocols.ably2021.translate import Action, Format, encode


async def connect(websocket: WebSocket) -> None:
    """A client's connection, from its token to its end. The library reads no HTTP answer, so all that is refused after
    the upgrade is told in a protocol message."""
    await websocket.accept()
    wire: Format = "msgpack" if websocket.query_params.get("format") == "msgpack" else "json"
    try:
        refusal = await _serve(websocket, wire)
        async with asyncio.timeout(CLOSE_SECONDS):
            if refusal is not None:
                action, info = refusal
                await send(websocket, encode({"action": int(action), "error": info.fields()}, wire))
            await websocket.close()
    except (WebSocketDisconnect, TimeoutError):
        # The client is gone, or takes nothing: there is nobody to say goodbye to.
        return


async def _serve(websocket: WebSocket, wire: Format) -> tuple[Action, ErrorInfo] | None:
    """What is still to be told when the connection could not be served: the library gives up on an ERROR whose code is
    none of tokens, and comes back after DISCONNECTED."""
    node, query = node_of(websocket), websocket.query_params
    try:
        if node.stopping.is_set():
            raise Unavailable("the server stops")
        granted = pass_of(websocket, node)
        await Connection(websocket, node, granted, wire, resumed="resume" in query or "recover" in query).run()
    except ConnectionRefused as refused:
        return Action.ERROR, refused.info
    except Forbidden:
        return Action.ERROR, REVOKED
    except KacheryLabError as error:
        return Action.DISCONNECTED, of(error)
    return None


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    return [WebSocketRoute("/", connect)]
