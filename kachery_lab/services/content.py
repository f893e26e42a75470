"""Verified bytes on their way to whoever asked for them."""

from __future__ import annotations

from collections.abc import AsyncIterator

from kachery_lab.blobs.files import OpenFile
from kachery_lab.blobs.local import LocalBlobStore
from kachery_lab.errors import Unavailable

READ_PIECE = 2 << 20
"""Bytes that are read from a file at once."""


class Content:
    """Verified bytes that may be served: in memory when small, else an open file whose fingerprint is trusted."""

    __slots__ = ("_disk", "data", "file", "size")

    def __init__(self, store: LocalBlobStore, data: bytes | None, file: OpenFile | None) -> None:
        self._disk = store.disk
        self.data = data
        self.file = file
        self.size = len(data) if data is not None else file.fingerprint.size if file is not None else 0

    async def read(self, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes `start` to `end` (exclusive), which must lie inside. Raises Unavailable when the file fails or changes
        while it is read; the last piece is held back until it is known that it did not."""
        if self.data is not None:
            yield self.data[start:end]
            return
        assert self.file is not None
        while start < end:
            length = min(READ_PIECE, end - start)
            yield await self._disk.run(self._piece, start, length, start + length == end)
            start += length

    def _piece(self, offset: int, length: int, last: bool) -> bytes:
        assert self.file is not None
        data = self.file.read(offset, length)
        if last and not self.file.unchanged():
            raise Unavailable("the file changed while it was read")
        return data

    def close(self) -> None:
        """Close the file, if it is one. Again is no error."""
        if self.file is not None:
            self.file.close()
