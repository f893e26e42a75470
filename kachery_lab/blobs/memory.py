"""Blobs in a dictionary: the test double that every other store is compared with."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator

from kachery_lab.blobs.base import BlobStat
from kachery_lab.core.ids import Sha1
from kachery_lab.errors import Collision, NotFound


class MemoryBlobStore:
    """A BlobStore that forgets everything when it is dropped."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    async def put(self, sha1: Sha1, stream: AsyncIterable[bytes]) -> bool:
        data = b"".join([piece async for piece in stream])
        new = sha1 not in self._blobs
        if self._blobs.setdefault(sha1, data) != data:
            raise Collision(f"other bytes with the SHA-1 {sha1} are stored already")
        return new

    async def stat(self, sha1: Sha1) -> BlobStat | None:
        data = self._blobs.get(sha1)
        return None if data is None else BlobStat(sha1, len(data))

    async def read(self, sha1: Sha1, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        data = self._blobs.get(sha1)
        if data is None:
            raise NotFound(f"no blob {sha1}")
        part = data[offset:] if length is None else data[offset : offset + length]
        if part:
            yield part

    async def list(self, after: str = "", limit: int = 1000) -> list[BlobStat]:
        names = sorted(name for name in self._blobs if name > after)[:limit]
        return [BlobStat(Sha1(name), len(self._blobs[name])) for name in names]

    async def delete(self, sha1: Sha1) -> bool:
        return self._blobs.pop(sha1, None) is not None

    async def close(self) -> None:
        self._blobs.clear()
