"""Tells waiting callers in this process that something changed. Published after the commit, never before."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Hashable, Iterable
from types import TracebackType


class Subscription:
    """Wakes when one of its topics is published. Use as a context manager, opened before the first look."""

    def __init__(self, events: Events, topics: Iterable[Hashable], flag: asyncio.Event | None = None) -> None:
        self._events = events
        self._topics = tuple(topics)
        self._flag = flag or asyncio.Event()

    def __enter__(self) -> Subscription:
        for topic in self._topics:
            self._events.waiters[topic].add(self._flag)
        if self._events.closed:
            self._flag.set()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for topic in self._topics:
            flags = self._events.waiters[topic]
            flags.discard(self._flag)
            if not flags:
                del self._events.waiters[topic]

    async def wait(self, seconds: float) -> bool:
        """Whether anything was published since the last call, waiting at most so long; not at all when closed."""
        try:
            async with asyncio.timeout(max(seconds, 0)):
                await self._flag.wait()
        except TimeoutError:
            return False
        if self._events.closed:
            return False
        self._flag.clear()
        return True


class Events:
    """Topics are any hashable values; nothing is kept for topics that nobody waits for."""

    def __init__(self) -> None:
        self.closed = False
        self.waiters: defaultdict[Hashable, set[asyncio.Event]] = defaultdict(set)

    def subscribe(self, topics: Iterable[Hashable], flag: asyncio.Event | None = None) -> Subscription:
        """A subscription, not yet listening. `flag`: what it sets, for who waits for something else as well."""
        return Subscription(self, topics, flag)

    def close(self) -> None:
        """Wake everybody for good: the process is about to end, and nobody should wait for it."""
        self.closed = True
        for flags in self.waiters.values():
            for flag in flags:
                flag.set()

    def publish(self, topic: Hashable) -> None:
        """Wake whoever waits for `topic`."""
        for flag in self.waiters.get(topic, ()):
            flag.set()
