"""Large files by the chunks of their manifest: each is brought here on its own, verified, several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

from kachery_lab.core.hashing import Chunk
from kachery_lab.core.ids import ChunkOf, FileKey, Sha1
from kachery_lab.core.manifests import MAX_MANIFEST_BYTES, Manifest, parse_manifest
from kachery_lab.errors import ContentMismatch, Gone, InvalidInput, KacheryLabError, NotFound
from kachery_lab.services.blobs import BlobService
from kachery_lab.services.progress import Progress

CHUNKS_AT_ONCE = 5

Bring = Callable[[FileKey, Progress | None], Awaitable[None]]
"""Brings one file here, verified and durable; its bytes are told to the progress."""


async def size_here(blobs: BlobService, sha1: Sha1) -> int | None:
    """Size of a file that is here and may be served, None for any other."""
    try:
        return await blobs.stat(sha1)
    except (NotFound, Gone):
        return None


async def read_manifest(blobs: BlobService, manifest_sha1: Sha1, sha1: Sha1) -> Manifest:
    """The manifest of a file, out of a blob that is here.

    Raises NotFound, Gone, ContentMismatch (it is no manifest, or that of another file), Unavailable.
    """
    content = await blobs.open(manifest_sha1)
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
    return manifest


async def joined(blobs: BlobService, manifest: Manifest) -> AsyncIterator[bytes]:
    """The bytes of a file whose chunks are here. Raises NotFound, Gone, Unavailable."""
    for chunk in manifest.chunks:
        content = await blobs.open(Sha1(chunk.sha1))
        try:
            async for piece in content.read(0, content.size):
                yield piece
        finally:
            content.close()


async def bring_chunks(
    blobs: BlobService, sha1: Sha1, manifest_sha1: Sha1, bring: Bring, progress: Progress
) -> Manifest:
    """Bring what is missing of a file's manifest and chunks; what came before a failure stays. Raises what `bring` and
    `read_manifest` raise."""
    if await size_here(blobs, manifest_sha1) is None:
        await bring(FileKey(manifest_sha1), None)
    manifest = await read_manifest(blobs, manifest_sha1, sha1)
    progress.start(manifest.size)
    waiting = iter(manifest.chunks)
    try:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(CHUNKS_AT_ONCE, len(manifest.chunks))):
                tasks.create_task(_bring_each(blobs, sha1, waiting, bring, progress))
    except* KacheryLabError as group:
        raise group.exceptions[0] from None
    return manifest


async def _bring_each(
    blobs: BlobService, sha1: Sha1, waiting: Iterator[Chunk], bring: Bring, progress: Progress
) -> None:
    for chunk in waiting:
        if await size_here(blobs, Sha1(chunk.sha1)) is not None:
            progress.add(chunk.end - chunk.start)
        else:
            await bring(FileKey(Sha1(chunk.sha1), None, ChunkOf(FileKey(sha1), chunk.start, chunk.end)), progress)
