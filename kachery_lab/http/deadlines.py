"""Limits of one connection, and the one timer that enforces those that are times."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass

from kachery_lab.errors import Unavailable
from kachery_lab.observability.logging import bad_requests


@dataclass(frozen=True, slots=True)
class EdgeLimits:
    """What one connection may take. Times in seconds, sizes in bytes."""

    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    max_target: int = 16 * 1024
    max_body: int = 16 * 1024**4
    header_deadline: float = 10.0
    body_window: float = 30.0
    body_min_rate: int = 1024
    response_stall: float = 60.0
    keep_alive: int = 15
    max_connections: int = 2000
    # An answered request's unread body: up to this many bytes are read and dropped to keep the connection.
    max_drain: int = 16 * 1024**2
    # After a refusal the connection is half closed this long: so the answer reaches a client that is still sending.
    linger: float = 2.0

    @property
    def most_open(self) -> int:
        """Connections that may be open when those that were refused, which linger, are counted too."""
        return self.max_connections + self.max_connections // 10 + 1


class RequestTooSlow(Unavailable):
    """The request did not arrive in time (408)."""


class Swept:
    """A connection with deadlines."""

    def sweep(self, now: float) -> None:
        """Looks at every deadline of this connection."""
        raise NotImplementedError


class Sweeper:
    """Deadlines of all connections of a server by one timer: a request costs no timer of its own.

    `now` moves with the sweeps and never by more than two intervals at once, so a loop that was held up for long does
    not blame its clients.
    """

    def __init__(self, limits: EdgeLimits) -> None:
        deadlines = (limits.header_deadline, limits.body_window, limits.response_stall, limits.linger)
        self.interval = min(1.0, min(deadlines) / 4)
        self.now = 0.0
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, loop: asyncio.AbstractEventLoop, connections: Collection[object]) -> None:
        """Sweeps until no connection is left."""
        if self._timer is None:
            self._last = loop.time()
            self._timer = loop.call_later(self.interval, self._sweep, loop, connections)

    def _sweep(self, loop: asyncio.AbstractEventLoop, connections: Collection[object]) -> None:
        self._timer = None
        last, self._last = self._last, loop.time()
        self.now += min(self._last - last, 2 * self.interval)
        for connection in list(connections):
            if isinstance(connection, Swept):
                connection.sweep(self.now)
        bad_requests.flush()
        if connections:
            self._timer = loop.call_later(self.interval, self._sweep, loop, connections)
