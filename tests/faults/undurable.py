"""Runs a `kachery-lab` command with one guard of durability or of the start-up replaced: the positive control of a row.

A command prefix: `python undurable.py GUARD python -m kachery_lab.cli start`. The production code has no switch for any
of this; everything here replaces functions of the imported program.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from kachery_lab import cli, lifecycle, node
from kachery_lab.blobs import disk, journal, local, receive, volume
from kachery_lab.cli import start
from kachery_lab.core.hashing import WholeHasher
from kachery_lab.db import connections
from kachery_lab.errors import NotFound
from kachery_lab.services import identity


def final_name_first() -> None:
    """F1: bytes are written at the final name, as the older daemons do in effect."""

    def store_bytes(store: Any, data: Any, claim: Any = None) -> Any:
        hasher = WholeHasher(want_sha256=True)
        hasher.update(data)
        final = store.layout.blob(hasher.sha1())
        os.makedirs(os.path.dirname(final), exist_ok=True)
        fd = os.open(final, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                os.write(fd, half)
            os.fsync(fd)
            found = local.Fingerprint.of(os.fstat(fd))
        finally:
            os.close(fd)
        return receive.Received(hasher.sha1(), hasher.sha256(), len(data), [], True, found)

    receive.store_bytes = store_bytes


def no_sweep() -> None:
    """F1: drafts of killed processes stay."""
    local.LocalBlobStore.sweep = lambda self: 0


def no_fsync() -> None:
    """F2: nothing is flushed, neither by us nor by SQLite."""
    os.fsync = lambda fd: None
    connections._FULL = 0


def acknowledge_anyway() -> None:
    """F4: an error while a blob is made durable is swallowed, as a stream without an error listener swallows it."""
    before = local.Draft.place

    def place(self: Any, sha1: Any) -> Any:
        found = local.Fingerprint.of(os.fstat(self._fd))
        try:
            return before(self, sha1)
        except OSError:
            return True, found

    local.Draft.place = place


def fsync_again() -> None:
    """F6: a failed flush is tried again on the same descriptor, which then reports success."""
    flush = os.fsync

    def fsync(fd: int) -> None:
        try:
            flush(fd)
        except OSError:
            flush(fd)

    os.fsync = fsync


def no_repair() -> None:
    """F6: what a failed append left in a log stays there."""

    def keep(self: Any) -> None:
        if self._dirty:
            self._good = os.fstat(self._fd).st_size
            self._dirty = False

    journal.Journal._repair = keep


def trouble_is_forgotten() -> None:
    """F6: failures of the volume do not count."""
    disk.TROUBLE_LIMIT = lifecycle.TROUBLE_LIMIT = 1 << 60


def any_volume() -> None:
    """F13: the volume is not compared with what the database knows."""
    node._compare_volumes = lambda *_: None


def no_write_probe() -> None:
    """F14: whether the storage can be written is found out later."""
    node.require_writable = lifecycle.require_writable = lambda path: None


def any_key_mode() -> None:
    """F14: the mode of the key file is not looked at."""
    identity.stat.S_IMODE = lambda mode: 0o600


def denied_is_absent() -> None:
    """F14: every failure to open is "not found", as in the older daemon."""
    disk.from_os_error = lambda error: NotFound("no such file on the volume")


def no_locks() -> None:
    """C4: nobody asks whether another server runs."""

    def open_only(self: Any) -> None:
        path = self.path if isinstance(self, volume.ProcessLock) else self._path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    volume.ProcessLock.acquire = open_only
    volume.VolumeOwner.acquire = open_only


def stop_at_once() -> None:
    """O1: SIGTERM ends the process without waiting for requests."""
    start._catch_signals = lambda *_: None


GUARDS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        final_name_first,
        no_sweep,
        no_fsync,
        acknowledge_anyway,
        fsync_again,
        no_repair,
        trouble_is_forgotten,
        any_volume,
        no_write_probe,
        any_key_mode,
        denied_is_absent,
        no_locks,
        stop_at_once,
    )
}


if __name__ == "__main__":
    guard, rest = sys.argv[1], sys.argv[2:]
    GUARDS[guard]()
    sys.argv = ["kachery-lab", *rest[rest.index("kachery_lab.cli") + 1 :]]
    cli.main()
