"""Which file system a path lies on, and the refusal to keep the database on a network one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kachery_lab.errors import StartRefused

MOUNTINFO = Path("/proc/self/mountinfo")

# File systems whose bytes several machines can reach, or that a program serves: file locks, shared memory and fsync,
# which the write-ahead log needs, are not what they are on a local disk. `fuse.*` are all programs; `fuseblk` is a
# local disk.
NETWORK_FILE_SYSTEMS = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "smb2",
        "ncpfs",
        "afs",
        "coda",
        "ceph",
        "glusterfs",
        "lustre",
        "gpfs",
        "mmfs",
        "beegfs",
        "fhgfs",
        "orangefs",
        "pvfs2",
        "panfs",
        "wekafs",
        "ocfs2",
        "gfs2",
        "9p",
        "vboxsf",
        "vmhgfs",
        "prl_fs",
        "davfs",
        "fuse",
        "fuse.sshfs",
    }
)

UNKNOWN = "unknown"


class Mount(NamedTuple):
    """One line of mountinfo: `device` is `major:minor`."""

    device: str
    mount_point: Path
    fstype: str


def parse_mountinfo(text: str) -> list[Mount]:
    """The mounts in `text`, in its order. Lines that are not in the kernel's form are left out."""
    mounts = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, types = before.split(" "), after.split(" ")
        if separator and len(fields) >= 6:
            mounts.append(Mount(fields[2], Path(_unescape(fields[4])), types[0]))
    return mounts


def mount_of(path: Path, device: str, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that `path` (absolute, without links) lies on, or None.

    Of the mounts above the path, the deepest one with the path's own device: a mount can be hidden under a later one.
    Where none has it (btrfs reports another device than its mount), the deepest; of equals the last, which covers the
    others.
    """
    above = [mount for mount in mounts if path.is_relative_to(mount.mount_point)]
    candidates = [mount for mount in above if mount.device == device] or above
    found: Mount | None = None
    for mount in candidates:
        if found is None or len(mount.mount_point.parts) >= len(found.mount_point.parts):
            found = mount
    return found


def file_system_of(path: Path) -> tuple[str, Path]:
    """Type and mount point of the file system that holds `path`, or would hold it once made.

    (`unknown`, `/`) where the kernel does not tell. Raises `OSError` when the nearest existing directory cannot be
    looked at.
    """
    existing = path.resolve()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    number = existing.stat().st_dev
    try:
        text = MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return UNKNOWN, Path("/")
    device = f"{os.major(number)}:{os.minor(number)}"
    mount = mount_of(existing, device, parse_mountinfo(text))
    return (UNKNOWN, Path("/")) if mount is None else (mount.fstype, mount.mount_point)


def is_network(fstype: str) -> bool:
    """Whether the database must not lie on such a file system."""
    return fstype in NETWORK_FILE_SYSTEMS or fstype.startswith("fuse.")


def require_local(path: Path, allow_network: bool) -> str | None:
    """None when `path` lies on a local file system; a warning to log when it does not and that is allowed.

    Raises `StartRefused`, naming both ways out, when it does not and that is not allowed. A type that nobody tells is
    no error.
    """
    try:
        fstype, mount_point = file_system_of(path)
    except OSError as error:
        raise StartRefused(f"the metadata directory {path} cannot be looked at: {error.strerror}") from error
    if not is_network(fstype):
        return None
    found = f"the metadata directory {path} lies on a network file system ({fstype} at {mount_point})"
    if allow_network:
        return f"{found}: a power cut or a second server can damage the database"
    raise StartRefused(
        f"{found}; the database must lie on a local disk",
        hint="set KACHERY_LAB_METADATA_DIR to a local directory, or KACHERY_LAB_ALLOW_NETWORK_METADATA=true",
    )


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
