"""The edge: uvicorn's httptools protocol with limits and deadlines, and the server that uses it.

    bytes -> GuardedProtocol -> (whole head) request_head.parse_head -> httptools -> application
                             -> (body)       counted, then httptools
    deadlines.Sweeper: one timer for all connections looks at every connection's deadlines

uvicorn has no deadline for receiving a request and httptools caps no headers; both live here and nowhere else. Requests
of one connection are served one after the other: a further head is looked at when the answer before it is complete, so
a refusal never lands inside another answer.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from http import HTTPStatus
from typing import Any, ClassVar

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kachery_lab.errors import HeadersTooLarge, InvalidInput, KacheryLabError, Unavailable
from kachery_lab.http.chunks import ChunkScanner
from kachery_lab.http.deadlines import EdgeLimits, RequestTooSlow, Sweeper, Swept
from kachery_lab.http.errors import PROBLEM_TYPE, problem_document, problem_headers
from kachery_lab.http.middleware import allow_origin
from kachery_lab.http.request_head import Head, HeadLimits, Refused, check_partial, find_origin, parse_head
from kachery_lab.http.websocket import MAX_FRAME, PING_SECONDS, PONG_SECONDS, websocket_class
from kachery_lab.observability.logging import bad_requests

_HEAD, _LENGTH, _CHUNKED, _UPGRADED, _ENDING = range(5)

__all__ = ["EdgeLimits", "GuardedProtocol", "build_server", "protocol_class"]


class GuardedProtocol(HttpToolsProtocol, Swept):
    """One connection. Uses private parts of uvicorn: `tests/http/test_server.py` pins the version that was read."""

    limits: ClassVar[EdgeLimits]
    head_limits: ClassVar[HeadLimits]
    origins: ClassVar[tuple[str, ...]]
    sweeper: ClassVar[Sweeper]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = _HEAD
        self._buffer = bytearray()
        self._seen = 0  # bytes of the buffer that check_partial passed
        self._since = self.sweeper.now  # when the wait for the present head began
        self._origin: bytes | None = None
        self._feeding_head = False
        self._left = 0  # bytes of a body of known length that have not come yet
        self._received = 0  # bytes of the present body
        self._window = 0.0
        self._window_received = 0
        self._between_chunks = 0  # bytes since the last one of the body: chunk sizes, extensions, trailers
        self._trailers = 0
        self._dropped = 0  # bytes of a body that came after the answer
        self._chunks = ChunkScanner()
        self._keep_alive_after_100 = False
        self._deferred: tuple[int, KacheryLabError] | None = None
        self._ends_at = 0.0
        self._pending = 0  # size of the write buffer at the last sweep
        self._moved = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvloop leaves Nagle's algorithm on for sockets that were bound elsewhere: the second of two small frames, or a
        # body behind its head, would wait 40 ms for the client's acknowledgement of the first.
        _send_at_once(transport)
        self.sweeper.watch(self.loop, self.connections)
        most = self.limits.max_connections
        if len(self.connections) > most:
            bad_requests.note("too_many_connections", peer=self.client)
            self._answer(503, Unavailable(f"The server has {most} connections open.", retry_after=5))
            if len(self.connections) > most + most // 10 + 1:
                # No lingering when lingering connections themselves are many.
                transport.close()

    def data_received(self, data: bytes) -> None:
        size = len(data)
        if size <= self._left:
            self._left -= size
            self._received += size
            self._feed(data)
            if self._left == 0 and self._state == _LENGTH:
                self._await_head()
        elif self._state == _CHUNKED:
            self._chunk_data(data)
        elif self._state == _LENGTH:
            rest = data[self._left :]
            self.data_received(data[: self._left])
            self.data_received(rest)
        elif self._state == _HEAD:
            self._unset_keepalive_if_required()
            if not self._buffer:
                self._since = self.sweeper.now
            self._buffer += data
            self._take_head()

    # Heads

    def _take_head(self) -> None:
        """Gives the parser the next head of the buffer, and what follows it, unless an answer is still under way."""
        while self._buffer and self._state == _HEAD and not self.transport.is_closing():
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
        if self._state == _UPGRADED:
            protocol = self.transport.get_protocol()
            if isinstance(protocol, asyncio.Protocol) and protocol is not self:
                protocol.data_received(rest)
        elif self._state == _HEAD:
            self._buffer += rest
        else:
            self.data_received(rest)

    def _begin(self, raw: bytes, head: Head) -> None:
        self._origin = find_origin(raw) if b"rigin:" in raw else None
        self._feeding_head = True
        self._feed(head.parsed)
        self._feeding_head = False
        if self._state != _HEAD:
            return
        if head.must_close:
            self.cycle.keep_alive = False
        if head.chunked or head.length:
            self._state = _CHUNKED if head.chunked else _LENGTH
            self._left = head.length
            self._received = self._window_received = self._between_chunks = self._trailers = self._dropped = 0
            self._window = self.sweeper.now
            self._chunks = ChunkScanner()
            if head.expects_100:
                # An answer before `100 Continue` leaves open whether the body will come: then the connection closes.
                self._keep_alive_after_100 = self.cycle.keep_alive
                self.cycle.keep_alive = False

    def _await_head(self) -> None:
        self._state = _HEAD
        self._since = self.sweeper.now

    # Parser

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self._state = _UPGRADED
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
        if self._state == _HEAD and rest:
            self.data_received(rest)
        elif self._state == _CHUNKED:
            self._check_chunked(end)
            if self._state == _CHUNKED and rest:
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
        if self._state == _CHUNKED:
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
        elif self._state != _HEAD:
            self._unset_keepalive_if_required()
        elif self._buffer:
            self._unset_keepalive_if_required()
            self._since = self.sweeper.now
            self._take_head()

    # Refusals and deadlines

    def _refuse(self, status: int, error: KacheryLabError) -> None:
        """Answers and closes, without ever writing into another answer."""
        bad_requests.note("refused", status=status, detail=error.message, peer=self.client)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not cycle.more_body:
                # The request before this one is whole and gets its answer first.
                self._deferred = (status, error)
                self._end_input()
                return
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.abort()
                return
        elif self._state in {_LENGTH, _CHUNKED}:
            self._end()
            return
        if not self._origin and self._buffer:
            self._origin = find_origin(bytes(self._buffer))
        self._answer(status, error)

    def _answer(self, status: int, error: KacheryLabError) -> None:
        body = problem_document(error, status)
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
        lines += [name + b": " + value for name, value in self.server_state.default_headers]
        lines += [f"{name}: {value}".encode("latin-1") for name, value in problem_headers(error).items()]
        lines += [
            b"content-type: " + PROBLEM_TYPE.encode(),
            b"content-length: %d" % len(body),
            b"x-content-type-options: nosniff",
            b"vary: Origin",
            b"connection: close",
        ]
        if (allowed := allow_origin(self.origins, self._origin)) is not None:
            lines.append(b"access-control-allow-origin: " + allowed)
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self._end()

    def _end_input(self) -> None:
        self._state = _ENDING
        self._left = 0
        self._buffer = bytearray()
        self._ends_at = float("inf")

    def _end(self) -> None:
        """Half closes; what still comes is dropped until the client closes or `linger` is over."""
        self._end_input()
        self._unset_keepalive_if_required()
        self._ends_at = self.sweeper.now + self.limits.linger
        if not self.transport.is_closing():
            self.flow.resume_reading()
            if self.transport.can_write_eof():
                self.transport.write_eof()
            else:
                self.transport.close()

    def resume_writing(self) -> None:
        self._pending = -1
        super().resume_writing()

    def sweep(self, now: float) -> None:
        """Looks at every deadline of this connection."""
        if self.transport.get_write_buffer_size():
            pending = self.transport.get_write_buffer_size() + self._in_kernel()
            if pending != self._pending:
                self._pending, self._moved = pending, now
            elif now - self._moved >= self.limits.response_stall:
                bad_requests.note("response_not_read", peer=self.client)
                self.transport.abort()
            return
        self._pending = 0
        if self._state == _ENDING:
            if now >= self._ends_at:
                self.transport.abort()
        elif self._state == _HEAD:
            self._sweep_head(now)
        elif self._state in {_LENGTH, _CHUNKED}:
            self._sweep_body(now)

    def _in_kernel(self) -> int:
        """Bytes that the kernel still holds for the client: it takes megabytes at once and then none for long."""
        try:
            handle = self.transport.get_extra_info("socket").fileno()
            return int(struct.unpack("i", fcntl.ioctl(handle, termios.TIOCOUTQ, b"\0\0\0\0"))[0])
        except (AttributeError, OSError, ValueError):
            return 0

    def _sweep_head(self, now: float) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            return
        if now - self._since < self.limits.header_deadline:
            return
        if self._buffer:
            seconds = self.limits.header_deadline
            self._refuse(408, RequestTooSlow(f"The request head did not arrive within {seconds:g} s."))
        elif self.timeout_keep_alive_task is None:
            self.transport.close()

    def _sweep_body(self, now: float) -> None:
        if self.flow.read_paused or self.cycle.waiting_for_100_continue:
            # It is this server that makes the client wait.
            self._window, self._window_received = now, self._received
        elif now - self._window >= self.limits.body_window:
            rate = (self._received - self._window_received) / (now - self._window)
            self._window, self._window_received = now, self._received
            if rate < self.limits.body_min_rate:
                text = f"The request body came with less than {self.limits.body_min_rate} bytes per second."
                self._refuse(408, RequestTooSlow(text))


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
        date_header=True,
        timeout_keep_alive=kept.keep_alive,
        timeout_graceful_shutdown=graceful_timeout,
    )
    return uvicorn.Server(config)
