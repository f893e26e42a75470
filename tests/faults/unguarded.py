"""Runs a `kachery-lab` command with one guard replaced by a no-op: the positive control of a fault test.

A command prefix: `python unguarded.py GUARD[,GUARD] python -m kachery_lab.cli start`. The production code has no switch
for any of this; everything here replaces one function of the imported program.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from kachery_lab import cli, lifecycle
from kachery_lab.blobs import disk, links, local, receive
from kachery_lab.client import hub, reach
from kachery_lab.core import feeds, ids, rates, strict_json
from kachery_lab.errors import Conflict, NotFound, Unavailable
from kachery_lab.http import server
from kachery_lab.http.v1 import nodes
from kachery_lab.services import (
    access,
    access_data,
    audit,
    blobs,
    broker,
    buckets,
    clock,
    content,
    feed_providers,
    file_providers,
    file_requests,
    files,
    followed_subfeeds,
    logs,
    member_connections,
    node_requests,
    received_feeds,
    shares,
    subfeeds,
    task_index,
    task_leases,
    task_registrations,
    tasks,
    uploads,
)
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

    async def linked_content(self: Any, _sha1: Any, file: Any) -> Any:
        return content.Content(self.store_on_volume, None, file)

    before = links.open_linked
    link_service.open_linked = lambda policy, record: (before(policy, record)[0], True)
    link_service.LinkService._trust = trust
    blobs.BlobService._linked_content = linked_content


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


def any_bytes() -> None:
    """S13: what arrives is kept under the name that was asked for, and served unread."""
    claimed: dict[str, str] = {}

    def check(claim: Any, sha1: str, _size: int) -> None:
        claimed[sha1] = claim.sha1 or sha1

    def place(self: Any, sha1: str) -> Any:
        return before(self, claimed.pop(sha1, sha1))

    before = local.Draft.place
    local.Draft.place = place
    receive._check = check
    no_read_hash()


def no_size_limit() -> None:
    """S13: a body is read to its end, wherever that is."""
    receive._check_limit = lambda *_: None


def believe_finished() -> None:
    """S13: the first node that says `finished` is believed, as the older daemon believes it."""

    def disbelieve(self: Any, _senders: Any) -> None:
        raise NotFound("it is not in the bucket")

    file_requests._Request.disbelieve = disbelieve


def any_range() -> None:
    """S13: a range goes out under whatever SHA-1 its asker claims, as with the older daemon."""

    async def verify_range(*_: Any) -> None:
        pass

    files.FileService.verify_range = verify_range


def upload_each_time() -> None:
    """S13: every request is an upload of its own."""

    def put_once(self: Any, job: Any, peer: Any) -> Any:
        return asyncio.create_task(self._put(job, peer))

    async def upload_url(self: Any, channel: str, sha1: Any, size: int, *, on_demand: bool = False) -> str:
        return await before(self, channel, sha1, size, on_demand=False)

    before = hub.HubClient.upload_url
    hub.HubClient.upload_url = upload_url
    file_providers.FileProviders._put_once = put_once


def no_quota() -> None:
    """S13: every request of every peer is looked at, in the order in which they come."""
    file_providers.JOBS = file_providers.JOBS_PER_PEER = 1 << 60
    rates.Allowance.take = lambda self, amount, now: 0.0
    file_providers._Peer.turn = property(lambda _self: asyncio.Semaphore(1), lambda _self, _value: None)


def no_recheck() -> None:
    """S7: what was allowed when the upload began is allowed when it ends."""

    class Allow:
        def require(self, *_: Any) -> None:
            pass

    before = buckets.BucketService.refer

    async def refer(self: Any, *args: Any, **kwargs: Any) -> Any:
        roles, self._roles = self._roles, Allow()
        try:
            return await before(self, *args, **kwargs)
        finally:
            self._roles = roles

    buckets.BucketService.refer = refer
    uploads.UploadService._require_offer = lambda *_: None


def follow_anywhere() -> None:
    """S12: addresses that the hub names are followed wherever they lead."""
    reach.Reach.require = lambda self, url: reach.origin_of(url)


def name_the_canary() -> None:
    """S12: no guard but an attacker, a hub that names another machine's address for uploads and buckets."""
    nodes.hub_url = lambda _request: os.environ["CANARY"]


def any_message() -> None:
    """J4, J5: what comes in is appended as it is, as the older daemon does with what it downloads first."""

    def accept(_feed_id: Any, place: Any, fresh: Any) -> list[Any]:
        start = place.head.num_messages
        return [
            feeds.SignedMessage(start + n, m.message, m.timestamp, m.signature, bytes(32), m.meta_data)
            for n, m in enumerate(fresh)
        ]

    async def check(*_: Any) -> None:
        pass

    received_feeds._accept = accept
    received_feeds.ReceivedFeeds._check = check


def take_again() -> None:
    """C5: messages that came before are taken for new ones."""
    any_message()
    received_feeds._split = lambda messages, have: ([], list(messages))


def no_checkpoints() -> None:
    """J5: nobody compares, or remembers, what the feed's key vouches for."""

    async def check(*_: Any) -> None:
        pass

    received_feeds.ReceivedFeeds._compare = check
    received_feeds.ReceivedFeeds._check = check
    followed_subfeeds.FollowedSubfeed.note_vouched = lambda *_: None


def provide_each_time() -> None:
    """J6: each subscription is answered by itself."""
    feed_providers.FeedProviders._asked_again = lambda *_: False


def no_feed_recheck() -> None:
    """S7: rights are looked at when an upload is allowed, and not again."""
    uploads.UploadService.honour = _receive_unchecked(uploads.UploadService.honour)


def _receive_unchecked(before: Callable[..., Any]) -> Callable[..., Any]:
    async def receive(self: Any, *args: Any) -> Any:
        require, self._roles.require = self._roles.require, lambda *_: None
        try:
            return await before(self, *args)
        finally:
            self._roles.require = require

    return receive


def any_nonce() -> None:
    """S6: a signed request is good as often as it comes."""
    node_requests.NodeRequests._use = lambda *_: None


def any_time() -> None:
    """O4: a signed request is good for ever, before it was made too."""
    node_requests.WINDOW_SECONDS = 10**12
    before = node_requests.NodeRequests.__init__

    def init(self: Any, *args: Any) -> None:
        before(self, *args)
        self._started = -(10**12)

    node_requests.NodeRequests.__init__ = init


def rights_when_subscribed() -> None:
    """S7: who may listen is looked at once."""
    broker.HubBands._changed = lambda self: None


def endless_queues() -> None:
    """S13: what a member does not read is kept for it."""
    member_connections.MAX_QUEUED = member_connections.MAX_QUEUED_BYTES = broker.MAX_QUEUED_TOTAL = 1 << 40


def no_publish_quota() -> None:
    """S13: a member may publish as fast as it can."""
    rates.Allowance.take = lambda self, amount, now: 0.0


def plain_websockets() -> None:
    """S13: uvicorn's own WebSocket protocol."""
    server.websocket_class = lambda *_: WebSocketsSansIOProtocol


def claims_not_repeated() -> None:
    """C5: a claim whose answer was lost is refused when it is made again."""
    before = task_index.claim

    def claim(conn: Any, channel: str, request: Any, *rest: Any) -> bool:
        known = task_index.find(conn, channel, request.task_id)
        return (known is None or known.state != "leased") and before(conn, channel, request, *rest)

    task_index.claim = claim


def new_task_each_time() -> None:
    """C5: a request id changes nothing."""
    before = tasks.new_task_id
    tasks.new_task_id = lambda kind, digest, _request_id=None: before(kind, digest)


def results_overwrite() -> None:
    """S6, S7: a result is taken whatever became of the lease."""
    uploads.UploadService._committing = lambda *_: contextlib.nullcontext()


def deaf_polls() -> None:
    """O1: backends that wait do not hear that the server stops."""
    before = task_registrations.TaskRegistrations.__init__

    def init(self: Any, *arguments: Any) -> None:
        before(self, *arguments[:-1], asyncio.Event())

    task_registrations.TaskRegistrations.__init__ = init


def leases_forgotten() -> None:
    """O1: leases of the run before are not looked for."""

    def load(self: Any) -> None:
        self._database.write_sync(lambda conn: conn.execute(task_index.tasks.update().values(state="open")).rowcount)

    task_leases.TaskLeaseService.load = load


def shifted_clock() -> None:
    """O4: no guard is off; the clock on the wall is as far from the true one as the file in TEST_CLOCK says."""
    true = time.time
    time.time = lambda: true() + float(Path(os.environ["TEST_CLOCK"]).read_text())


def leases_by_the_wall() -> None:
    """O4: leases are measured by a clock that people set."""
    shifted_clock()
    before = task_leases.TaskLeaseService.__init__

    def init(self: Any, *arguments: Any) -> None:
        before(self, *arguments, clock=time.time)

    task_leases.TaskLeaseService.__init__ = init


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
        any_bytes,
        no_size_limit,
        believe_finished,
        any_range,
        upload_each_time,
        no_quota,
        no_recheck,
        follow_anywhere,
        name_the_canary,
        any_message,
        take_again,
        no_checkpoints,
        provide_each_time,
        no_feed_recheck,
        any_nonce,
        any_time,
        rights_when_subscribed,
        endless_queues,
        no_publish_quota,
        plain_websockets,
        claims_not_repeated,
        new_task_each_time,
        results_overwrite,
        deaf_polls,
        leases_forgotten,
        shifted_clock,
        leases_by_the_wall,
    )
}


if __name__ == "__main__":
    guard, rest = sys.argv[1], sys.argv[2:]
    for one in guard.split(","):
        GUARDS[one]()
    sys.argv = ["kachery-lab", *rest[rest.index("kachery_lab.cli") + 1 :]]
    cli.main()
