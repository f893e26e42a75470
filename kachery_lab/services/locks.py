"""Locks by key, such as one for each blob's name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Counted:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class KeyLocks(Generic[K]):
    """One lock for each key. A lock exists only while somebody holds it or waits for it, so memory is bounded by what
    is under way."""

    def __init__(self) -> None:
        self._locks: dict[K, _Counted] = {}

    def __len__(self) -> int:
        return len(self._locks)

    @asynccontextmanager
    async def hold(self, key: K) -> AsyncIterator[None]:
        """One block of a key at a time, in the order in which they came; blocks of other keys do not wait."""
        counted = self._locks.get(key)
        if counted is None:
            counted = self._locks[key] = _Counted()
        # Counted, not weakly referred to: the traceback of an error would keep the lock for a while.
        counted.users += 1
        try:
            async with counted.lock:
                yield
        finally:
            counted.users -= 1
            if not counted.users:
                del self._locks[key]
