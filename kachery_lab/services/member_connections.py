"""What goes out to a member node: deliveries, and the bounded queue of one connection.

A connection is opened and ended by `services.broker.HubBands`; a room sends what it holds.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from kachery_lab.core.band_messages import SignedBody
from kachery_lab.core.ids import NodeId
from kachery_lab.core.rates import Allowance

Topic = tuple[str, str]
"""(Channel, band)."""
EndCode = Literal["slow_reader", "not_approved", "replaced", "stopping", "bad_frame", "closed"]

MAX_QUEUED = 4000
"""Messages that may wait for one connection."""
MAX_QUEUED_BYTES = 4 << 20
"""Bytes that may wait for one connection."""
PUBLISH_RATE = 500.0
"""Messages per second that a node may publish for long; `PUBLISH_BURST` at once. Then it is read more slowly."""
PUBLISH_BURST = 2000.0
PUBLISH_BYTES = 2e6
"""Bytes per second, in the same way."""
PUBLISH_BYTES_BURST = 16e6


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message on its way to those who subscribe. Every room keeps the form that it sends in `forms`, so that it is
    made once however many get it."""

    channel: str
    band: str
    message: SignedBody
    size: int
    forms: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class End:
    """Why the hub ends a connection: a code for programs, a text for people."""

    code: EndCode
    reason: str


class ConnectionEnded(Exception):
    """`take` has nothing more to give: the hub ended this connection."""

    def __init__(self, end: End) -> None:
        super().__init__(end.reason)
        self.end = end


def new_allowances() -> tuple[Allowance, Allowance]:
    """Of messages and of bytes that one node publishes."""
    return Allowance(PUBLISH_RATE, PUBLISH_BURST), Allowance(PUBLISH_BYTES, PUBLISH_BYTES_BURST)


class MemberConnection:
    """One connection of a node. A room opens it with `HubBands.open`, sends what `take` gives, and closes it.

    What goes out are Deliveries, and whatever the room itself `put`s (answers), in the order in which they came.
    """

    def __init__(self, node_id: NodeId, peer: str | None, on_change: Callable[[], None] | None) -> None:
        self.node_id = node_id
        self.peer = peer
        self.on_change = on_change
        self.opened_at = int(time.time() * 1000)
        self.wanted: set[Topic] = set()
        self.active: set[Topic] = set()
        self.end: End | None = None
        self.alone = False
        self.queued_bytes = 0
        self.on_queued: Callable[[int], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self._queue: deque[tuple[Any, int]] = deque()
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self.allowances = new_allowances()

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, item: Any, size: int) -> None:
        """Queue something of the room's own, or a Delivery. A full queue ends the connection."""
        if self.end is not None:
            return
        if len(self._queue) >= MAX_QUEUED or self.queued_bytes + size > MAX_QUEUED_BYTES:
            self.finish(End("slow_reader", f"{len(self._queue)} messages were waiting to be read"))
            return
        self._queue.append((item, size))
        self._account(size)
        self._wake.set()

    async def take(self, most_bytes: int = 1 << 18, most: int = 200) -> list[Any]:
        """What waits to be sent: at least one item, in order, about `most_bytes` together. Raises ConnectionEnded."""
        while not self._queue:
            if self.end is not None:
                raise ConnectionEnded(self.end)
            self._wake.clear()
            await self._wake.wait()
        if self.end is not None:
            raise ConnectionEnded(self.end)
        found: list[Any] = []
        total = 0
        while self._queue and len(found) < most and (not found or total + self._queue[0][1] <= most_bytes):
            item, size = self._queue.popleft()
            found.append(item)
            total += size
        self._account(-total)
        return found

    async def throttle(self, messages: int, size: int) -> None:
        """Rooms call this for each frame that they read, before they look into it: waits when the node has used up what
        it may publish."""
        now = time.monotonic()
        wait = max(self.allowances[0].take(messages, now), self.allowances[1].take(size, now))
        if wait > 0:
            await asyncio.sleep(wait)

    def finish(self, end: End) -> None:
        """End it, for the first reason that is given. What waits is dropped."""
        if self.end is None:
            self.end = end
            self._drop(lambda _: True)
            self._ended.set()
            self._wake.set()
            if self.on_end is not None:
                self.on_end()

    async def wait_end(self) -> End:
        """Waits until the hub ends this connection, and says why. A room that is stuck in sending learns it here."""
        await self._ended.wait()
        assert self.end is not None
        return self.end

    def drop(self, topics: Iterable[Topic]) -> None:
        """Take messages of these topics out of the queue: they may not be read any more."""
        gone = frozenset(topics)
        self._drop(lambda item: isinstance(item, Delivery) and (item.channel, item.band) in gone)

    def _drop(self, goes: Callable[[Any], bool]) -> None:
        kept = deque(entry for entry in self._queue if not goes(entry[0]))
        self._account(sum(size for _, size in kept) - self.queued_bytes)
        self._queue = kept

    def _account(self, change: int) -> None:
        self.queued_bytes += change
        if self.on_queued is not None:
            self.on_queued(change)
