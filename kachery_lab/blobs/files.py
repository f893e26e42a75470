"""Files open for reading, and what tells without reading that one is still what it was."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from kachery_lab.blobs.base import PIECE


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells without reading whether a file is still the one that was verified."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Fingerprint:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class OpenFile:
    """A file open for reading. Closes itself when dropped, so that a read past its deadline leaks nothing."""

    __slots__ = ("fd", "fingerprint", "stat")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.stat = os.fstat(fd)
        self.fingerprint = Fingerprint.of(self.stat)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises OSError(EIO) when the file ends before: it was cut under us."""
        data = os.pread(self.fd, length, offset)
        if len(data) < length:
            parts = [data]
            have = len(data)
            while have < length and (more := os.pread(self.fd, length - have, offset + have)):
                parts.append(more)
                have += len(more)
            data = b"".join(parts)
            if have < length:
                raise OSError(errno.EIO, "the file ends before its size")
        return data

    def unchanged(self) -> bool:
        """Whether the file still is what it was when it was opened."""
        return Fingerprint.of(os.fstat(self.fd)) == self.fingerprint

    def sha1(self) -> str:
        """SHA-1 of the whole content."""
        digest = hashlib.sha1(usedforsecurity=False)
        for offset in range(0, self.fingerprint.size, PIECE):
            digest.update(self.read(offset, min(PIECE, self.fingerprint.size - offset)))
        return digest.hexdigest()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


def open_regular(path: str | Path) -> OpenFile:
    """Open a regular file without following a link at its end and without blocking on a pipe. Raises OSError.

    ESTALE (a network volume re-exported the file) is tried once more, as the new file handle is usually good.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileNotFoundError(errno.ENOENT, "a symbolic link, not a file") from error
        if error.errno != errno.ESTALE:
            raise
        fd = os.open(path, flags)
    file = OpenFile(fd)
    if not S_ISREG(file.stat.st_mode):
        file.close()
        raise FileNotFoundError(errno.ENOENT, "not a regular file")
    return file


def same_bytes(fd: int, stored: OpenFile) -> bool:
    """Whether the file behind a descriptor has exactly the bytes of an open one. Raises OSError."""
    size = os.fstat(fd).st_size
    if size != stored.fingerprint.size:
        return False
    return all(os.pread(fd, PIECE, offset) == os.pread(stored.fd, PIECE, offset) for offset in range(0, size, PIECE))
