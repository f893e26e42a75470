"""Files outside the store that are served in place: which may be, how they are opened, and their link records.

A client names a path; the server opens it with its own rights. So the path is resolved once, then opened component by
component without following any symbolic link: what is swapped in between is refused, not followed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_IRGRP, S_IROTH, S_ISREG, S_IXGRP, S_IXOTH
from typing import TypeGuard

from kachery_lab.blobs.files import OpenFile
from kachery_lab.core import strict_json
from kachery_lab.core.ids import Sha1
from kachery_lab.errors import Forbidden, InvalidInput, LinkChanged

MTIME_TOLERANCE = 0.002
"""Seconds; file systems and JSON round-trips differ by this much, and the older daemon allows it."""
_NEVER = ("/proc", "/sys", "/dev")


@dataclass(frozen=True, slots=True)
class LinkRecord:
    """What a `.link` file says. `size` in bytes, `mtime` in seconds exactly as the client sent it."""

    path: str
    manifest_sha1: Sha1 | None
    size: int
    mtime: float

    def to_bytes(self) -> bytes:
        """The record as the older daemon writes it; `mtime` survives the round trip bit for bit."""
        return json.dumps(
            {
                "path": self.path,
                "manifestSha1": self.manifest_sha1,
                "stat": {"size": self.size, "mtime": self.mtime},
                "_writingProcess": "daemon",
            },
            separators=(",", ":"),
            ensure_ascii=False,
        ).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> LinkRecord:
        """Raises InvalidInput for what the older daemon does not accept either; further fields are allowed."""
        found = strict_json.loads(data)
        stat = found.get("stat") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not isinstance(stat, dict) or "manifestSha1" not in found:
            raise InvalidInput("a link record needs `path`, `manifestSha1` and `stat`")
        path, size, mtime = found.get("path"), stat.get("size"), stat.get("mtime")
        if not isinstance(path, str) or not _is_number(size) or not _is_number(mtime) or size != int(size):
            raise InvalidInput("a link record needs a text `path` and numbers `stat.size` and `stat.mtime`")
        manifest = found["manifestSha1"]
        return cls(path, None if manifest is None else Sha1.parse(manifest, "manifestSha1"), int(size), float(mtime))

    def fits(self, stat: os.stat_result) -> bool:
        """Whether a file still has the recorded size and modification time."""
        return (
            stat.st_size == self.size and _is_number(self.mtime) and abs(stat.st_mtime - self.mtime) <= MTIME_TOLERANCE
        )


def _is_number(value: object) -> TypeGuard[int | float]:
    # JSON has integers that no double holds; arithmetic with one would fail.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


class LinkPolicy:
    """Which files of this machine may be linked or stored by path."""

    def __init__(
        self,
        *,
        roots: Sequence[Path] = (),
        path_map: dict[str, str] | None = None,
        forbidden: Sequence[Path] = (),
        own_files_only: bool = True,
    ) -> None:
        """`forbidden`: storage, metadata, and every file that holds a secret of the server. `own_files_only`: no auth
        group is set, so the one person who may call is the one whom the server runs as."""
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._map = path_map or {}
        self._own_files_only = own_files_only
        self._forbidden = [Path(os.path.realpath(path)) for path in forbidden]

    def server_path(self, path: str) -> str:
        """The server's name for a path that a client sent."""
        for host, container in self._map.items():
            if path == host or path.startswith(host + "/"):
                return container + path[len(host) :]
        return path

    def open(self, path: str) -> OpenFile:
        """Blocking: open a file that may be served. Raises InvalidInput for a path that is none, Forbidden naming the
        setting, and OSError."""
        if not path.startswith("/") or "\x00" in path or len(os.fsencode(path)) > 4095:
            raise InvalidInput("localFilePath: expected an absolute path of at most 4095 bytes")
        resolved = Path(os.path.realpath(self.server_path(path), strict=True))
        self._check_place(resolved)
        fd, directories = _open_without_links(resolved)
        try:
            self._check_file(path, resolved, os.fstat(fd), directories)
        except BaseException:
            os.close(fd)
            raise
        return OpenFile(fd)

    def open_below(self, root: Path, relative: str) -> OpenFile:
        """Blocking: open a file of a directory that the server's settings name. No component below `root` may be a
        symbolic link. Raises Forbidden, InvalidInput (no regular file), and OSError."""
        resolved = Path(os.path.realpath(root, strict=True)) / relative
        self._check_place(resolved)
        fd, directories = _open_without_links(resolved)
        try:
            self._check_identity(os.fstat(fd), directories)
        except BaseException:
            os.close(fd)
            raise
        return OpenFile(fd)

    def _check_place(self, resolved: Path) -> None:
        for place in (*self._forbidden, *map(Path, _NEVER)):
            if resolved == place or place in resolved.parents:
                raise Forbidden("files of the server itself and of /proc, /sys and /dev cannot be linked")

    def _check_file(self, path: str, resolved: Path, stat: os.stat_result, directories: list[os.stat_result]) -> None:
        if not S_ISREG(stat.st_mode):
            raise InvalidInput(f"{path} is not a regular file")
        self._check_identity(stat, directories)
        if any(root == resolved or root in resolved.parents for root in self._roots):
            return
        if self._own_files_only and stat.st_uid == os.getuid():
            return
        if stat.st_mode & (S_IRGRP | S_IROTH) and all(d.st_mode & (S_IXGRP | S_IXOTH) for d in directories):
            return
        raise Forbidden(
            f"{path} may not be linked: it is neither below a link root nor readable by others",
            hint="Name a directory above it in KACHERY_LAB_LINK_ROOTS, or let others read the file",
        )

    def _check_identity(self, stat: os.stat_result, directories: list[os.stat_result]) -> None:
        # A directory may be mounted at a second place, a file may have a second name: identity counts too.
        here = {(d.st_dev, d.st_ino) for d in (*directories, stat)}
        if here & {identity for place in self._forbidden if (identity := _identity(place))}:
            raise Forbidden("files of the server itself cannot be linked")
        if stat.st_dev in {identity[0] for place in _NEVER if (identity := _identity(Path(place)))}:
            raise Forbidden("files of /proc, /sys and /dev cannot be linked")


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _open_without_links(resolved: Path) -> tuple[int, list[os.stat_result]]:
    """Open an already resolved path; the directories on the way. Raises Forbidden when a component is a link now."""
    directory_flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    directories: list[os.stat_result] = []
    current = os.open("/", directory_flags)
    try:
        for part in resolved.parts[1:-1]:
            following = _step(part, directory_flags, current)
            os.close(current)
            current = following
            directories.append(os.fstat(current))
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        # Look before opening: opening a device or a pipe can have an effect of its own.
        stat = os.stat(resolved.name, dir_fd=current, follow_symlinks=False)
        if not S_ISREG(stat.st_mode):
            raise InvalidInput(f"{resolved} is not a regular file")
        fd = _step(resolved.name, flags, current)
    finally:
        os.close(current)
    if (os.fstat(fd).st_dev, os.fstat(fd).st_ino) != (stat.st_dev, stat.st_ino):
        os.close(fd)
        raise Forbidden(f"{resolved} changed while it was being opened", hint="Try again when nothing replaces it")
    return fd, directories


def _step(name: str, flags: int, parent: int) -> int:
    try:
        return os.open(name, flags, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise Forbidden(f"{name} changed while it was being opened") from None
        raise


def open_named(policy: LinkPolicy, path: str) -> OpenFile:
    """Blocking: `policy.open` for a path that a client names now. What is wrong with the path is the client's to mend
    and says nothing of the volume. Raises InvalidInput, Forbidden, and OSError for the rest."""
    try:
        return policy.open(path)
    except PermissionError:
        raise Forbidden(
            f"{path} may not be linked: the server's user may not read it",
            hint="Let that user read the file and enter its directories; below KACHERY_LAB_LINK_ROOTS that is enough",
        ) from None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise InvalidInput(f"localFilePath: {os.strerror(error.errno).lower()}") from None
        if error.errno == errno.EINVAL:
            # What was a link when it was looked at is none when it is read.
            raise Forbidden(f"{path} changed while it was being opened") from None
        raise


def open_linked(policy: LinkPolicy, record: LinkRecord) -> tuple[OpenFile, bool]:
    """Blocking: the file of a link record, and whether it still fits the record. Raises LinkChanged when it is gone or
    may no longer be opened; other OSErrors pass, because an unreachable volume is not a changed file."""
    try:
        file = policy.open(record.path)
    except (FileNotFoundError, NotADirectoryError, InvalidInput, Forbidden) as error:
        raise LinkChanged(
            "the linked file is gone or may no longer be read", hint="Restore the file, or link or store it again"
        ) from error
    return file, record.fits(file.stat)
