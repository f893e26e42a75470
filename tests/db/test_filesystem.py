"""Which file system holds the database, and the refusal of a network one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kachery_lab.db import filesystem
from kachery_lab.errors import StartRefused

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
24 27 0:6 / /dev rw - devtmpfs devtmpfs rw
25 24 0:23 / /dev/shm rw - tmpfs tmpfs rw
27 1 254:0 / / rw shared:1 - ext4 /dev/vda rw
40 27 0:50 / /mnt/lab rw,relatime shared:7 master:2 - nfs4 server:/lab rw,vers=4.2
41 40 254:1 / /mnt/lab/local\\040disk rw - xfs /dev/vdb rw
42 27 0:51 / /home/ann/remote rw - fuse.sshfs ann@host: rw
43 27 0:52 / /mnt/lab2 rw - ext4 /dev/vdc rw
44 27 0:53 / /mnt/lab2 rw - cifs //host/lab rw
a line that is no mount
"""


@pytest.mark.parametrize(
    ("path", "device", "fstype", "mount_point"),
    [
        ("/dev/shm/x", "0:23", "tmpfs", "/dev/shm"),  # though `/` stands after it in the list
        ("/srv/x", "254:0", "ext4", "/"),
        ("/mnt/lab/a/b", "0:50", "nfs4", "/mnt/lab"),
        ("/mnt/lab/local disk/db", "254:1", "xfs", "/mnt/lab/local disk"),
        ("/mnt/laboratory", "254:0", "ext4", "/"),  # a name that only begins like a mount point
        ("/mnt/lab2/x", "0:53", "cifs", "/mnt/lab2"),  # mounted over another one
        ("/mnt/lab/a", "254:0", "ext4", "/"),  # hidden: the device is that of `/`
        ("/mnt/lab/a", "9:9", "nfs4", "/mnt/lab"),  # btrfs: no mount has the device
    ],
)
def test_mount_of(path: str, device: str, fstype: str, mount_point: str) -> None:
    mount = filesystem.mount_of(Path(path), device, filesystem.parse_mountinfo(MOUNTS))
    assert mount is not None
    assert (mount.fstype, str(mount.mount_point)) == (fstype, mount_point)


def test_this_machine(tmp_path: Path) -> None:
    fstype, mount_point = filesystem.file_system_of(tmp_path / "not" / "made" / "yet")
    assert fstype != filesystem.UNKNOWN
    assert os.path.ismount(mount_point)
    assert filesystem.file_system_of(Path("/proc/self/status")) == ("proc", Path("/proc"))


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/proc")
    assert filesystem.file_system_of(tmp_path / "link" / "self")[0] == "proc"


@pytest.mark.parametrize("fstype", [*sorted(filesystem.NETWORK_FILE_SYSTEMS), "fuse.rclone", "fuse.glusterfs"])
def test_network(fstype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "file_system_of", lambda _: (fstype, Path("/mnt/lab")))
    with pytest.raises(StartRefused) as refusal:
        filesystem.require_local(tmp_path, False)
    assert fstype in refusal.value.message
    assert "/mnt/lab" in refusal.value.message
    assert "KACHERY_LAB_METADATA_DIR" in str(refusal.value.hint)
    assert "KACHERY_LAB_ALLOW_NETWORK_METADATA=true" in str(refusal.value.hint)
    warning = filesystem.require_local(tmp_path, True)
    assert warning is not None
    assert fstype in warning


@pytest.mark.parametrize("fstype", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", filesystem.UNKNOWN])
def test_local(fstype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "file_system_of", lambda _: (fstype, Path("/")))
    assert filesystem.require_local(tmp_path, False) is None
    assert filesystem.require_local(tmp_path, True) is None


def test_without_mountinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "MOUNTINFO", tmp_path / "absent")
    assert filesystem.file_system_of(tmp_path) == (filesystem.UNKNOWN, Path("/"))
    assert filesystem.require_local(tmp_path, False) is None
