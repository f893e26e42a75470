"""Linked files: blobs whose bytes stay outside the store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, delete, select, update
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.blobs.files import Fingerprint, OpenFile, same_bytes
from kachery_lab.blobs.links import MTIME_TOLERANCE, LinkPolicy, LinkRecord, open_linked, open_named
from kachery_lab.blobs.local import LocalBlobStore, collision
from kachery_lab.blobs.receive import Received, hash_file
from kachery_lab.core.ids import Sha1
from kachery_lab.db.engine import Database
from kachery_lab.db.models import links
from kachery_lab.errors import InvalidInput, LinkChanged, NotFound
from kachery_lab.services.principals import Principal

if TYPE_CHECKING:
    from kachery_lab.services.blobs import BlobService, StoredBlob


class LinkService:
    """Link records on the volume and their index."""

    def __init__(self, store: LocalBlobStore, database: Database, policy: LinkPolicy) -> None:
        self._store = store
        self._database = database
        self._policy = policy
        store.meets_link = self._meet_copy

    def _meet_copy(self, sha1: Sha1, fd: int) -> None:
        """Blocking: a copy is about to be stored under the name of a link. Raises Collision when the linked file still
        is what was linked and has other bytes."""
        try:
            record = LinkRecord.from_bytes(_read_record(self._store.layout.link(sha1)))
            file, fits = open_linked(self._policy, record)
        except (OSError, InvalidInput, LinkChanged):
            return
        try:
            if fits and not same_bytes(fd, file) and file.sha1() == sha1:
                raise collision(sha1)
        finally:
            file.close()

    async def open_path(self, path: str) -> OpenFile:
        """A file named by a client, if it may be served. Raises InvalidInput (it is absent or no regular file),
        Forbidden naming the setting, Unavailable."""
        try:
            return await self._store.disk.run(open_named, self._policy, path)
        except NotFound:
            raise InvalidInput(f"there is no file {path} on the server's machine") from None

    async def link(self, blobs: BlobService, path: str, size: int, mtime: float, principal: Principal) -> StoredBlob:
        """Register a file in place, durable on return; `size` in bytes, `mtime` in seconds as the client read them.

        Raises InvalidInput when the file is not what the client saw, Collision when other bytes with its SHA-1 are here
        already, and what `open_path` raises. A stored copy is
        better than a link: where there is one, no link is written.
        """
        from kachery_lab.services.blobs import StoredBlob

        file = await self.open_path(path)
        try:
            record = LinkRecord(path, None, size, mtime)
            if not record.fits(file.stat):
                raise InvalidInput(
                    f"{path} has another size or modification time than the request says "
                    f"(allowed: {MTIME_TOLERANCE * 1000:g} ms)",
                    hint="Is it still being written? Try again when it is complete",
                )
            found = await self._store.disk.run_long(hash_file, file)
            if not await self._store.disk.run(file.unchanged):
                raise InvalidInput(f"{path} changed while it was hashed", hint="Try again when it is complete")
            is_stored = await self._store.disk.run_long(self._store.holds, file, found.sha1)
        finally:
            file.close()
        manifest = await blobs.store_manifest(found.size, found.sha1, found.chunks, principal)
        stored = StoredBlob(found.sha1, found.size, manifest, True)
        if is_stored:
            (await blobs.open(found.sha1)).close()
            return stored
        await self._refuse_collision(found)
        record = LinkRecord(path, manifest, size, mtime)
        await self._store.disk.run_long(self._store.write_link, found.sha1, record.to_bytes())
        row = _row(record, found, file, principal)
        await self._database.write(lambda conn: upsert(conn, row))
        return stored

    async def _refuse_collision(self, found: Received) -> None:
        """Raises Collision when a file with other bytes is linked under this name and still is what was linked."""
        statement = select(links.c.sha256).where(links.c.sha1 == found.sha1)
        known = await self._database.read(lambda conn: conn.execute(statement).scalar_one_or_none())
        if known is None or found.sha256 in (None, known):
            return
        try:
            file = await self.open(found.sha1, 0)
        except LinkChanged:
            return
        if file is not None:
            file.close()
            raise collision(found.sha1)

    async def open(self, sha1: Sha1, small: int) -> OpenFile | None:
        """The verified file of a link, or None when there is no link record (or none that can be read as one).

        Above `small` bytes it is verified by its fingerprint where that is known, else by hashing; up to `small` bytes
        the caller hashes what it reads. Raises LinkChanged.
        """
        record = await self.record(sha1)
        if record is None:
            return None
        file, fits = await self._store.disk.run(open_linked, self._policy, record)
        try:
            if not fits:
                await self._invalidate(sha1)
                raise LinkChanged(
                    "the linked file has another size or modification time now", hint="Link or store it again"
                )
            await self._trust(sha1, record, file, small)
        except BaseException:
            file.close()
            raise
        return file

    async def record(self, sha1: Sha1) -> LinkRecord | None:
        """The link record on the volume, which is what counts."""
        try:
            data = await self._store.disk.run(_read_record, self._store.layout.link(sha1))
            return LinkRecord.from_bytes(data)
        except (NotFound, InvalidInput):
            return None

    async def _trust(self, sha1: Sha1, record: LinkRecord, file: OpenFile, small: int) -> None:
        statement = select(links).where(links.c.sha1 == sha1)
        row = await self._database.read(lambda conn: conn.execute(statement).one_or_none())
        if row is not None and row.inode is not None and row.path == record.path:
            known = Fingerprint(row.size, row.mtime_ns, row.ctime_ns, row.inode)
            if known == file.fingerprint and row.device == file.stat.st_dev:
                return
        found = await self._store.disk.run_long(hash_file, file)
        if found.sha1 != sha1:
            await self._invalidate(sha1)
            # Clients that mount the directory compare size and time only: take the record out of their sight.
            await self._store.disk.run_long(_set_aside_link, self._store, sha1)
            raise LinkChanged("the linked file has other content now", hint="Link or store it again")
        new = _row(record, found, file, Principal("operator", "found on the volume"))
        await self._database.write(lambda conn: upsert(conn, new))

    async def _invalidate(self, sha1: Sha1) -> None:
        statement = update(links).where(links.c.sha1 == sha1).values(inode=None, mtime_ns=None, ctime_ns=None)
        await self._database.write(lambda conn: conn.execute(statement).rowcount)

    async def rows_of_shard(self, shard: str) -> set[str]:
        """SHA-1 of the indexed links that begin with two hex digits."""
        statement = select(links.c.sha1).where(links.c.sha1 >= shard, links.c.sha1 < f"{shard}g")
        return set(await self._database.read(lambda conn: conn.execute(statement).scalars().all()))

    @staticmethod
    def forget(conn: Connection, sha1: str) -> int:
        """Take a link out of the index; how many rows went."""
        return conn.execute(delete(links).where(links.c.sha1 == sha1)).rowcount


def _set_aside_link(store: LocalBlobStore, sha1: Sha1) -> None:
    store.set_aside(sha1, link=True)


def _read_record(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(1 << 20)


def _row(record: LinkRecord, found: Received, file: OpenFile, principal: Principal) -> dict[str, Any]:
    return {
        "sha1": found.sha1,
        "path": record.path,
        "size": found.size,
        "mtime": record.mtime,
        "manifest_sha1": record.manifest_sha1,
        "sha256": found.sha256,
        "linked_at": int(time.time() * 1000),
        "linked_by": principal.name,
        "linked_from": principal.peer,
        "mtime_ns": found.fingerprint.mtime_ns,
        "ctime_ns": found.fingerprint.ctime_ns,
        "inode": found.fingerprint.inode,
        "device": file.stat.st_dev,
    }


def upsert(conn: Connection, row: dict[str, Any]) -> None:
    """Insert or renew a link's row; the newest link of a content is the one that counts."""
    statement = insert(links).values(row)
    rest = {key: value for key, value in row.items() if key != "sha1"}
    conn.execute(statement.on_conflict_do_update(index_elements=[links.c.sha1], set_=rest))
