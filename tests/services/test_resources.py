"""Files of older kachery directories: found in each layout, hashed before they are served, never copied."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.blobs.links import LinkRecord
from kachery_lab.core.ids import ChannelName, Sha1
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.roles import Role
from kachery_lab.errors import LinkChanged, NotFound, StartRefused
from kachery_lab.node import Node
from kachery_lab.services import resources
from kachery_lab.services.subjects import Subject
from tests.services.opened import ADMIN, ANN, RECORDINGS, TRACKING, furnish, run_on

DATA = b"spikes" * 1000
LARGE = os.urandom(1 << 20) + b"more than is hashed on each read"
READER = Subject("user", "ann")


def sha1_of(data: bytes) -> Sha1:
    return Sha1(hashlib.sha1(data).hexdigest())


def sharded(root: Path, sha1: str, *above: str) -> Path:
    path = root.joinpath(*above, "sha1", sha1[:2], sha1[2:4], sha1[4:6], sha1)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def put_sharded(root: Path, data: bytes) -> Path:
    path = sharded(root, sha1_of(data))
    path.write_bytes(data)
    return path


def put_flat(root: Path, data: bytes) -> Path:
    path = root / "sha1" / sha1_of(data)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def put_linked(root: Path, data: bytes) -> Path:
    """As kachery-cloud's `link_file` writes it."""
    path = root.parent / "elsewhere.nwb"
    path.write_bytes(data)
    stat = path.stat()
    record = {"path": str(path), "size": stat.st_size, "mtime": stat.st_mtime, "sha1": sha1_of(data)}
    sharded(root, sha1_of(data), "linked_files").write_text(json.dumps(record))
    return path


def put_link_record(root: Path, data: bytes) -> Path:
    """As kachery-client's `kachery-link` leaves it beside the blobs."""
    path = root.parent / "elsewhere.dat"
    path.write_bytes(data)
    stat = path.stat()
    record = LinkRecord(str(path), None, stat.st_size, stat.st_mtime)
    place = sharded(root, sha1_of(data))
    place.with_name(f"{place.name}.link").write_bytes(record.to_bytes())
    return path


LAYOUTS = [put_sharded, put_flat, put_linked, put_link_record]


def run(root: Path, work: Callable[[Node], Awaitable[None]], **more: Any) -> None:
    """On a node whose zone `recordings` has the directory, where the node may provide files."""
    directory = root / "resource"
    directory.mkdir(exist_ok=True)

    async def furnished(node: Node) -> None:
        if RECORDINGS not in node.data.channels:
            await furnish(node)
            own = node.identity.node_id
            await node.authorizations.join(ADMIN, RECORDINGS, own)
            await node.authorizations.grant(ANN, RECORDINGS, "node", own, Role.PROVIDE_FILES)
        await work(node)

    run_on(root, furnished, resource_dirs=(f"{RECORDINGS}={directory}",), **more)


async def request(node: Node, data: bytes, channel: ChannelName = RECORDINGS, wait: float = 10.0) -> resources.Progress:
    return await node.resources.request(channel, sha1_of(data), wait)


async def read(node: Node, data: bytes) -> bytes:
    """What a reader of the zone gets for the file's hash."""
    found = await node.channel_files.find(RECORDINGS, sha1_of(data), READER)
    if found is None:
        raise NotFound("not found")
    content = await node.blobs.open(sha1_of(data))
    try:
        return b"".join([piece async for piece in content.read(0, content.size)])
    finally:
        content.close()


@pytest.mark.parametrize("data", [b"", DATA, LARGE], ids=["empty", "small", "large"])
@pytest.mark.parametrize("put", LAYOUTS)
def test_each_layout(tmp_path: Path, put: Callable[[Path, bytes], Path], data: bytes) -> None:
    async def work(node: Node) -> None:
        put(tmp_path / "resource", data)
        with pytest.raises(NotFound):
            await read(node, data)
        progress = await request(node, data)
        assert (progress.state, progress.size) == ("completed", len(data))
        assert await read(node, data) == data
        assert (await request(node, data)).state == "completed"
        assert not os.path.exists(node.store.layout.blob(sha1_of(data)))
        # Only in this zone, and its origin says so: no other channel is offered it.
        assert await node.channel_files.find(TRACKING, sha1_of(data), Subject("user", "ben")) is None
        assert await node.origins.of(sha1_of(data)) == {f"{node.identity.node_id}/{RECORDINGS}"}

    run(tmp_path, work)


def test_absent_and_elsewhere(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        assert (await request(node, DATA)).state == "not-found"
        put_sharded(tmp_path / "resource", DATA)
        assert (await request(node, DATA, TRACKING)).state == "not-found"
        assert (await request(node, DATA)).state == "completed"

    run(tmp_path, work)


def test_wrong_content_is_never_served_nor_hashed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    before = resources.hash_counting

    def counting(file: Any, count: Any) -> Any:
        hashed.append("once")
        return before(file, count)

    monkeypatch.setattr(resources, "hash_counting", counting)

    async def work(node: Node) -> None:
        path = put_sharded(tmp_path / "resource", DATA)
        path.write_bytes(DATA[:-1] + b"!")
        for _ in range(3):
            assert (await request(node, DATA)).state == "not-found"
        assert len(hashed) == 1
        put_flat(tmp_path / "resource", DATA)
        assert (await request(node, DATA)).state == "completed"
        assert await read(node, DATA) == DATA

    run(tmp_path, work)


@pytest.mark.parametrize("size", [1000, 2 << 20], ids=["small", "large"])
def test_a_change_is_noticed(tmp_path: Path, size: int) -> None:
    data, other = os.urandom(size), os.urandom(size)

    async def work(node: Node) -> None:
        path = put_sharded(tmp_path / "resource", data)
        assert (await request(node, data)).state == "completed"
        assert await read(node, data) == data
        stat = path.stat()
        path.write_bytes(other)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises((NotFound, LinkChanged)):
            await read(node, data)
        assert (await request(node, data)).state == "not-found"
        path.write_bytes(data)
        assert (await request(node, data)).state == "completed"
        assert await read(node, data) == data
        # The same bytes with another fingerprint are hashed first, and served.
        path.write_bytes(data)
        assert await read(node, data) == data
        path.unlink()
        with pytest.raises((NotFound, LinkChanged)):
            await read(node, data)

    run(tmp_path, work)


def test_known_files_are_not_hashed_again_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def first(node: Node) -> None:
        put_sharded(tmp_path / "resource", LARGE)
        assert (await request(node, LARGE)).state == "completed"

    def never(*_: object) -> object:
        raise AssertionError("hashed again")

    async def second(node: Node) -> None:
        monkeypatch.setattr(resources, "hash_counting", never)
        assert await read(node, LARGE) == LARGE

    run(tmp_path, first)
    run(tmp_path, second)


def test_after_the_database_was_lost(tmp_path: Path) -> None:
    async def first(node: Node) -> None:
        put_sharded(tmp_path / "resource", LARGE)
        assert (await request(node, LARGE)).state == "completed"
        await node.data.flush()

    async def second(node: Node) -> None:
        await node.acknowledge_volume()
        _, _, content = await node.channel_files.open_anywhere(sha1_of(LARGE), READER)
        content.close()
        assert await read(node, LARGE) == LARGE

    run(tmp_path, first)
    for path in (tmp_path / "metadata").glob("kachery-lab.db*"):
        path.unlink()
    run(tmp_path, second, rebuild=True, start=False)


def test_what_was_deleted_stays_absent(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        put_sharded(tmp_path / "resource", DATA)
        assert (await request(node, DATA)).state == "completed"
        await node.buckets.forget(RECORDINGS, ObjectPath.parse(file_path(sha1_of(DATA))), READER)
        assert (await request(node, DATA)).state == "not-found"
        assert await node.channel_files.find(RECORDINGS, sha1_of(DATA), READER) is None

    run(tmp_path, work)


def test_the_zones_owner_decides(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        put_sharded(tmp_path / "resource", DATA)
        own = node.identity.node_id
        await node.authorizations.revoke(ANN, RECORDINGS, "node", own)
        refused = await request(node, DATA)
        assert refused.state == "error"
        assert "provideFiles" in str(refused.error)
        await node.authorizations.grant(ANN, RECORDINGS, "node", own, Role.PROVIDE_FILES)
        assert (await request(node, DATA)).state == "completed"

    run(tmp_path, work)


def test_bounded_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = most = 0
    before = resources.hash_counting

    def slow(file: Any, count: Any) -> Any:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.15)
        found = before(file, count)
        running -= 1
        return found

    monkeypatch.setattr(resources, "hash_counting", slow)
    monkeypatch.setattr(resources, "MOST_WAITING", 4)

    async def work(node: Node) -> None:
        files = [bytes([number]) * 100 for number in range(12)]
        for data in files:
            put_sharded(tmp_path / "resource", data)
        states = [(await request(node, data, wait=0.0)).state for data in files]
        assert set(states) <= {"queued", "running"}
        assert len(node.resources._jobs) == resources.AT_ONCE + 4
        # Asking the same again is the same work.
        await asyncio.gather(*(request(node, files[0]) for _ in range(20)))
        until = time.monotonic() + 20
        while time.monotonic() < until:
            states = [(await request(node, data, wait=0.5)).state for data in files]
            if set(states) == {"completed"}:
                break
        assert set(states) == {"completed"}
        assert most <= resources.AT_ONCE

    run(tmp_path, work)


# -- S11: paths ------------------------------------------------------------------------------------------------------


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        root = tmp_path / "resource"
        secret = tmp_path / "outside"
        secret.write_bytes(DATA)
        sharded(root, sha1_of(DATA)).symlink_to(secret)
        assert (await request(node, DATA)).state == "not-found"
        sharded(root, sha1_of(DATA)).unlink()
        (root / "sha1").rename(root.parent / "moved")
        (root / "sha1").symlink_to(root.parent / "moved")
        put = root.parent / "moved" / sha1_of(DATA)
        put.write_bytes(DATA)
        assert (await request(node, DATA)).state == "not-found"
        (root / "sha1").unlink()
        put_sharded(root, DATA)
        assert (await request(node, DATA)).state == "completed"

    run(tmp_path, work)


def test_link_records_follow_the_rules_for_links(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        root = tmp_path / "resource"
        own = node.storage.private_key
        stolen = own.read_bytes()
        for path in (str(own), "/proc/self/environ", "/dev/zero", "relative", str(tmp_path), "/nowhere\x00"):
            for data in (stolen, b""):
                record = {"path": path, "size": len(data), "mtime": 0.0, "sha1": sha1_of(data)}
                sharded(root, sha1_of(data), "linked_files").write_text(json.dumps(record))
                assert (await request(node, data)).state == "not-found", path
        for junk in (b"", b"[]", b"{", b'{"path": 1, "size": 2}', b"x" * 100_000):
            sharded(root, sha1_of(DATA), "linked_files").write_bytes(junk)
            assert (await request(node, DATA)).state == "not-found"
        put_linked(root, DATA)
        assert (await request(node, DATA)).state == "completed"

    run(tmp_path, work)


def test_pipes_and_directories(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        os.mkfifo(sharded(tmp_path / "resource", sha1_of(DATA)))
        sharded(tmp_path / "resource", sha1_of(LARGE)).mkdir()
        for data in (DATA, LARGE):
            assert (await request(node, data)).state == "not-found"

    run(tmp_path, work)


@pytest.mark.parametrize("place", ["storage", "storage/sha1", "."])
def test_the_servers_own_directories_are_refused(tmp_path: Path, place: str) -> None:
    async def nothing(_node: Node) -> None:
        raise AssertionError("started")

    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    with pytest.raises(StartRefused, match="not apart"):
        run_on(tmp_path, nothing, resource_dirs=(f"default={tmp_path / place}",))
