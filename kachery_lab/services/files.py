"""Files as 2021 names them: by a file key, which may say that a file is a chunk of another."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from kachery_lab.blobs.files import OpenFile
from kachery_lab.blobs.layout import StorageLayout
from kachery_lab.core.ids import ChunkOf, FileKey, Sha1
from kachery_lab.core.manifests import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from kachery_lab.errors import ContentMismatch, Gone, InvalidInput, NotFound
from kachery_lab.services.blobs import BlobService, Claim, Content
from kachery_lab.services.links import LinkService
from kachery_lab.services.origins import LOCAL
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
            disk = self._blobs.store_on_volume.disk
            if await disk.run_long(_sha1, parent.data, parent.file, chunk.start_byte, chunk.end_byte) != key.sha1:
                raise ContentMismatch(f"these bytes of {chunk.file_key.sha1} do not have the SHA-1 {key.sha1}")
        except BaseException:
            parent.close()
            raise
        return parent, chunk.start_byte, chunk.end_byte

    async def _cut(self, key: FileKey, chunk: ChunkOf, principal: Principal) -> None:
        parent, start, end = await self._open_chunk(key, chunk)
        try:
            claim = Claim(sha1=key.sha1, size=end - start)
            await self._inherit(key.sha1, [chunk.file_key.sha1])
            await self._blobs.store(parent.read(start, end), claim, principal)
        finally:
            parent.close()

    async def _assemble(self, sha1: Sha1, manifest_sha1: Sha1, principal: Principal) -> bool:
        """Put a file together; False when its manifest or a chunk is not here. Raises ContentMismatch."""
        try:
            content = await self._blobs.open(manifest_sha1)
        except (NotFound, Gone):
            return False
        try:
            if content.size > MAX_MANIFEST_BYTES:
                raise ContentMismatch(f"{manifest_sha1} is no manifest: it has {content.size} bytes")
            manifest = parse_manifest(b"".join([piece async for piece in content.read(0, content.size)]))
        except InvalidInput as error:
            raise ContentMismatch(f"{manifest_sha1} is no manifest: {error.message}") from error
        finally:
            content.close()
        if manifest.sha1 != sha1:
            raise ContentMismatch(f"{manifest_sha1} is the manifest of another file")
        for chunk in manifest.chunks:
            if await self._blobs.store_on_volume.stat(Sha1(chunk.sha1)) is None:
                return False
        await self._inherit(sha1, [chunk.sha1 for chunk in manifest.chunks])
        try:
            await self._blobs.store(self._joined(manifest), Claim(sha1=sha1, size=manifest.size), principal)
        except (NotFound, Gone):
            return False
        return True

    async def _joined(self, manifest: Manifest) -> AsyncIterator[bytes]:
        for chunk in manifest.chunks:
            content = await self._blobs.open(Sha1(chunk.sha1))
            try:
                async for piece in content.read(0, content.size):
                    yield piece
            finally:
                content.close()

    async def _inherit(self, sha1: Sha1, parts: Sequence[str]) -> None:
        """What is made of parts that came through channels comes from there too; noted before it is stored."""
        origins = self._blobs.origins
        if origins is None:
            return
        for part in parts:
            found = await origins.of(part)
            if LOCAL not in found:
                for origin in sorted(found):
                    await origins.record(sha1, origin)


def _sha1(data: bytes | None, file: OpenFile | None, start: int, end: int) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    if data is not None:
        digest.update(data[start:end])
    elif file is not None:
        for offset in range(start, end, _PIECE):
            digest.update(file.read(offset, min(_PIECE, end - offset)))
    return digest.hexdigest()
