"""F3: the volume is full in the middle of a body."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from hashlib import sha1
from pathlib import Path

import pytest

from tests.faults.report import histogram, missing, need_root, report, without
from tests.servers import RunningNode, blob_path, drafts

MIB = 1 << 20
Make = Callable[..., RunningNode]


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """4 MiB."""
    need_root()
    volume = tmp_path / "volume"
    volume.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", volume], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        missing(f"cannot mount a tmpfs: {mounted.stderr}")
    (volume / "storage").mkdir()
    yield volume / "storage"
    subprocess.run(["umount", "-l", volume], check=True)


def free(storage: Path) -> int:
    found = os.statvfs(storage)
    return found.f_bavail * found.f_frsize


def fill(node: RunningNode) -> tuple[list[int], list[bytes], list[str]]:
    """Six stores of 1 MiB: statuses, what was stored, and the texts of refusals."""
    statuses, stored, texts = [], [], []
    for _ in range(6):
        data = os.urandom(MIB)
        answer = node.request("PUT", f"/api/v1/blobs/{sha1(data).hexdigest()}", data)
        statuses.append(answer.status)
        if answer.status == 201:
            stored.append(data)
        else:
            assert not blob_path(node.storage, sha1(data).hexdigest()).exists()
            texts.append(answer.body.decode())
    return statuses, stored, texts


def test_a_full_volume_is_507_and_recovers_without_a_restart(make_node: Make, small_volume: Path) -> None:
    node = make_node(storage=small_volume).start()
    statuses, stored, texts = fill(node)
    assert set(statuses) == {201, 507} and 2 <= statuses.count(201) <= 3
    assert all("storage_full" in text and "full (ENOSPC)" in text for text in texts)
    leaked = sum(path.stat().st_size for path in drafts(small_volume))
    assert leaked == 0

    for data in stored:
        answer = node.request("GET", f"/api/v1/blobs/{sha1(data).hexdigest()}")
        assert (answer.status, answer.body == data) == (200, True)
    refused = node.store(os.urandom(MIB))
    assert (refused.status, "the storage is full" in refused.body.decode()) == (507, True)
    assert node.request("GET", "/livez", auth=False).status == 200
    assert node.request("GET", "/readyz", auth=False).status == 200

    begun = time.monotonic()
    path = f"/api/v1/blobs/{sha1(stored[0]).hexdigest()}"
    assert node.request("DELETE", path, auth=node.admin_token).status == 204
    shutil.rmtree(small_volume / "sha1-trash")
    again = node.request("PUT", path, stored[0])
    assert again.status == 201, again.body
    recover_ms = (time.monotonic() - begun) * 1000
    assert node.request("GET", path).body == stored[0]
    assert node.terminate() == 0
    assert drafts(small_volume) == []
    report(
        "F3",
        7,
        acked=len(stored),
        lost=0,
        wrong=0,
        status_histogram=histogram([*statuses, refused.status]),
        leaked_bytes=leaked,
        recover_ms=round(recover_ms, 1),
    )


def test_a_full_volume_refuses_messages_and_keeps_none_of_them(make_node: Make, small_volume: Path) -> None:
    """A log that could not take a record answers 507; what was refused is not there, and what follows is."""
    node = make_node(storage=small_volume).start()
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    subfeed = {"feedId": feed, "subfeedHash": "0" * 40}
    kept = node.post("/feed/appendMessages", {**subfeed, "messages": [{"n": 0}]})
    assert kept.json()["position"] == 0
    fill(node)
    ballast = small_volume / "ballast"
    ballast.write_bytes(bytes(max(0, free(small_volume) - 4096)))
    refused = node.post("/feed/appendMessages", {**subfeed, "messages": [{"text": "x" * 200_000}]})
    assert (refused.status, "full" in refused.body.decode()) == (507, True)
    ballast.unlink()
    shutil.rmtree(small_volume / "sha1")
    after = node.post("/feed/appendMessages", {**subfeed, "messages": [{"n": 1}]})
    assert (after.status, after.json()["position"]) == (200, 1)
    node.kill()
    node.start()
    assert node.post("/feed/getNumLocalMessages", subfeed, auth=node.admin_token).json()["numMessages"] == 2


def test_control_without_removal_drafts_stay(make_node: Make, small_volume: Path) -> None:
    node = make_node(storage=small_volume, prefix=without("keep_drafts")).start()
    fill(node)
    leaked = sum(path.stat().st_size for path in drafts(small_volume))
    assert leaked > 0
    report("F3 control keep_drafts", 6, leaked_bytes=leaked)


def test_control_without_the_table_full_is_not_507(make_node: Make, small_volume: Path) -> None:
    node = make_node(storage=small_volume, prefix=without("full_is_unavailable")).start()
    statuses, _, _ = fill(node)
    assert 507 not in statuses
    report("F3 control full_is_unavailable", 6, status_histogram=histogram(statuses))
