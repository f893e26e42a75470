"""F2: power cuts at random times under eight writers, on ext4 and xfs. Every acknowledgement holds afterwards."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.report import Client, report
from tests.faults.tools import (
    SUBFEED,
    Ledger,
    LoggedNode,
    LoopDisk,
    leftovers,
    link_body,
    loop_disk,
    restart,
    sha1_of,
    without,
    wrong_bytes,
)
from tests.servers import Answer, blob_path

WRITERS = 8
READY_MS = 5000


@dataclass
class Rig:
    """A server whose blobs, and whose database, lie on disks that can lose power."""

    node: LoggedNode
    disks: list[LoopDisk]
    directory: Path
    ledger: Ledger = field(default_factory=Ledger)
    shared_feed: str = ""
    cutting: bool = False

    def cut(self) -> None:
        """Power off. What is answered from then on is no promise: a machine without power answers nothing, but an xfs
        that is shut down lets a flush that is under way succeed, as its log is dropped. Two disks go one after the
        other, which no power cut does: there the server stands still from the moment before."""
        assert self.node.process is not None
        self.cutting = True
        if len(self.disks) > 1:
            self.node.process.send_signal(signal.SIGSTOP)
        for disk in self.disks:
            disk.cut()
        self.node.kill()

    def power_on(self) -> None:
        self.cutting = False
        for disk in self.disks:
            disk.umount()
            disk.mount()


@contextlib.contextmanager
def rig(file_system: str, directory: Path, *, split: bool, prefix: list[str] | None = None) -> Iterator[Rig]:
    """`split`: the database has a disk of its own."""
    with contextlib.ExitStack() as stack:
        disks = [stack.enter_context(loop_disk(file_system, directory, "blobs", 400))]
        if split:
            disks.append(stack.enter_context(loop_disk(file_system, directory, "database", 320)))
        storage, metadata = disks[0].place / "storage", disks[-1].place / "metadata"
        storage.mkdir()
        metadata.mkdir(mode=0o700)
        os.sync()
        node = LoggedNode(storage, metadata, prefix=prefix or [], log_file=directory / "server.log")
        stack.callback(node.kill)
        made = Rig(node, disks, directory)
        node.start()
        yield made


class UntilTheCut(Client):
    """Raises ConnectionError instead of an answer that came after the power went."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig.node, timeout=20)
        self._rig = rig

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        answer = super().request(method, path, body, headers)
        if self._rig.cutting:
            raise ConnectionError("the power is off")
        return answer


class Writer(threading.Thread):
    """Sends requests until one fails; what was answered with a 2xx goes into the ledger."""

    def __init__(self, rig: Rig, number: int, seed: int) -> None:
        super().__init__(daemon=True)
        self._ledger = rig.ledger
        self._directory = rig.directory
        self._shared_feed = rig.shared_feed
        self._client = UntilTheCut(rig)
        self._admin = rig.node.admin_token
        self._random = random.Random(seed)
        self._tag = f"{seed}-{number}"
        self._count = 0
        self._mine: list[str] = []
        self._feed = ""

    def run(self) -> None:
        kinds = {self._store: 10, self._store_large: 1, self._append: 5, self._append_shared: 2, self._set: 2}
        kinds |= {self._delete_blob: 1, self._link: 1, self._feed_life: 1}
        with contextlib.closing(self._client), contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                (do,) = self._random.choices(list(kinds), list(kinds.values()))
                self._count += 1
                if not do():
                    return

    def _store(self, size: int = 4096) -> bool:
        data = self._random.randbytes(size)
        answer = self._client.request("POST", "/store", data)
        if answer.status != 200:
            return False
        sha1 = answer.json()["sha1"]
        assert sha1 == sha1_of(data)
        self._ledger.store(sha1, size)
        self._mine.append(sha1)
        return True

    def _store_large(self) -> bool:
        return self._store(1_200_000)

    def _append_to(self, feed_id: str) -> bool:
        messages = [{"writer": self._tag, "n": self._count, "part": part} for part in range(self._random.randint(1, 3))]
        with self._ledger.lock:
            self._ledger.unknown_messages += messages
        body = {"feedId": feed_id, "subfeedHash": SUBFEED, "messages": messages}
        answer = self._client.post("/feed/appendMessages", body)
        if answer.status != 200:
            return False
        self._ledger.append(feed_id, SUBFEED, answer.json()["position"], messages)
        return True

    def _create_feed(self) -> str:
        answer = self._client.post("/feed/createFeed", {})
        return str(answer.json()["feedId"]) if answer.status == 200 else ""

    def _append(self) -> bool:
        self._feed = self._feed or self._create_feed()
        return bool(self._feed) and self._append_to(self._feed)

    def _append_shared(self) -> bool:
        return self._append_to(self._shared_feed)

    def _set(self) -> bool:
        key, value = f"key-{self._tag}", self._count
        self._ledger.unknown_mutables[key] = value
        if self._client.post("/mutable/set", {"key": key, "value": value}).status != 200:
            return False
        self._ledger.set(key, value)
        return True

    def _delete_blob(self) -> bool:
        if not self._mine:
            return True
        sha1 = self._mine.pop()
        # Its outcome is unknown until it is answered.
        with self._ledger.lock:
            size = self._ledger.blobs.pop(sha1)
        headers = {"Authorization": f"Bearer {self._admin}"}
        if self._client.request("DELETE", f"/api/v1/blobs/{sha1}", headers=headers).status != 204:
            return False
        with self._ledger.lock:
            self._ledger.blobs[sha1] = size
        self._ledger.delete(sha1)
        return True

    def _link(self) -> bool:
        path = self._directory / f"linked-{self._tag}-{self._count}"
        data = self._random.randbytes(2000)
        path.write_bytes(data)
        if self._client.post("/linkFile", link_body(path)).status != 200:
            return False
        self._ledger.link(sha1_of(data), path)
        return True

    def _feed_life(self) -> bool:
        feed_id = self._create_feed()
        if not feed_id:
            return False
        body = {"feedId": feed_id, "subfeedHash": SUBFEED, "messages": [{"short": "life"}]}
        if self._client.post("/feed/appendMessages", body).status != 200:
            return False
        if self._client.post("/feed/deleteFeed", {"feedId": feed_id}).status != 200:
            return False
        self._ledger.delete_feed(feed_id)
        return True


def write_and_cut(rig: Rig, seed: int, seconds: float) -> None:
    """Eight writers, and the power goes after so many seconds."""
    if not rig.shared_feed:
        answer = rig.node.post("/feed/createFeed", {})
        assert answer.status == 200
        rig.shared_feed = answer.json()["feedId"]
    writers = [Writer(rig, number, seed * WRITERS + number) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    time.sleep(seconds)
    rig.cut()
    for writer in writers:
        writer.join(30)
        assert not writer.is_alive()
    rig.power_on()


def cuts(file_system: str, directory: Path, count: int, *, split: bool) -> None:
    """A row of cuts on the same disks; everything acknowledged since the first is compared after each."""
    chance = random.Random(f"{file_system}{split}{os.environ.get('KACHERY_LAB_FAULT_SEED', 0)}")
    worst = leaked = 0.0
    with rig(file_system, directory, split=split) as made:
        for seed in range(count):
            write_and_cut(made, seed, chance.uniform(0.05, 0.7))
            ready = restart(made.node)
            worst = max(worst, ready)
            left = leftovers(made.node.storage)
            leaked += sum(path.stat().st_size for path in left)
            assert left == []
            found = made.ledger.check(made.node)
            assert not found, (seed, found.lost[:5], found.wrong[:5])
            assert ready < READY_MS
            _rotate(made)
        assert made.node.store(b"after the last cut").status == 200
        acked = made.ledger.acked
    report(
        f"F2 {file_system}{', database on its own disk' if split else ''}",
        count,
        acked=acked,
        lost=0,
        wrong=0,
        leaked_bytes=int(leaked),
        recover_ms=round(worst),
    )
    assert acked > 20 * count


def _rotate(made: Rig) -> None:
    """Old blobs make room when they would fill the disk; what was deleted stays in the ledger as deleted."""
    usage = os.statvfs(made.node.storage)
    if usage.f_bavail * usage.f_frsize > 150 << 20:
        return
    for sha1, size in list(made.ledger.blobs.items()):
        if size > 1 << 20 and sha1 not in made.ledger.gone:
            path = f"/api/v1/blobs/{sha1}"
            assert made.node.request("DELETE", path, auth=made.node.admin_token).status == 204
            made.ledger.delete(sha1)
    for path in (made.node.storage / "sha1-trash").rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("split", [False, True], ids=["together", "split"])
@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_power_cuts(tmp_path: Path, file_system: str, split: bool) -> None:
    cuts(file_system, tmp_path, 5, split=split)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("split", [False, True], ids=["together", "split"])
@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_many_power_cuts(tmp_path: Path, file_system: str, split: bool) -> None:
    cuts(file_system, tmp_path, 50, split=split)


@pytest.mark.timeout(300)
def test_control_no_fsync(tmp_path: Path) -> None:
    """Without any flush the same cut loses what was acknowledged: the row can fail."""
    lost, acked = {}, {}
    for file_system in ("ext4", "xfs"):
        directory = tmp_path / file_system
        directory.mkdir()
        with rig(file_system, directory, split=False, prefix=without("no_fsync")) as made:
            write_and_cut(made, 1, 0.5)
            storage = made.node.storage
            # The server may not even start on what is left; the files themselves tell.
            wanted = set(made.ledger.blobs) - made.ledger.gone
            lost[file_system] = sum(not _holds(storage, sha1) for sha1 in wanted)
            acked[file_system] = len(wanted)
            report(
                f"F2 control: no fsync, {file_system}",
                1,
                acked=len(wanted),
                lost=lost[file_system],
                wrong=len(wrong_bytes(storage)) if storage.is_dir() else 0,
            )
    assert min(acked.values()) > 0
    assert max(lost.values()) > 0


def _holds(storage: Path, sha1: str) -> bool:
    path = blob_path(storage, sha1)
    return path.is_file() and hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest() == sha1
