"""Blobs as files on a mounted volume, readable by clients that mount the same directory."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
from collections.abc import AsyncIterable, AsyncIterator, Callable
from pathlib import Path
from stat import S_ISREG

from kachery_lab.blobs.base import PIECE, BlobStat
from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.durable import (
    Directories,
    fsync_directory,
    move_without_replacing,
    present,
    unlink_quietly,
    write_all,
)
from kachery_lab.blobs.files import Fingerprint, OpenFile, open_regular, same_bytes
from kachery_lab.blobs.layout import DRAFT_PREFIX, DRAFT_SUFFIX, StorageLayout, is_blob_name, shard
from kachery_lab.blobs.volume import read_volume_id
from kachery_lab.core.ids import Sha1
from kachery_lab.errors import Collision, NotFound, Unavailable

EARLY_FLUSH = 16 << 20
"""After so many bytes of a draft the kernel is asked to begin writing them out, so that fsync finds less to do."""


class Draft:
    """Bytes on their way in: a temporary file that becomes a blob by `commit` or disappears by `discard`."""

    __slots__ = ("_fd", "_flushing", "_path", "_store", "_written")

    def __init__(self, store: LocalBlobStore, path: str) -> None:
        self._store = store
        self._path = path
        self._written = self._flushing = 0
        self._fd = -1
        # The mode of blobs: the program's umask leaves it as it is.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes."""
        write_all(self._fd, data)
        self._written += len(data)
        if self._written - self._flushing >= EARLY_FLUSH:
            # Begins to write out; pages that are dirty or under way stay in the cache.
            os.posix_fadvise(self._fd, self._flushing, self._written - self._flushing, os.POSIX_FADV_DONTNEED)
            self._flushing = self._written

    def commit(self, sha1: Sha1) -> tuple[bool, Fingerprint]:
        """Make the bytes, trusted to have this SHA-1, a blob that survives a power cut. (Whether it is new, what lies
        there now.) Raises Collision when other bytes with this SHA-1 are stored; they stay."""
        try:
            self.flush()
            return self.place(sha1)
        finally:
            self.discard()

    def flush(self) -> None:
        """The bytes are on the disk on return; they have no name yet."""
        os.fsync(self._fd)

    def place(self, sha1: Sha1) -> tuple[bool, Fingerprint]:
        """The rest of `commit`, for flushed bytes."""
        try:
            new, fingerprint = self._store.place(self._fd, self._path, sha1)
            if new:
                self._path = ""
            return new, fingerprint
        finally:
            self.discard()

    def discard(self) -> None:
        """Drop the temporary file. Doing it again does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            if self._path:
                unlink_quietly(self._path)
            os.close(fd)

    def __del__(self) -> None:
        self.discard()


class LocalBlobStore:
    """The mounted volume. Blocking helpers carry no prefix; the verbs of BlobStore are coroutines around them."""

    def __init__(self, layout: StorageLayout, disk: Disk, volume_id: str | None = None) -> None:
        """`volume_id`: the volume that must be mounted here for an absent file to count as absent."""
        self.layout = layout
        self._volume_id = volume_id
        self.disk = disk
        self.token = secrets.token_hex(4)
        self._numbers = itertools.count()
        self.meets_link: Callable[[Sha1, int], None] | None = None
        """Called with the descriptor of a new blob whose name has a link record; raises Collision to refuse it."""
        self._directories = Directories(str(layout.root))

    # -- blocking ------------------------------------------------------------------------------------------------

    def check_volume(self) -> None:
        """Raises Unavailable when another directory than the volume lies here: an unmounted volume looks empty."""
        if self._volume_id is not None and read_volume_id(self.layout) != self._volume_id:
            raise Unavailable("the storage volume is not mounted", hint="Mount it; nothing was written meanwhile")

    def draft(self) -> Draft:
        """A new temporary file on the volume."""
        try:
            return Draft(self, self.layout.draft(self.token, next(self._numbers)))
        except FileNotFoundError:
            self.check_volume()
            self.layout.tmp.mkdir(exist_ok=True)
            return Draft(self, self.layout.draft(self.token, next(self._numbers)))

    def place(self, fd: int, path: str, sha1: Sha1) -> tuple[bool, Fingerprint]:
        """Link a flushed temporary file to its final name; the last steps of the write recipe."""
        try:
            return self._place(fd, path, sha1)
        except FileNotFoundError:
            # Somebody removed a directory that was thought to be there.
            self._directories.forget()
            self.check_volume()
            return self._place(fd, path, sha1)

    def _place(self, fd: int, path: str, sha1: Sha1) -> tuple[bool, Fingerprint]:
        final = self.layout.blob(sha1)
        directory = final.rpartition("/")[0]
        pending, fresh = self._directories.make(directory)
        if not fresh and self.meets_link is not None and present(self.layout.link(sha1)):
            self.meets_link(sha1, fd)
        try:
            try:
                move_without_replacing(path, final)
                new = True
            except FileExistsError:
                new = self._meet(fd, path, final, sha1)
            fsync_directory(directory)
            self._directories.flush(directory, pending)
        except OSError:
            self._directories.forget()
            raise
        if new:
            return True, Fingerprint.of(os.fstat(fd))
        return False, Fingerprint.of(os.stat(final, follow_symlinks=False))

    def _meet(self, fd: int, path: str, final: str, sha1: Sha1) -> bool:
        """The name is taken: by the same bytes (False), by rotten ones (healed, True), or Collision."""
        stored = self.open(sha1)
        try:
            if same_bytes(fd, stored):
                # It may have been placed by a process that was killed before its flush, or by an older daemon.
                os.fsync(stored.fd)
                return False
            if stored.sha1() == sha1:
                raise collision(sha1)
        finally:
            stored.close()
        self.set_aside(sha1)
        move_without_replacing(path, final)
        return True

    def holds(self, file: OpenFile, sha1: Sha1) -> bool:
        """Whether there is a blob of this name, which is the SHA-1 of `file`. Raises Collision when it has other bytes
        that fit the name too."""
        try:
            stored = self.open(sha1)
        except (FileNotFoundError, NotADirectoryError):
            return False
        try:
            if not same_bytes(file.fd, stored) and stored.sha1() == sha1:
                raise collision(sha1)
        finally:
            stored.close()
        return True

    def open(self, sha1: Sha1) -> OpenFile:
        """Open a blob's file. Raises OSError; a name that is no regular file counts as absent."""
        return open_regular(self.layout.blob(sha1))

    def load_small(self, sha1: Sha1, limit: int) -> tuple[bytes | None, OpenFile | None]:
        """One hop for the common case: (all bytes, None) of a blob up to `limit` bytes, else (None, the open file)."""
        file = self.open(sha1)
        size = file.fingerprint.size
        if size > limit:
            return None, file
        try:
            return file.read(0, size), None
        finally:
            file.close()

    def set_aside(self, sha1: Sha1, *, link: bool = False) -> None:
        """Move a wrong blob, or a wrong link record, to the quarantine, durably."""
        source = self.layout.link(sha1) if link else self.layout.blob(sha1)
        self._move(source, f"{self.layout.quarantine}/{shard(sha1)}", os.path.basename(source))

    def throw_away(self, sha1: Sha1) -> bool:
        """Move a blob to the trash, durably; a link record is removed. False when neither was there."""
        found = False
        try:
            self._move(self.layout.blob(sha1), f"{self.layout.trash}/{shard(sha1)}", sha1)
            found = True
        except FileNotFoundError:
            pass
        try:
            os.unlink(self.layout.link(sha1))
            fsync_directory(os.path.dirname(self.layout.link(sha1)))
            found = True
        except FileNotFoundError:
            pass
        return found

    def _move(self, source: str, directory: str, name: str) -> None:
        try:
            self._move_once(source, directory, name)
        except FileNotFoundError:
            if not present(source):
                raise
            # Somebody removed a directory that was thought to be there: who empties the trash may remove all of it.
            self._directories.forget()
            self._move_once(source, directory, name)

    def _move_once(self, source: str, directory: str, name: str) -> None:
        pending, _ = self._directories.make(directory)
        os.rename(source, f"{directory}/{name}")
        fsync_directory(directory)
        fsync_directory(os.path.dirname(source))
        self._directories.flush(directory, pending)

    def quarantined(self, sha1: Sha1) -> bool:
        """Whether a wrong blob or link record of this name was set aside. Raises OSError."""
        path = f"{self.layout.quarantine}/{shard(sha1)}/{sha1}"
        return present(path) or present(path + ".link")

    def write_link(self, sha1: Sha1, record: bytes) -> None:
        """Replace the link record of a blob, atomically and durably."""
        self.check_volume()
        try:
            self._write_link(sha1, record)
        except FileNotFoundError:
            # As in `place` and `draft`.
            self._directories.forget()
            self.layout.tmp.mkdir(exist_ok=True)
            self._write_link(sha1, record)

    def _write_link(self, sha1: Sha1, record: bytes) -> None:
        final = self.layout.link(sha1)
        directory = os.path.dirname(final)
        pending, _ = self._directories.make(directory)
        path = self.layout.draft(self.token, next(self._numbers))
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            try:
                write_all(fd, record)
                os.fchmod(fd, 0o644)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(path, final)
        except BaseException:
            unlink_quietly(path)
            raise
        fsync_directory(directory)
        self._directories.flush(directory, pending)

    def walk(self, after: str = "") -> list[str]:
        """Names of all blobs and link records (`<sha1>.link`) in one `aa` directory: the first not below `after`'s
        that has any. Empty at the end. Reading one shard at a time keeps memory bounded."""
        for aa in sorted(_subdirectories(self.layout.blobs)):
            if after and aa <= after[:2]:
                continue
            names = [
                entry.name
                for bb in _subdirectories(self.layout.blobs / aa)
                for cc in _subdirectories(self.layout.blobs / aa / bb)
                for entry in _entries(self.layout.blobs / aa / bb / cc)
                if is_blob_name(entry.name.removesuffix(".link")) and shard(entry.name) == f"{aa}/{bb}/{cc}"
            ]
            if names:
                return sorted(names)
        return []

    def sweep(self) -> int:
        """Remove the drafts of processes that ended. Only the one running process has drafts, so all others go."""
        removed = 0
        for entry in _entries(self.layout.tmp):
            mine = entry.name.startswith(f"{DRAFT_PREFIX}{self.token}.")
            if entry.name.startswith(DRAFT_PREFIX) and entry.name.endswith(DRAFT_SUFFIX) and not mine:
                os.unlink(entry.path)
                removed += 1
        return removed

    def free_bytes(self) -> int:
        """Bytes that the service's user may still write."""
        found = os.statvfs(self.layout.root)
        return found.f_bavail * found.f_frsize

    # -- BlobStore -----------------------------------------------------------------------------------------------

    async def put(self, sha1: Sha1, stream: AsyncIterable[bytes]) -> bool:
        draft = await self.disk.run(self.draft)
        try:
            async for piece in stream:
                await self.disk.run(draft.write, piece)
            new, _ = await self.disk.run_long(draft.commit, sha1)
        finally:
            await asyncio.shield(self.disk.run(draft.discard))
        return new

    async def stat(self, sha1: Sha1) -> BlobStat | None:
        try:
            found = await self.disk.run_short(os.lstat, self.layout.blob(sha1))
        except NotFound:
            return None
        return BlobStat(sha1, found.st_size) if S_ISREG(found.st_mode) else None

    async def read(self, sha1: Sha1, offset: int = 0, length: int | None = None) -> AsyncIterator[bytes]:
        file = await self.disk.run(self.open, sha1)
        try:
            end = file.fingerprint.size if length is None else min(file.fingerprint.size, offset + length)
            while offset < end:
                piece = await self.disk.run(file.read, offset, min(PIECE, end - offset))
                offset += len(piece)
                yield piece
        finally:
            file.close()

    async def list(self, after: str = "", limit: int = 1000) -> list[BlobStat]:
        found: list[BlobStat] = []
        # The shard of `after` itself may hold greater names: begin just below it.
        cursor = f"{int(after[:2], 16) - 1:02x}" if after[:2] > "00" else ""
        while len(found) < limit and (names := await self.disk.run(self.walk, cursor)):
            cursor = names[0][:2]
            for name in names:
                if name > after and not name.endswith(".link") and len(found) < limit:
                    stat = await self.stat(Sha1.parse(name))
                    if stat is not None:
                        found.append(stat)
        return found

    async def delete(self, sha1: Sha1) -> bool:
        return await self.disk.run(self.throw_away, sha1)

    async def close(self) -> None:
        """The pool belongs to whoever made it."""


def collision(sha1: str) -> Collision:
    """The error for bytes whose SHA-1 is the name of others."""
    return Collision(
        f"other bytes with the SHA-1 {sha1} are stored already; they stay",
        hint="Two different files with one SHA-1 are a deliberate collision; store this file elsewhere",
    )


def _entries(path: Path) -> list[os.DirEntry[str]]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as entries:
        return list(entries)
    return []


def _subdirectories(path: Path) -> list[str]:
    return [entry.name for entry in _entries(path) if len(entry.name) == 2 and entry.is_dir(follow_symlinks=False)]
