"""The one way in: bytes are hashed and counted while they are written, compared with the claim, then made durable."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from kachery_lab.blobs.base import PIECE, BlobStore
from kachery_lab.blobs.files import Fingerprint, OpenFile
from kachery_lab.blobs.local import Draft, LocalBlobStore
from kachery_lab.core.hashing import CHUNK_SIZE, Chunk, ChunkHasher, StreamHasher, WholeHasher
from kachery_lab.core.ids import Sha1
from kachery_lab.errors import ContentMismatch, TooLarge

SHA256_LIMIT = 64 << 20
"""Above this many bytes SHA-256 is left to `verify`; a second arrival is compared byte by byte anyway."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What the sender says, or what is allowed. None: nothing said. `want_manifest`: off for what is fetched, which has
    its manifest, if any, where it came from."""

    sha1: Sha1 | None = None
    size: int | None = None
    max_size: int | None = None
    want_manifest: bool = True


@dataclass(frozen=True, slots=True)
class Received:
    """A blob that is durable. `chunks` is empty unless there is more than one."""

    sha1: Sha1
    sha256: str | None
    size: int
    chunks: list[Chunk]
    new: bool
    fingerprint: Fingerprint


def _hasher(declared: int | None, want_manifest: bool = True) -> StreamHasher:
    return StreamHasher(
        want_sha256=declared is None or declared <= SHA256_LIMIT,
        want_chunks=want_manifest and (declared is None or declared > CHUNK_SIZE),
    )


def _received(hasher: StreamHasher, new: bool, fingerprint: Fingerprint) -> Received:
    chunks = hasher.chunks()
    return Received(hasher.sha1(), hasher.sha256(), hasher.size, chunks if len(chunks) > 1 else [], new, fingerprint)


def _check(claim: Claim, sha1: str, size: int) -> None:
    if claim.size is not None and size != claim.size:
        raise ContentMismatch(f"{size} bytes arrived, {claim.size} were announced", hint="Send the whole file again")
    if claim.sha1 is not None and sha1 != claim.sha1:
        raise ContentMismatch(f"the bytes have the SHA-1 {sha1}, not {claim.sha1}", hint="Send the right bytes")


def _check_limit(claim: Claim, size: int) -> None:
    if claim.max_size is not None and size > claim.max_size:
        raise TooLarge(f"more than the allowed {claim.max_size} bytes arrived")
    # At the end it would be too late: a body without an end fills the disk.
    if claim.size is not None and size > claim.size:
        raise ContentMismatch(f"more than the {claim.size} bytes that were announced arrived")


def store_bytes(store: LocalBlobStore, data: bytes | bytearray, claim: Claim | None = None) -> Received:
    """Blocking: store a blob that is in memory already. Raises as `receive`; then nothing is left behind."""
    hasher, draft = _flushed(store, data, claim or Claim())
    new, fingerprint = draft.place(hasher.sha1())
    return _received(hasher, new, fingerprint)


def _flushed(store: LocalBlobStore, data: bytes | bytearray, claim: Claim) -> tuple[StreamHasher, Draft]:
    """Blocking: bytes that fit the claim, on the disk without a name yet. The caller places or discards the draft."""
    hasher = _hasher(len(data))
    hasher.update(data)
    _check(claim, hasher.sha1(), len(data))
    draft = store.draft()
    try:
        draft.write(data)
        draft.flush()
    except BaseException:
        draft.discard()
        raise
    return hasher, draft


async def pieces(stream: AsyncIterable[bytes | bytearray], size: int = PIECE) -> AsyncIterator[bytes | bytearray]:
    """Regroup a stream into pieces of at least `size` bytes; only the last may be shorter. Never an empty one."""
    piece = bytearray()
    async for part in stream:
        if not piece and len(part) >= size:
            yield part
            continue
        piece += part
        if len(piece) >= size:
            yield piece
            piece = bytearray()
    if piece:
        yield piece


async def receive(
    store: LocalBlobStore,
    stream: AsyncIterable[bytes | bytearray],
    claim: Claim,
    before: Callable[[], Awaitable[None]] | None = None,
) -> Received:
    """Store what arrives; `before` is awaited before it gets its name. Raises ContentMismatch when it does not fit the
    claim, TooLarge over the limit, Collision, StorageFull, Unavailable, and whatever `stream` and `before` raise; then
    nothing is left behind."""
    source = pieces(stream)
    first = await anext(source, None) or bytearray()
    if len(first) < PIECE:
        _check_limit(claim, len(first))
        if before is not None:
            return await _receive_small(store, first, claim, before)
        return await store.disk.run(store_bytes, store, first, claim)
    if before is not None:
        await before()
    return await _receive_large(store, first, source, claim)


async def _receive_small(
    store: LocalBlobStore, data: bytes | bytearray, claim: Claim, before: Callable[[], Awaitable[None]]
) -> Received:
    """`before` takes its time while the bytes are written."""
    preparing = asyncio.ensure_future(before())
    try:
        hasher, draft = await store.disk.run(_flushed, store, data, claim)
        try:
            await preparing
            new, fingerprint = await store.disk.run(draft.place, hasher.sha1())
        except BaseException:
            await asyncio.shield(store.disk.run(draft.discard))
            raise
    except BaseException:
        preparing.cancel()
        await asyncio.wait([preparing])
        preparing.cancelled() or preparing.exception()
        raise
    return _received(hasher, new, fingerprint)


async def _receive_large(
    store: LocalBlobStore, first: bytes | bytearray, source: AsyncIterator[bytes | bytearray], claim: Claim
) -> Received:
    hasher = _hasher(claim.size, claim.want_manifest)
    draft = await store.disk.run(store.draft)
    working: asyncio.Future[tuple[None, None]] | None = None
    try:
        piece: bytes | bytearray | None = first
        while piece is not None:
            _check_limit(claim, hasher.size + len(piece))
            if hasher.size > SHA256_LIMIT:
                hasher.whole.drop_sha256()
            # While these two threads work on one piece the event loop gathers the next: memory holds two.
            working = asyncio.gather(
                store.disk.run(hasher.whole.update, piece), store.disk.run(_write, draft, hasher.later, piece)
            )
            piece = await anext(source, None)
            await working
            working = None
        _check(claim, hasher.sha1(), hasher.size)
        new, fingerprint = await store.disk.run_long(draft.commit, hasher.sha1())
    finally:
        if working is not None:
            await asyncio.wait([working])
            working.cancelled() or working.exception()
        await asyncio.shield(store.disk.run(draft.discard))
    return _received(hasher, new, fingerprint)


def _write(draft: Draft, later: ChunkHasher | None, piece: bytes | bytearray) -> None:
    draft.write(piece)
    if later is not None:
        later.update(piece)


def hash_file(file: OpenFile) -> Received:
    """Blocking: what `receive` would say of a file that is on the volume already. Raises OSError."""
    size = file.fingerprint.size
    hasher = _hasher(size)
    for offset in range(0, size, PIECE):
        hasher.update(file.read(offset, min(PIECE, size - offset)))
    return _received(hasher, False, file.fingerprint)


async def put_verified(store: BlobStore, sha1: Sha1, stream: AsyncIterable[bytes]) -> bool:
    """`put` into any store, with the check above it. The bytes go through memory: for small blobs and tests."""
    data = b"".join([piece async for piece in stream])
    whole = WholeHasher(want_sha256=False)
    whole.update(data)
    _check(Claim(sha1=sha1), whole.sha1(), len(data))

    async def once() -> AsyncIterator[bytes]:
        yield data

    return await store.put(sha1, once())
