"""What a blob store promises. Six verbs; hash and size are checked above it, once, in `receive`."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from kachery_lab.core.ids import Sha1

PIECE = 1 << 20
"""Bytes moved at a time; smaller pieces cost more in thread hops than they save in memory."""


@dataclass(frozen=True, slots=True)
class BlobStat:
    """What is known of a stored blob without reading it. `size` in bytes."""

    sha1: Sha1
    size: int


class BlobStore(Protocol):
    """Immutable bytes by SHA-1. Every verb may raise Unavailable or StorageFull; nothing else but what it says."""

    async def put(self, sha1: Sha1, stream: AsyncIterable[bytes]) -> bool:
        """Store trusted bytes, durable on return. True when new; storing again what is there is no error.

        Raises Collision when other bytes are stored under this name. An exception of `stream` leaves nothing behind.
        """

    async def stat(self, sha1: Sha1) -> BlobStat | None:
        """None when absent, which is not an error."""

    def read(self, sha1: Sha1, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `offset`, at most `length`; a range past the end is cut off. NotFound before the first."""

    async def list(self, after: str = "", limit: int = 1000) -> list[BlobStat]:
        """At most `limit` blobs in ascending order of name, the first greater than `after`."""

    async def delete(self, sha1: Sha1) -> bool:
        """Take a blob away, durably. False when it was absent, which is not an error."""

    async def close(self) -> None:
        """Free everything held. Calling it again does nothing."""
