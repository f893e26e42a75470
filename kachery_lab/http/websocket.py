"""The edge for WebSockets: uvicorn's protocol with limits on what a peer that does not read can make us hold.

uvicorn answers pings without looking at what is still unsent, keeps any number of fragments, and waits for ever for a
peer that does not read its last frames. The upgrade request itself was checked by `http/server.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, ClassVar

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from kachery_lab.http.deadlines import EdgeLimits, Sweeper, Swept
from kachery_lab.observability.logging import bad_requests

MAX_FRAME = 1 << 18
"""Bytes of a message from a client: four times the largest payload of a band."""
MAX_FRAGMENTS = 1000
MAX_UNSENT = 1 << 20
"""Bytes that may wait for a peer which makes us answer pings."""
PING_SECONDS = 10.0
PONG_SECONDS = 20.0

# Lines of uvicorn and websockets about a connection hold its query and headers, where credentials are.
_log = logging.getLogger("kachery_lab.websocket")
_log.setLevel(logging.ERROR)
# Any client can send that; it is told, and nothing failed here.
_log.addFilter(lambda record: not str(record.msg).startswith("Invalid UTF-8"))


async def until_first(ending: Coroutine[Any, Any, object], *work: Coroutine[Any, Any, None]) -> list[Exception]:
    """Run these beside each other until one of them ends, then end the others; what the work raised, in its order."""
    tasks = [asyncio.create_task(one) for one in work]
    last = asyncio.create_task(ending)
    try:
        await asyncio.wait([*tasks, last], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (*tasks, last):
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
    return [one for one in found if isinstance(one, Exception)]


class GuardedWebSocket(WebSocketsSansIOProtocol, Swept):
    """One WebSocket. Uses private parts of uvicorn, as `GuardedProtocol` does."""

    limits: ClassVar[EdgeLimits]
    sweeper: ClassVar[Sweeper]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _log
        self.conn.logger = _log
        self._closing_since: float | None = None

    def handle_ping(self) -> None:
        if self.transport.get_write_buffer_size() > MAX_UNSENT:
            self._cut("websocket_answers_not_read")
        else:
            super().handle_ping()

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) >= MAX_FRAGMENTS:
            self._cut("websocket_too_many_fragments")
        else:
            super().handle_cont(event)

    async def send(self, message: Any) -> None:
        if self.close_sent and message["type"] in ("websocket.send", "websocket.close"):
            # What the peer sent ended the connection a moment ago; the application cannot know yet.
            raise ClientDisconnected
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            # uvicorn takes a refused upgrade for one that nobody answered, and logs an error.
            self.handshake_complete = True

    def sweep(self, now: float) -> None:
        """Cuts a connection that is over but whose peer takes neither the rest nor the end."""
        if not (self.close_sent or self.disconnected or self.transport.is_closing()):
            return
        if self._closing_since is None:
            self._closing_since = now
        elif now - self._closing_since >= self.limits.linger:
            self.transport.abort()

    def _cut(self, what: str) -> None:
        bad_requests.note(what, peer=self.client)
        self.transport.abort()


def websocket_class(limits: EdgeLimits, sweeper: Sweeper) -> type[GuardedWebSocket]:
    """A protocol class with these limits, looked at by this sweeper."""

    class BoundWebSocket(GuardedWebSocket):
        pass

    BoundWebSocket.limits = limits
    BoundWebSocket.sweeper = sweeper
    return BoundWebSocket
