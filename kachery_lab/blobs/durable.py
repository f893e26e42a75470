"""The one write recipe: what returns has reached the disk.

temporary file (O_EXCL, same file system) -> write -> fsync -> move to the final name without replacing -> fsync the
directory and each parent whose entry may not have reached the disk yet.
fsync is never retried: after a failure the pages may be gone although a second call succeeds.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

_LINK_UNSUPPORTED = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS, errno.EXDEV})
_DIRECTORY_SYNC_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP})
_NO_FLAGS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM})
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_REMEMBERED = 100_000
_RENAMING = threading.Lock()


def fsync_directory(path: str) -> None:
    """Flush the entries of a directory. File systems that cannot (EINVAL) order entries themselves."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _DIRECTORY_SYNC_UNSUPPORTED:
            raise
    finally:
        os.close(fd)


class Directories:
    """Makes directories below `root` and knows whose entries are on disk.

    A directory that merely exists may have been made by a process that was killed before it flushed the parent, so
    only directories flushed by this object count.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._durable: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, path: str) -> tuple[list[str], bool]:
        """Make `path` and its parents. (The directories whose entries must still be flushed, nearest the root first;
        whether `path` is new, so that it held nothing.)"""
        if path in self._durable:
            return [], False
        pending: list[str] = []
        new = False
        parts = path[len(self._root) :].strip("/").split("/")
        current = self._root
        for part in parts:
            parent, current = current, f"{current}/{part}"
            if current in self._durable:
                continue
            try:
                os.mkdir(current, 0o755)
                new = True
            except FileExistsError:
                new = False
            pending.append(parent)
        return pending, new

    def flush(self, path: str, pending: list[str]) -> None:
        """Flush the `pending` parents of `path`, then remember that they are on disk."""
        for parent in pending:
            fsync_directory(parent)
        if pending:
            self._remember(path)

    def _remember(self, path: str) -> None:
        with self._lock:
            while len(path) > len(self._root):
                self._durable[path] = None
                path = path.rpartition("/")[0]
            while len(self._durable) > _REMEMBERED:
                self._durable.popitem(last=False)

    def forget(self) -> None:
        """Trust nothing any more: the volume was replaced or a flush failed."""
        with self._lock:
            self._durable.clear()


def present(path: str) -> bool:
    """Whether there is an entry of that name. Raises OSError for all but absence: a failing volume is no empty one."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def move_without_replacing(source: str, target: str) -> None:
    """Give the file its final name without replacing one. Raises FileExistsError when the name is taken.

    One system call where kernel and file system have it (Linux 3.15; not on NFS); else a hard link. Where there are no
    hard links either the fallback is a look and a rename. One process writes final names, so a lock between its
    threads is enough: without it a second arrival would replace the first.
    """
    if _rename_noreplace(source, target):
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _LINK_UNSUPPORTED:
            raise
        with _RENAMING:
            if present(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
            os.rename(source, target)
    else:
        os.unlink(source)


def _find_renameat2() -> Any:
    """The C library's function; the standard library has none. None where the C library is older than it (glibc
    2.28)."""
    found = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if found is not None:
        found.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return found


_renameat2 = _find_renameat2()


def _rename_noreplace(source: str, target: str) -> bool:
    """False when kernel or file system cannot; raises what else goes wrong."""
    if _renameat2 is None:
        return False
    paths = os.fsencode(source), os.fsencode(target)
    if _renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_FLAGS:
        return False
    raise OSError(number, os.strerror(number), target)


def write_file(path: Path, data: bytes, mode: int, *, gid: int | None = None) -> None:
    """Replace a small file atomically and durably. `gid` changes its group before the name appears."""
    draft = f"{path}.{os.getpid()}.tmp"
    try:
        os.unlink(draft)
    except FileNotFoundError:
        pass
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            write_all(fd, data)
            if gid is not None:
                os.fchown(fd, -1, gid)
            os.fchmod(fd, mode)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(draft, path)
    except BaseException:
        unlink_quietly(draft)
        raise
    fsync_directory(str(path.parent))


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write every byte; `os.write` may take fewer."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def unlink_quietly(path: str) -> None:
    """Remove a temporary file while another error is under way, which must not be replaced by this one."""
    try:
        os.unlink(path)
    except OSError:
        pass
