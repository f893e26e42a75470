"""Storing, reading and deleting blobs: the store on the volume and its index in the database."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, delete, select

from kachery_lab.blobs.durable import present
from kachery_lab.blobs.files import Fingerprint, OpenFile
from kachery_lab.blobs.local import LocalBlobStore
from kachery_lab.blobs.receive import Claim as Claim
from kachery_lab.blobs.receive import Received, hash_file, receive, store_bytes
from kachery_lab.core.hashing import Chunk, sha1_of
from kachery_lab.core.ids import Sha1
from kachery_lab.core.manifests import manifest_bytes
from kachery_lab.db.engine import Database
from kachery_lab.db.models import blobs
from kachery_lab.errors import LinkChanged, NotFound, Quarantined, StorageFull, Unavailable
from kachery_lab.services import blob_index
from kachery_lab.services.content import Content
from kachery_lab.services.links import LinkService
from kachery_lab.services.locks import KeyLocks
from kachery_lab.services.origins import LOCAL, OriginService
from kachery_lab.services.principals import Principal
from kachery_lab.services.shares import Shares

if TYPE_CHECKING:
    from kachery_lab.services.resources import ResourceService

FOUND = Principal("operator", "found on the volume")
SMALL = 1 << 20
"""Blobs up to this many bytes are hashed on every read."""
MAX_UPLOADS = 200
"""Stores that one caller may have under way, where no setting says otherwise."""
LOOK_BYTES = 64 << 20
"""How much arrives between two looks at what is free."""
_KNOWN = 100_000


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """Answer to a store. `new` is False when the blob was there already."""

    sha1: Sha1
    size: int
    manifest_sha1: Sha1 | None
    new: bool


def _does_not_fit(size: int) -> StorageFull:
    return StorageFull(f"{size} bytes do not fit on the storage", hint="Free space on the volume")


class BlobService:
    """All use of blobs goes through here."""

    def __init__(
        self,
        store: LocalBlobStore,
        database: Database,
        links: LinkService,
        *,
        min_free: int = 0,
        max_uploads: int = MAX_UPLOADS,
    ) -> None:
        self.store_on_volume = store
        self._database = database
        self._links = links
        self._min_free = min_free
        self._uploads = Shares(max_uploads, "uploads", "KACHERY_LAB_MAX_UPLOADS")
        self.origins: OriginService | None = None
        self.resources: ResourceService | None = None
        # What is known to be indexed, with the fingerprint of the last verification: saves a query for each read.
        self._known: OrderedDict[str, Fingerprint | None] = OrderedDict()
        self._locks: KeyLocks[str] = KeyLocks()  # one commit or deletion of a name at a time
        # Counts deletions: when it has not moved, what was found on the volume cannot have been deleted meanwhile.
        self._deletions = 0

    # -- storing -------------------------------------------------------------------------------------------------

    async def store(
        self,
        stream: AsyncIterable[bytes | bytearray],
        claim: Claim,
        principal: Principal,
        also: Callable[[Connection, int], None] | None = None,
        before: Callable[[], Awaitable[None]] | None = None,
    ) -> StoredBlob:
        """Store a stream, durable on return, its manifest too; `also` gets the size in the commit of the index row, and
        `before` is awaited before the blob gets its name. Raises what `receive` and `also` raise, StorageFull, and
        TooManyRequests for a caller with too many under way; nothing is left when it is not `also`."""
        room = None
        if claim.size is not None and (claim.size > SMALL or self._min_free):
            room = await self._room()
            if claim.size > room:
                raise _does_not_fit(claim.size)
        with self._uploads.take(principal.share, claim.size or 0, room):
            since = self._deletions
            guarded = self._leaving_room(stream) if self._min_free else stream
            received = await receive(self.store_on_volume, guarded, claim, before)
        return await self._index(received, principal, since, also)

    async def _room(self) -> int:
        return await self.store_on_volume.disk.run(self.store_on_volume.free_bytes) - self._min_free

    async def _leaving_room(self, stream: AsyncIterable[bytes | bytearray]) -> AsyncIterator[bytes | bytearray]:
        """What comes without a size, or beside others, does not take what is to stay free. Raises StorageFull."""
        unseen = 0
        async for piece in stream:
            unseen += len(piece)
            if unseen >= LOOK_BYTES:
                if await self._room() < unseen:
                    raise _does_not_fit(unseen)
                unseen = 0
            yield piece

    async def store_bytes(self, data: bytes, principal: Principal) -> StoredBlob:
        """Store bytes that the server itself made."""
        since = self._deletions
        received = await self.store_on_volume.disk.run(store_bytes, self.store_on_volume, data)
        return await self._index(received, principal, since)

    async def store_open_file(self, file: OpenFile, principal: Principal) -> StoredBlob:
        """Store a copy of a file that the server can read itself."""
        content = Content(self.store_on_volume, None, file)
        return await self.store(content.read(0, content.size), Claim(size=content.size), principal)

    async def store_manifest(self, size: int, sha1: Sha1, chunks: list[Chunk], principal: Principal) -> Sha1 | None:
        """Store the manifest of a content with these chunks; None when there is no more than one."""
        if not chunks:
            return None
        text = manifest_bytes(size, sha1, chunks)
        # It tells about the file, so it may go where the file may.
        await self.inherit_origins(Sha1(hashlib.sha1(text, usedforsecurity=False).hexdigest()), [sha1])
        return (await self.store_bytes(text, principal)).sha1

    async def inherit_origins(self, sha1: Sha1, parts: Sequence[str]) -> None:
        """Note, before it is stored, that what is made of these parts comes from the channels that they came through.
        What is here already also keeps what is known of it."""
        if self.origins is None:
            return
        for part in parts:
            found = await self.origins.of(part)
            if LOCAL not in found:
                here = await self.store_on_volume.stat(sha1) is not None
                for origin in sorted(found):
                    await self.origins.arriving(sha1, origin, here=here)

    async def _index(
        self,
        received: Received,
        principal: Principal,
        since: int,
        also: Callable[[Connection, int], None] | None = None,
    ) -> StoredBlob:
        if not received.new and self.origins is not None and principal.kind != "operator":
            await self.origins.stored_here(received.sha1)
        manifest = await self.store_manifest(received.size, received.sha1, received.chunks, principal)
        row = blob_index.row_of(received, manifest, principal)
        if not await self._write_row(row, received.fingerprint, since, also):
            raise Unavailable(f"{received.sha1} was deleted while it was stored", retry_after=1)
        return StoredBlob(received.sha1, received.size, manifest, received.new)

    async def _write_row(
        self,
        row: dict[str, Any],
        fingerprint: Fingerprint,
        since: int,
        also: Callable[[Connection, int], None] | None = None,
    ) -> bool:
        """Index a file; False when it was deleted after `since`, a value of the deletion counter."""
        sha1: str = row["sha1"]

        def commit(conn: Connection) -> None:
            blob_index.upsert(conn, row)
            if also is not None:
                also(conn, row["size"])

        async with self._locks.hold(sha1):
            if self._deletions != since:
                path = self.store_on_volume.layout.blob(sha1)
                if not await self.store_on_volume.disk.run(present, path):
                    return False
            await self._database.write(commit, single=also is None)
        self._remember(sha1, fingerprint)
        return True

    # -- reading -------------------------------------------------------------------------------------------------

    async def open(self, sha1: Sha1) -> Content:
        """Verified content of a blob or a linked file; the caller closes it.

        Raises NotFound, Quarantined (the stored bytes are wrong), LinkChanged (the linked file is another one),
        Unavailable. A file that nobody indexed is verified and indexed now.
        """
        since = self._deletions
        try:
            data, file = await self.store_on_volume.disk.run_short(self._load, sha1)
        except NotFound:
            return await self._open_elsewhere(sha1)
        if data is not None:
            if sha1 not in self._known:
                await self._index_found(sha1, data, since)
            return Content(self.store_on_volume, data, None)
        assert file is not None
        try:
            await self._trust(sha1, file, since)
        except BaseException:
            file.close()
            raise
        return Content(self.store_on_volume, None, file)

    def _load(self, sha1: Sha1) -> tuple[bytes | None, OpenFile | None]:
        data, file = self.store_on_volume.load_small(sha1, SMALL)
        if data is not None and sha1_of(data) != sha1:
            self._condemn(sha1)
        return data, file

    def _condemn(self, sha1: Sha1) -> None:
        """Blocking: move a wrong blob aside. Raises Quarantined."""
        self.store_on_volume.set_aside(sha1)
        self._known.pop(sha1, None)
        raise _quarantined(sha1)

    async def _trust(self, sha1: Sha1, file: OpenFile, since: int) -> None:
        """Make sure that a large file is the one that was verified, by its fingerprint or by hashing it now."""
        if sha1 not in self._known:
            row = await self._database.read(lambda conn: conn.execute(blob_index.one(sha1)).one_or_none())
            if row is not None:
                self._remember(sha1, None if row.inode is None else blob_index.fingerprint(row))
        if self._known.get(sha1) == file.fingerprint:
            return
        digests = await self.store_on_volume.disk.run_long(hash_file, file)
        if digests.sha1 != sha1:
            if not await self.store_on_volume.disk.run(file.unchanged):
                raise Unavailable(f"{sha1} changed while it was verified")
            await self.store_on_volume.disk.run_long(self._condemn, sha1)
        manifest = await self._manifest_of(digests)
        await self._write_row(blob_index.row_of(digests, manifest, FOUND), file.fingerprint, since)

    async def _manifest_of(self, found: Received) -> Sha1 | None:
        """The manifest of a large file that is on the volume already, if it is; one that was deleted is not made."""
        if not found.chunks:
            return None
        text = manifest_bytes(found.size, found.sha1, found.chunks)
        sha1 = Sha1(hashlib.sha1(text, usedforsecurity=False).hexdigest())
        return sha1 if await self.store_on_volume.stat(sha1) is not None else None

    async def _index_found(self, sha1: Sha1, data: bytes, since: int) -> None:
        """A small blob that was just verified: index it unless it is."""
        row = await self._database.read(lambda conn: conn.execute(blob_index.one(sha1)).one_or_none())
        if row is not None:
            self._remember(sha1, None if row.inode is None else blob_index.fingerprint(row))
            return
        file = await self.store_on_volume.disk.run(self.store_on_volume.open, sha1)
        try:
            sha256 = hashlib.sha256(data).hexdigest()
            found = Received(sha1, sha256, len(data), [], False, file.fingerprint)
            await self._write_row(blob_index.row_of(found, None, FOUND), file.fingerprint, since)
        finally:
            file.close()

    async def _open_elsewhere(self, sha1: Sha1) -> Content:
        """No such file: a linked one, a quarantined one, or none."""
        file = await self._links.open(sha1, SMALL)
        if file is not None:
            return await self._linked_content(sha1, file)
        if self.resources is not None and (file := await self.resources.open(sha1)) is not None:
            return await self._linked_content(sha1, file)
        if await self.store_on_volume.disk.run(self.store_on_volume.quarantined, sha1):
            raise _quarantined(sha1)
        await self.store_on_volume.disk.run(self.store_on_volume.check_volume)
        raise NotFound(f"there is no file with the SHA-1 {sha1} here")

    async def _linked_content(self, sha1: Sha1, file: OpenFile) -> Content:
        size = file.fingerprint.size
        if size > SMALL:
            return Content(self.store_on_volume, None, file)
        try:
            data = await self.store_on_volume.disk.run(file.read, 0, size)
        finally:
            file.close()
        # It was verified a moment ago; a file outside the store may change at any time, so what is served is checked.
        if hashlib.sha1(data, usedforsecurity=False).hexdigest() != sha1:
            raise LinkChanged("the linked file changed while it was read", hint="Link or store it again")
        return Content(self.store_on_volume, data, None)

    def is_known(self, sha1: Sha1) -> bool:
        """Whether a blob was stored or verified by this process and not deleted since, which costs no look at the
        volume. False says nothing."""
        return sha1 in self._known

    async def stat(self, sha1: Sha1) -> int:
        """Size in bytes of what `open` would give, by the same rules and errors."""
        content = await self.open(sha1)
        content.close()
        return content.size

    async def info(self, sha1: Sha1) -> blob_index.BlobInfo | None:
        """The index row, or None."""
        row = await self._database.read(lambda conn: conn.execute(blob_index.one(sha1)).one_or_none())
        return None if row is None else blob_index.info_of(row)

    async def list(self, after: str, limit: int) -> list[blob_index.BlobInfo]:
        """Index rows in order of SHA-1, the first greater than `after`."""
        statement = select(blobs).where(blobs.c.sha1 > after).order_by(blobs.c.sha1).limit(limit)
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return [blob_index.info_of(row) for row in rows]

    # -- keeping the index true ----------------------------------------------------------------------------------

    async def verify(self, sha1: Sha1) -> None:
        """Hash a stored blob whatever is known of it, and index what was found. Raises NotFound, Quarantined."""
        since = self._deletions
        file = await self.store_on_volume.disk.run(self.store_on_volume.open, sha1)
        try:
            self._known[sha1] = None
            await self._trust(sha1, file, since)
        finally:
            file.close()

    async def rows_of_shard(self, shard: str) -> dict[str, int]:
        """Size by SHA-1 of the indexed blobs whose names begin with two hex digits."""
        statement = select(blobs.c.sha1, blobs.c.size).where(blobs.c.sha1 >= shard, blobs.c.sha1 < f"{shard}g")
        rows = await self._database.read(lambda conn: conn.execute(statement).all())
        return {row.sha1: row.size for row in rows}

    async def forget_rows(self, names: Sequence[str], link_names: Sequence[str]) -> None:
        """Drop the rows of blobs and links that the volume no longer has."""

        def forget(conn: Connection) -> None:
            for name in names:
                conn.execute(delete(blobs).where(blobs.c.sha1 == name))
            for name in link_names:
                self._links.forget(conn, name)

        await self._database.write(forget)
        for name in names:
            self._known.pop(name, None)

    # -- deleting ------------------------------------------------------------------------------------------------

    async def delete(self, sha1: Sha1) -> None:
        """Take a blob, or a link, away: the row first, then the file into the trash, durably. Raises NotFound,
        Unavailable."""
        async with self._locks.hold(sha1):

            def forget(conn: Connection) -> int:
                rows = conn.execute(delete(blobs).where(blobs.c.sha1 == sha1)).rowcount
                return rows + self._links.forget(conn, sha1)

            # On an unmounted volume there is nothing to throw away: the blob would be back with the volume.
            await self.store_on_volume.disk.run(self.store_on_volume.check_volume)
            rows = await self._database.write(forget)
            self._deletions += 1
            self._known.pop(sha1, None)
            found = await asyncio.shield(self.store_on_volume.disk.run_long(self.store_on_volume.throw_away, sha1))
        if not rows and not found:
            raise NotFound(f"there is no file with the SHA-1 {sha1} here")

    # -- helpers -------------------------------------------------------------------------------------------------

    def _remember(self, sha1: str, fingerprint: Fingerprint | None) -> None:
        self._known[sha1] = fingerprint
        self._known.move_to_end(sha1)
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)


def _quarantined(sha1: str) -> Quarantined:
    return Quarantined(
        f"the stored bytes of {sha1} were damaged and are set aside", hint="Store the right file again; that heals it"
    )
