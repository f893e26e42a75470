"""The edge: uvicorn's httptools protocol with limits and deadlines, and the server that uses it.

    bytes -> GuardedProtocol -> (whole head) request_head.parse_head -> httptools -> application
                             -> (body)       counted, then httptools
    refusals.RefusingProtocol: the same connection's state, and how it ends early
    deadlines.Sweeper: one timer for all connections looks at every connection's deadlines

uvicorn has no deadline for receiving a request and httptools caps no headers; both live here and nowhere else. Requests
of one connection are served one after the other: a further head is looked at when the answer before it is complete, so
a refusal never lands inside another answer.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httptools
import uvicorn

from kachery_lab.errors import HeadersTooLarge, InvalidInput, Unavailable
from kachery_lab.http.chunks import ChunkScanner
from kachery_lab.http.corked import CorkedTransport
from kachery_lab.http.deadlines import EdgeLimits, Sweeper
from kachery_lab.http.refusals import CHUNKED, HEAD, LENGTH, UPGRADED, RefusingProtocol
from kachery_lab.http.request_head import Head, HeadLimits, Refused, check_partial, find_origin, parse_head
from kachery_lab.http.websocket import MAX_FRAME, PING_SECONDS, PONG_SECONDS, websocket_class
from kachery_lab.observability.logging import bad_requests

__all__ = ["EdgeLimits", "GuardedProtocol", "build_server", "protocol_class"]


class GuardedProtocol(RefusingProtocol):
    """One connection. Uses private parts of uvicorn: `tests/http/test_server.py` pins the version that was read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(CorkedTransport(transport, self.loop))
        # uvloop leaves Nagle's algorithm on for sockets that were bound elsewhere: the second of two small frames, or a
        # body behind its head, would wait 40 ms for the client's acknowledgement of the first.
        _send_at_once(transport)
        self.sweeper.watch(self.loop, self.connections)
        most = self.limits.max_connections
        if len(self.connections) > most:
            bad_requests.note("too_many_connections", peer=self.client)
            self._answer(503, Unavailable(f"The server has {most} connections open.", retry_after=5))
            if len(self.connections) > self.limits.most_open:
                # No lingering when lingering connections themselves are many.
                transport.close()

    def data_received(self, data: bytes) -> None:
        size = len(data)
        if size <= self._left:
            self._left -= size
            self._received += size
            self._feed(data)
            if self._left == 0 and self._state == LENGTH:
                self._await_head()
        elif self._state == CHUNKED:
            self._chunk_data(data)
        elif self._state == LENGTH:
            rest = data[self._left :]
            self.data_received(data[: self._left])
            self.data_received(rest)
        elif self._state == HEAD:
            self._unset_keepalive_if_required()
            if not self._buffer:
                self._since = self.sweeper.now
            self._buffer += data
            self._take_head()

    # Heads

    def _take_head(self) -> None:
        """Gives the parser the next head of the buffer, and what follows it, unless an answer is still under way."""
        while self._buffer and self._state == HEAD and not self.transport.is_closing():
            if self.cycle is not None and not self.cycle.response_complete:
                self.flow.pause_reading()
                return
            buffer = self._buffer
            while buffer.startswith(b"\r\n"):
                # Blank lines after a body: some old clients send them (RFC 9112, 2.2).
                del buffer[:2]
                self._seen = 0
            end = buffer.find(b"\r\n\r\n", max(0, self._seen - 3))
            try:
                if end < 0:
                    check_partial(buffer, self._seen, self.head_limits)
                    self._seen = len(buffer)
                    return
                raw = bytes(memoryview(buffer)[: end + 4])
                rest = bytes(memoryview(buffer)[end + 4 :])
                head = parse_head(raw, bool(rest), self.head_limits)
            except Refused as refused:
                self._refuse(refused.status, refused.error)
                return
            self._buffer = bytearray()
            self._seen = 0
            self._begin(raw, head)
            if rest:
                self._give_rest(rest)

    def _give_rest(self, rest: bytes) -> None:
        if self._state == UPGRADED:
            protocol = self.transport.get_protocol()
            if isinstance(protocol, asyncio.Protocol) and protocol is not self:
                protocol.data_received(rest)
        elif self._state == HEAD:
            self._buffer += rest
        else:
            self.data_received(rest)

    def _begin(self, raw: bytes, head: Head) -> None:
        self._origin = find_origin(raw) if b"rigin:" in raw else None
        self._feeding_head = True
        self._feed(head.parsed)
        self._feeding_head = False
        if self._state != HEAD:
            return
        if head.must_close:
            self.cycle.keep_alive = False
        if head.chunked or head.length:
            self._state = CHUNKED if head.chunked else LENGTH
            self._left = head.length
            self._received = self._window_received = self._between_chunks = self._trailers = self._dropped = 0
            self._window = self.sweeper.now
            self._chunks = ChunkScanner()
            if head.expects_100:
                # An answer before `100 Continue` leaves open whether the body will come: then the connection closes.
                self._keep_alive_after_100 = self.cycle.keep_alive
                self.cycle.keep_alive = False

    def _await_head(self) -> None:
        self._state = HEAD
        self._since = self.sweeper.now

    # Parser

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self._state = UPGRADED
                if isinstance(self.transport, CorkedTransport):
                    # A frame is one write: nothing comes behind it.
                    self.transport = self.transport.plain
                self.handle_websocket_upgrade()
            else:
                self._refuse(400, InvalidInput("This upgrade is not offered here."))
        except httptools.HttpParserError:
            self._refuse(400, InvalidInput("Invalid HTTP request."))

    def _chunk_data(self, data: bytes) -> None:
        # The end of the body is the end of a piece for the parser: what follows is a head, and is checked as one. A
        # client that got an early answer sends its next request right behind the end.
        end = self._chunks.end(data)
        self._received += end
        self._between_chunks += end
        self._feed(data if end == len(data) else data[:end])
        rest = data[end:]
        if self._state == HEAD and rest:
            self.data_received(rest)
        elif self._state == CHUNKED:
            self._check_chunked(end)
            if self._state == CHUNKED and rest:
                self._refuse(400, InvalidInput("Invalid HTTP request."))

    def _check_chunked(self, size: int) -> None:
        if self._between_chunks > self.limits.max_header_bytes:
            self._refuse(431, HeadersTooLarge("Too many bytes between the chunks of a body or after them."))
        elif self.cycle.response_complete:
            self._dropped += size
            if self._dropped > self.limits.max_drain:
                self._end()

    def on_message_begin(self) -> None:
        if not self._feeding_head:
            # Behind a chunked body only the parser knows where a message ends; one that begins there was not checked.
            raise ValueError("a request behind a chunked body in one piece with it")
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._feeding_head:
            super().on_header(name, value)
            return
        # Trailers are dropped: the application has already judged the headers of this request.
        self._trailers += 1
        if self._trailers > self.limits.max_headers:
            raise ValueError("too many trailers")

    def on_body(self, body: bytes) -> None:
        self._between_chunks = 0
        if self._keep_alive_after_100:
            self._keep_alive_after_100 = False
            if not self.cycle.response_started:
                self.cycle.keep_alive = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self._state == CHUNKED:
            self._await_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._keep_alive_after_100 = False
        if self.transport.is_closing():
            return
        if self._deferred is not None:
            status, error = self._deferred
            self._deferred = None
            self._answer(status, error)
        elif self._left > self.limits.max_drain:
            self._end()
        elif self._state != HEAD:
            self._unset_keepalive_if_required()
        elif self._buffer:
            self._unset_keepalive_if_required()
            self._since = self.sweeper.now
            self._take_head()


def _send_at_once(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def protocol_class(limits: EdgeLimits, origins: tuple[str, ...]) -> type[GuardedProtocol]:
    """A protocol class with these limits, and a sweeper of its own."""

    class BoundProtocol(GuardedProtocol):
        pass

    BoundProtocol.limits = limits
    BoundProtocol.head_limits = HeadLimits(
        limits.max_header_bytes, limits.max_headers, limits.max_target, limits.max_body
    )
    BoundProtocol.origins = origins
    BoundProtocol.sweeper = Sweeper(limits)
    return BoundProtocol


def build_server(
    app: Any,
    *,
    limits: EdgeLimits | None = None,
    cors_origins: tuple[str, ...] = ("http://localhost:3000",),
    graceful_timeout: int = 30,
) -> uvicorn.Server:
    """The server for `app`. Give the listening sockets to `serve(sockets=...)`; logging is configured by the caller."""
    kept = limits or EdgeLimits()
    http = protocol_class(kept, cors_origins)
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=http,
        ws=websocket_class(kept, http.sweeper),
        ws_max_size=MAX_FRAME,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PONG_SECONDS,
        # Nothing that a client compressed is decoded here.
        ws_per_message_deflate=False,
        lifespan="on",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # No browser guesses that stored bytes are a page.
        headers=[("x-content-type-options", "nosniff")],
        date_header=True,
        timeout_keep_alive=kept.keep_alive,
        timeout_graceful_shutdown=graceful_timeout,
    )
    return uvicorn.Server(config)
