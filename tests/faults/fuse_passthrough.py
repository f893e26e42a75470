"""A file system that passes everything to a directory and fails on demand, for tests of what a bad volume does.

`python fuse_passthrough.py SOURCE MOUNTPOINT CONTROL`. CONTROL is a JSON file, read anew whenever it changes: a list
of rules {"op": ..., "match": ..., "errno": ..., "times": ..., "sleep": ...}. The first rule whose `op` is the operation
and whose `match` is in the path applies, at most `times` times (always, if absent): sleep, then fail. Each use adds a
line to CONTROL.hits.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mfusepy


class Faults:
    """The rules of a control file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen = (0, 0)
        self._rules: list[dict[str, Any]] = []

    def check(self, op: str, *paths: str) -> None:
        """Sleep or raise, if a rule says so."""
        with self._lock:
            stat = self._path.stat()
            if (stat.st_mtime_ns, stat.st_ino) != self._seen:
                self._seen = (stat.st_mtime_ns, stat.st_ino)
                self._rules = json.loads(self._path.read_text())
            rule = next((r for r in self._rules if r["op"] == op and any(r["match"] in p for p in paths)), None)
            if rule is None or rule.get("times") == 0:
                return
            if "times" in rule:
                rule["times"] -= 1
            with Path(f"{self._path}.hits").open("a") as hits:
                hits.write(f"{op}\n")
        time.sleep(rule.get("sleep", 0))
        if "errno" in rule:
            raise mfusepy.FuseOSError(rule["errno"])


class Passthrough(mfusepy.Operations):
    """Every operation on the source directory, after its rule."""

    use_ns = True

    def __init__(self, source: str, faults: Faults) -> None:
        self._source = source
        self._faults = faults

    def _path(self, op: str, path: str) -> str:
        self._faults.check(op, path)
        return self._source + path

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        stat = os.lstat(self._path("getattr", path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_dev", "st_blocks")
        times = {name: getattr(stat, f"{name}_ns") for name in ("st_atime", "st_mtime", "st_ctime")}
        return {**{name: getattr(stat, name) for name in names}, **times}

    def statfs(self, path: str) -> dict[str, int]:
        stat = os.statvfs(self._path("statfs", path))
        return {name: getattr(stat, name) for name in dir(stat) if name.startswith("f_") and name != "f_fsid"}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._path("readdir", path))]

    def open(self, path: str, flags: int) -> int:
        return os.open(self._path("open", path), flags & ~os.O_NOFOLLOW)

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._path("create", path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._path("read", path)
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._path("write", path)
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._path("truncate", path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._path("fsync", path)
        os.fsync(fh)
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self._path("fsyncdir", path)
        return 0

    def flush(self, path: str, fh: int) -> int:
        self._path("flush", path)
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def link(self, target: str, source: str) -> int:
        self._faults.check("link", target, source)
        os.link(self._source + source, self._source + target)
        return 0

    def rename(self, old: str, new: str) -> int:
        self._faults.check("rename", old, new)
        os.rename(self._source + old, self._source + new)
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._path("unlink", path))
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._path("mkdir", path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._path("rmdir", path))
        return 0

    def chmod(self, path: str, mode: int) -> int:
        os.chmod(self._path("chmod", path), mode)
        return 0

    def chown(self, path: str, uid: int, gid: int) -> int:
        os.chown(self._path("chown", path), uid, gid)
        return 0

    def utimens(self, path: str, times: Any = None) -> int:
        os.utime(self._path("utimens", path), ns=times)
        return 0


if __name__ == "__main__":
    source, mountpoint, control = sys.argv[1:]
    mfusepy.FUSE(
        Passthrough(source, Faults(Path(control))),
        mountpoint,
        foreground=True,
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
        use_ino=True,
    )
