"""How a connection of the edge ends: refusals, and the deadlines whose passing is one. Its state is here as well.

Nothing here runs for a request that is served in time, but for the sweeps.
"""

from __future__ import annotations

import fcntl
import struct
import termios
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kachery_lab.errors import KacheryLabError
from kachery_lab.http.chunks import ChunkScanner
from kachery_lab.http.deadlines import EdgeLimits, RequestTooSlow, Sweeper, Swept
from kachery_lab.http.errors import PROBLEM_TYPE, problem_document, problem_headers
from kachery_lab.http.middleware import allow_origin
from kachery_lab.http.request_head import HeadLimits, find_origin
from kachery_lab.observability.logging import bad_requests

HEAD, LENGTH, CHUNKED, UPGRADED, ENDING = range(5)
"""What a connection waits for: a head, the rest of a body (of known length, chunked), another protocol, its end."""


class RefusingProtocol(HttpToolsProtocol, Swept):
    """One connection's state, and every way to end it early."""

    limits: ClassVar[EdgeLimits]
    head_limits: ClassVar[HeadLimits]
    origins: ClassVar[tuple[str, ...]]
    sweeper: ClassVar[Sweeper]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._state = HEAD
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
        elif self._state in {LENGTH, CHUNKED}:
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
            b"vary: Origin",
            b"connection: close",
        ]
        if (allowed := allow_origin(self.origins, self._origin)) is not None:
            lines.append(b"access-control-allow-origin: " + allowed)
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self._end()

    def _end_input(self) -> None:
        self._state = ENDING
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
        if self._state == ENDING:
            if now >= self._ends_at:
                self.transport.abort()
        elif self._state == HEAD:
            self._sweep_head(now)
        elif self._state in {LENGTH, CHUNKED}:
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
