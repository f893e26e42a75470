"""Files as 2021 names them: by a file key, which may say that a file is a chunk of another."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kachery_lab.blobs.files import OpenFile
from kachery_lab.blobs.layout import StorageLayout
from kachery_lab.core.ids import ChunkOf, FileKey, Sha1
from kachery_lab.errors import ContentMismatch, Gone, NotFound
from kachery_lab.services.blobs import BlobService, Claim
from kachery_lab.services.content import Content
from kachery_lab.services.large_files import joined, read_manifest
from kachery_lab.services.links import LinkService
from kachery_lab.services.principals import Principal

_PIECE = 1 << 20


class FileService:
    """Finds files that are here. `advertised` is the storage directory as clients see it."""

    def __init__(self, blobs: BlobService, links: LinkService, advertised: Path) -> None:
        self._blobs = blobs
        self._links = links
        self._advertised = StorageLayout(advertised)

    async def locate(self, key: FileKey, principal: Principal) -> str:
        """The path at which a client opens the verified file. A chunk of a file that is here is cut out and stored; a
        file whose manifest and chunks are here is put together and stored.

        Raises NotFound, Quarantined, LinkChanged, ContentMismatch (the chunk is not what its key says), Unavailable.
        """
        try:
            content = await self._blobs.open(key.sha1)
        except (NotFound, Gone):
            if key.chunk_of is not None:
                await self._cut(key, key.chunk_of, principal)
            elif key.manifest_sha1 is None or not await self._assemble(key.sha1, key.manifest_sha1, principal):
                raise
            return self._advertised.blob(key.sha1)
        content.close()
        # A link's bytes lie where its record says; a stored file at its own place.
        stored = await self._blobs.store_on_volume.stat(key.sha1)
        record = None if stored is not None else await self._links.record(key.sha1)
        return record.path if record is not None else self._advertised.blob(key.sha1)

    async def open(self, key: FileKey) -> tuple[Content, int, int]:
        """(Verified content, first byte, end) of a file, or of the file that it is a verified chunk of."""
        try:
            content = await self._blobs.open(key.sha1)
        except (NotFound, Gone):
            if key.chunk_of is None:
                raise
            return await self._open_chunk(key, key.chunk_of)
        return content, 0, content.size

    async def _open_chunk(self, key: FileKey, chunk: ChunkOf) -> tuple[Content, int, int]:
        parent = await self._blobs.open(chunk.file_key.sha1)
        try:
            if chunk.end_byte > parent.size:
                raise NotFound(f"the file {chunk.file_key.sha1} ends at {parent.size}, before the chunk does")
            await self.verify_range(parent, chunk.start_byte, chunk.end_byte, key.sha1)
        except BaseException:
            parent.close()
            raise
        return parent, chunk.start_byte, chunk.end_byte

    async def verify_range(self, content: Content, start: int, end: int, sha1: Sha1) -> None:
        """Raises ContentMismatch unless bytes `start` to `end` have this SHA-1, Unavailable."""
        disk = self._blobs.store_on_volume.disk
        if await disk.run_long(_sha1, content.data, content.file, start, end) != sha1:
            raise ContentMismatch(f"bytes {start} to {end} of the file do not have the SHA-1 {sha1}")

    async def _cut(self, key: FileKey, chunk: ChunkOf, principal: Principal) -> None:
        parent, _, _ = await self._open_chunk(key, chunk)
        try:
            await self.store_chunk(key, chunk, parent, principal)
        finally:
            parent.close()

    async def store_chunk(self, key: FileKey, chunk: ChunkOf, parent: Content, principal: Principal) -> None:
        """Store a verified range of an open file as a file of its own; it comes from where the whole came from."""
        claim = Claim(sha1=key.sha1, size=chunk.end_byte - chunk.start_byte)
        await self._blobs.inherit_origins(key.sha1, [chunk.file_key.sha1])
        await self._blobs.store(parent.read(chunk.start_byte, chunk.end_byte), claim, principal)

    async def _assemble(self, sha1: Sha1, manifest_sha1: Sha1, principal: Principal) -> bool:
        """Put a file together; False when its manifest or a chunk is not here. Raises ContentMismatch."""
        try:
            manifest = await read_manifest(self._blobs, manifest_sha1, sha1)
        except (NotFound, Gone):
            return False
        for chunk in manifest.chunks:
            if await self._blobs.store_on_volume.stat(Sha1(chunk.sha1)) is None:
                return False
        await self._blobs.inherit_origins(sha1, [chunk.sha1 for chunk in manifest.chunks])
        try:
            await self._blobs.store(joined(self._blobs, manifest), Claim(sha1=sha1, size=manifest.size), principal)
        except (NotFound, Gone):
            return False
        return True


def _sha1(data: bytes | None, file: OpenFile | None, start: int, end: int) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    if data is not None:
        digest.update(data[start:end])
    elif file is not None:
        for offset in range(start, end, _PIECE):
            digest.update(file.read(offset, min(_PIECE, end - offset)))
    return digest.hexdigest()
