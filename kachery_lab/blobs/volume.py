"""Guards the storage directory: which volume it is, who writes to it, and whether it can be written at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import json
import os
import pwd
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from kachery_lab.blobs.durable import unlink_quietly, write_all, write_file
from kachery_lab.blobs.layout import StorageLayout
from kachery_lab.errors import StartRefused

_LEFTOVER = re.compile(
    r"\.kachery-probe\.\d+"
    r"|(?:\.kachery-volume|kachery-node-id|owner|client-auth|public\.pem|private\.pem|admin-token)\.\d+\.tmp",
    re.ASCII,
)
HEARTBEAT = 2.0
"""Seconds between two heartbeats of the running process."""
STALE = 4 * HEARTBEAT
"""Seconds without a heartbeat after which another machine's process counts as gone."""


def ensure_directory(path: Path, *, mode: int = 0o755) -> None:
    """Make a named but absent directory, but only where its parent is writable and no mount point: an absent mount
    must not be written under. Raises StartRefused."""
    if path.is_dir():
        return
    parent = path.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StartRefused(f"{path} does not exist", hint=f"Mount it, or make it: mkdir -p {path}")
    if parent != Path("/") and os.path.ismount(parent):
        raise StartRefused(
            f"{path} does not exist, and {parent} is a mount point",
            hint=f"If the volume is mounted as it should be: mkdir {path}",
        )
    path.mkdir(mode=mode)


def require_writable(path: Path) -> None:
    """Write, flush, link and remove a file, as every store will. Raises StartRefused with the line that mends it."""
    probe = f"{path}/.kachery-probe.{os.getpid()}"
    # In a container every start has the same process id: one that was killed here must not stop the next.
    unlink_quietly(probe)
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, b"probe")
            os.fsync(fd)
        finally:
            os.close(fd)
            os.unlink(probe)
    except OSError as error:
        raise _not_writable(path, error) from None


def require_access(path: Path) -> None:
    """As `require_writable`, by looking at rights alone: writes nothing."""
    if not os.access(path, os.W_OK | os.X_OK):
        raise _not_writable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _not_writable(path: Path, error: OSError) -> StartRefused:
    stat = path.stat()
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = f"On the machine that has the directory: chown -R {os.getuid()}:{os.getgid()} {path}"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "Free space there"
    else:
        hint = "Look at how it is mounted, and at the kernel's log"
    return StartRefused(
        f"{path} cannot be written by user {_user()}: {error.strerror} "
        f"(it belongs to {stat.st_uid}:{stat.st_gid}, mode {stat.st_mode & 0o7777:04o})",
        hint=hint,
    )


def _user() -> str:
    with contextlib.suppress(KeyError):
        return f"{pwd.getpwuid(os.getuid()).pw_name} ({os.getuid()}:{os.getgid()})"
    return f"{os.getuid()}:{os.getgid()}"


def group_id(group: str) -> int:
    """Number of a group given by name or number. Raises StartRefused for an unknown name."""
    if group.isascii() and group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise StartRefused(
            f"there is no group {group!r} on this machine",
            hint="In a container name the group by its number, as `getent group NAME` shows it on the host",
        ) from None


def read_volume_id(layout: StorageLayout) -> str | None:
    """Id of the volume, None when it has none. Raises OSError for anything but absence."""
    try:
        return layout.volume_id.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None


def write_volume_id(layout: StorageLayout) -> str:
    """Give the volume an id, durably."""
    identity = secrets.token_hex(16)
    write_file(layout.volume_id, f"{identity}\n".encode(), 0o644)
    return identity


@dataclass(frozen=True, slots=True)
class Process:
    """Who holds a lock or a volume."""

    host: str
    pid: int
    boot: str

    @classmethod
    def current(cls) -> Process:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return cls(socket.gethostname(), os.getpid(), boot)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class ProcessLock:
    """`flock` on a file that names its holder. The kernel frees it when the process ends, however it ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def acquire(self) -> None:
        """Raises StartRefused naming the holder."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 4096, 0).decode("utf-8", "replace").strip() or "another process"
            self.release()
            raise StartRefused(
                f"{self.path} is held by {holder}", hint="One server per storage: stop that one first"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{Process.current()}\n".encode(), 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class VolumeOwner:
    """The owner file on the volume: `flock` for processes of this machine, a heartbeat for those of others.

    Locks do not cross every network file system, so a file whose heartbeat changes while we watch belongs to a living
    process elsewhere, whatever the clocks say.
    """

    def __init__(self, layout: StorageLayout) -> None:
        self._path = layout.owner_process
        self._fd = -1
        self._beats = 0

    def acquire(self) -> None:
        """Raises StartRefused naming the holder. Waits up to STALE seconds for another machine's dead process."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        before = self._read()
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._refuse(before)
        except OSError:
            # A file system without locks: the heartbeat alone has to tell.
            pass
        if before and before.get("boot") != Process.current().boot and not before.get("released"):
            self._watch(before)
        self.beat()

    def _watch(self, before: dict[str, object]) -> None:
        at = before.get("at")
        if isinstance(at, int | float) and abs(time.time() - at) > 60 * STALE:
            return
        until = time.monotonic() + STALE
        while time.monotonic() < until:
            time.sleep(HEARTBEAT / 4)
            if self._read() != before:
                self._refuse(before)

    def _refuse(self, holder: dict[str, object]) -> None:
        self.release(clean=False)
        raise StartRefused(
            f"the volume is used by process {holder.get('pid')} on {holder.get('host')} ({self._path})",
            hint="One server per storage: stop that one first",
        )

    def _read(self) -> dict[str, object]:
        try:
            found = json.loads(os.pread(self._fd, 4096, 0) or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def beat(self, *, released: bool = False) -> None:
        """Say that this process still writes here. Raises OSError."""
        self._beats += 1
        me = Process.current()
        text = json.dumps(
            {
                "host": me.host,
                "pid": me.pid,
                "boot": me.boot,
                "beat": self._beats,
                "at": time.time(),
                "released": released,
            }
        ).encode()
        os.pwrite(self._fd, text.ljust(512), 0)

    def release(self, *, clean: bool = True) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if clean:
                    self.beat(released=True)
            os.close(self._fd)
            self._fd = -1


def sweep_leftovers(directory: Path) -> int:
    """Remove the small files that a killed process left half written, and its probes; how many. Only for the one
    process that holds the directory, while it writes none of them. Raises OSError."""
    removed = 0
    for name in os.listdir(directory):
        if _LEFTOVER.fullmatch(name):
            os.unlink(directory / name)
            removed += 1
    return removed
