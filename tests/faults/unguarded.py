"""Runs a `kachery-lab` command with one guard replaced by a no-op: the positive control of a fault test.

A command prefix: `python unguarded.py GUARD[,GUARD] python -m kachery_lab.cli start`. The production code has no switch
for any of this; everything here replaces one function of the imported program.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from kachery_lab import cli, lifecycle
from kachery_lab.blobs import disk, links, local, receive
from kachery_lab.core import ids, rates, strict_json
from kachery_lab.errors import Conflict, NotFound, Unavailable
from kachery_lab.services import access, access_data, audit, blobs, clock, logs, node_requests, shares, subfeeds
from kachery_lab.services import links as link_service


def keep_drafts() -> None:
    """F3: temporary files are closed but not removed."""

    def discard(self: Any) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    local.Draft.discard = discard


def full_is_unavailable() -> None:
    """F3: a full disk is any other failure."""
    disk.from_os_error = lambda error: Unavailable(str(error))


def no_read_hash() -> None:
    """F8: stored bytes are trusted."""

    async def trust(*_: Any) -> None:
        pass

    blobs.BlobService._load = lambda self, sha1: self.store_on_volume.load_small(sha1, blobs.SMALL)
    blobs.BlobService._trust = trust


def trust_links() -> None:
    """F9: linked files are trusted, as the older daemon trusts them."""

    async def trust(*_: Any) -> None:
        pass

    async def content(self: Any, _sha1: Any, file: Any) -> Any:
        return blobs.Content(self.store_on_volume, None, file)

    before = links.open_linked
    link_service.open_linked = lambda policy, record: (before(policy, record)[0], True)
    link_service.LinkService._trust = trust
    blobs.BlobService._linked_content = content


def every_errno_is_absence() -> None:
    """F10: as the older daemon, which took every failure for "not found"."""
    disk.from_os_error = lambda error: NotFound("no such file on the volume")


def disk_on_loop() -> None:
    """F10: file work runs on the event loop."""

    async def run(self: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except OSError as error:
            raise disk.from_os_error(error) from error

    disk.Disk.run = run
    disk.Disk.run_short = run


def no_void() -> None:
    """F16: a record whose commit failed stays in the log."""

    async def write_void(self: Any) -> None:
        self._void = None

    logs.LogWriter._write_void = write_void


def no_claim() -> None:
    """C1: what arrives is not compared with what was announced."""
    receive._check = lambda *_: None


def no_position() -> None:
    """C3: the expected position is ignored."""
    before = subfeeds.Subfeed._add

    def add(self: Any, group: Any, request: Any, now: int) -> Any:
        request.expected_position = None
        return before(self, group, request, now)

    subfeeds.Subfeed._add = add


def no_request_id() -> None:
    """C5: request ids are forgotten."""
    subfeeds.Subfeed._repeated = staticmethod(lambda request, known: None)


def any_sha1() -> None:
    """H9: a name is whatever the client says."""
    ids._Hex.parse = classmethod(lambda cls, value, where="": str.__new__(cls, value))


def lenient_json() -> None:
    """J1, J2, J3: the standard library's decoder."""
    strict_json.loads = lambda data, **_: json.loads(data)


def same_name_same_bytes() -> None:
    """S9: what has the same SHA-1 is taken for the same."""
    local.same_bytes = lambda fd, stored: True


def naive_links() -> None:
    """S11: the path is resolved and checked, then opened again by its name."""

    def open_path(self: Any, path: str) -> Any:
        from pathlib import Path

        resolved = Path(os.path.realpath(path, strict=True))
        self._check_place(resolved)
        self._check_file(path, resolved, resolved.stat(), [])
        return local.OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))

    links.LinkPolicy.open = open_path


def any_link() -> None:
    """S11: any path may be opened."""
    links.LinkPolicy.open = lambda self, path: local.OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))


def log_codes() -> None:
    """S3: wrong codes are logged, as the older daemon does."""
    before = access.AccessService.by_code

    def by_code(self: Any, code: str | None, peer: str | None) -> Any:
        try:
            return before(self, code, peer)
        except Exception:
            access.log.info("a code does not fit", given=code)
            raise

    access.AccessService.by_code = by_code


def killed_after_change() -> None:
    """No guard but a moment: once the file KILL_AFTER_CHANGE is there, the next change of access data is the last."""
    before = access_data.AccessData.change

    async def change(self: Any, fn: Any) -> Any:
        result = await before(self, fn)
        if os.path.exists(os.environ["KILL_AFTER_CHANGE"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    access_data.AccessData.change = change


def audit_afterwards() -> None:
    """The audit's entry is a transaction of its own, after the change."""
    audit.Act.recorded = lambda self, fn: fn


def prune_often() -> None:
    """No guard but a pace: what is past its time goes several times in a second."""
    lifecycle.PRUNE_SECONDS = 0.2


def any_clock() -> None:
    """O4: the time of day is believed at once."""
    clock.STEADY_SECONDS = 0.0


def nonces_by_clock() -> None:
    """O4: nonces are forgotten by the time of day."""

    def use(self: Any, node_id: str, nonce: str, timestamp: int) -> None:
        now = time.time()
        for known, (at, _) in list(self._nonces.items()):
            if at < now - 2 * node_requests.WINDOW_SECONDS:
                del self._nonces[known]
        if (node_id, nonce) in self._nonces:
            raise Conflict("this request was sent before")
        self._nonces[node_id, nonce] = (now, timestamp)

    node_requests.NodeRequests._use = use


def no_shares() -> None:
    """S14: whoever comes first takes all."""
    shares.Shares.take = lambda self, who, size=0, room=None: contextlib.nullcontext()
    rates.Rates.wait = lambda self, name, now: 0.0


GUARDS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        keep_drafts,
        full_is_unavailable,
        no_read_hash,
        trust_links,
        every_errno_is_absence,
        disk_on_loop,
        no_void,
        no_claim,
        no_position,
        no_request_id,
        any_sha1,
        lenient_json,
        same_name_same_bytes,
        naive_links,
        any_link,
        log_codes,
        killed_after_change,
        audit_afterwards,
        prune_often,
        any_clock,
        nonces_by_clock,
        no_shares,
    )
}


if __name__ == "__main__":
    guard, rest = sys.argv[1], sys.argv[2:]
    for one in guard.split(","):
        GUARDS[one]()
    sys.argv = ["kachery-lab", *rest[rest.index("kachery_lab.cli") + 1 :]]
    cli.main()
