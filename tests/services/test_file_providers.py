"""Providing files: what is offered, to whom, how often, and that everything else is silence."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import ChunkOf, FileKey, NodeId, Sha1
from kachery_lab.errors import Forbidden, NotFound, StorageFull, Unavailable
from kachery_lab.services import file_providers
from kachery_lab.services.file_providers import Terms
from tests.services.opened import LOCAL, NODE, OTHER
from tests.services.providing import World, chunk_key, in_world, sha1_of


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_providers, "LINGER", 0.05)
    monkeypatch.setattr(file_providers, "STARTED_AFTER", 0.1)


def test_a_local_file_is_provided_and_one_that_is_not_here_is_silence(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        data = os.urandom(3000)
        sha1 = await world.store(data)
        assert await world.ask(sha1) == ["finished"]
        assert world.shelf.bucket == {sha1: data}
        assert await world.ask(sha1_of(b"nobody has this")) == []

    in_world(tmp_path, work)


def test_a_slow_upload_says_that_it_started(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        sha1 = await world.store(b"slow")
        world.shelf.seconds = 0.3
        assert await world.ask(sha1) == ["started", "finished"]

    in_world(tmp_path, work)


def test_own_requests_and_those_without_terms_are_not_answered(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        sha1 = await world.store(b"mine")
        assert await world.ask(sha1, sender=NodeId(world.node.identity.node_id)) == []
        world.shelf.terms_now = None
        assert await world.ask(sha1) == []
        world.shelf.terms_now = Terms("hub/recordings", True)
        assert await world.ask(sha1) == ["finished"]

    in_world(tmp_path, work)


def test_what_came_from_another_channel_is_never_offered(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        origins = world.node.origins
        mine, theirs, both, local_too = [sha1_of(data) for data in (b"mine", b"theirs", b"both", b"local too")]
        await origins.record(mine, "hub/recordings")
        await origins.record(theirs, "hub/tracking")
        await origins.record(both, "hub/tracking")
        await origins.record(both, "hub/recordings")
        await origins.record(local_too, "hub/tracking")
        await origins.record(local_too, "local")
        for data in (b"mine", b"theirs", b"both", b"local too"):
            await world.received(data)
        assert await world.ask(mine) == ["finished"]
        assert await world.ask(theirs) == []
        assert await world.ask(both) == ["finished"]
        assert await world.ask(local_too) == ["finished"]
        assert theirs not in world.shelf.bucket
        # Nor a part of it.
        assert await world.ask(chunk_key(b"eir", theirs, 2, 5)) == []
        assert await world.ask(chunk_key(b"in", mine, 1, 3)) == ["finished"]

    in_world(tmp_path, work)


def test_an_offer_of_uploads_adds_nothing(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        world.shelf.terms_now = Terms("hub/recordings", False)
        sha1 = await world.store(b"local only")
        assert await world.ask(sha1) == []
        world.shelf.bucket[sha1] = b"local only"
        assert await world.ask(sha1) == ["finished"]
        assert world.shelf.puts == []

    in_world(tmp_path, work)


def test_a_chunk_is_verified_before_it_goes_out(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        data = os.urandom(3_000_000)
        parent = await world.store(data)
        part = data[1000:2_000_000]
        assert await world.ask(chunk_key(part, parent, 1000, 2_000_000)) == ["finished"]
        assert world.shelf.bucket[sha1_of(part)] == part
        lies = [
            FileKey(Sha1("ab" * 20), None, ChunkOf(FileKey(parent), 1000, 2_000_000)),
            chunk_key(data[5:], parent, 5, len(data) + 1),
            chunk_key(data[5:], parent, len(data) + 10, len(data) + 20),
            chunk_key(b"", parent, 2**53, 2**53),
        ]
        for key in lies:
            assert await world.ask(key) == [], key
        assert list(world.shelf.bucket) == [sha1_of(part)]
        nested = ChunkOf(chunk_key(part, parent, 1000, 2_000_000), 0, 10)
        assert await world.ask(FileKey(sha1_of(part[:10]), None, nested)) == []
        # The whole as a chunk of itself, and an empty range of it, are what they say.
        assert await world.ask(chunk_key(data, parent, 0, len(data))) == ["finished"]
        assert await world.ask(chunk_key(b"", parent, 7, 7)) == ["finished"]

    in_world(tmp_path, work)


def test_a_linked_file_that_changed_is_silence(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        path = tmp_path / "raw.dat"
        path.write_bytes(b"first content")
        stat = path.stat()
        linked = await world.node.links.link(world.node.blobs, str(path), stat.st_size, stat.st_mtime, LOCAL)
        assert await world.ask(linked.sha1) == ["finished"]
        path.write_bytes(b"other content")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        world.shelf.bucket.clear()
        assert await world.ask(linked.sha1) == []
        assert world.shelf.bucket == {}

    in_world(tmp_path, work)


def test_one_upload_however_many_ask(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        sha1 = await world.store(b"popular")
        world.shelf.seconds = 0.3
        keys = [FileKey(sha1), FileKey(sha1, Sha1("cd" * 20))]
        for number in range(200):
            await world.request(keys[number % 2], sender=(NODE, OTHER)[number % 2])
        await world.idle()
        assert world.shelf.puts == [sha1]
        # One answer for each form of the name, and one more for those who asked before they could hear it.
        assert world.bands.statuses(sha1).count("finished") <= 4
        assert world.bands.statuses(sha1).count("started") == 2
        await world.request(sha1)
        await world.idle()
        assert world.bands.statuses(sha1)[-1] == "finished"

    in_world(tmp_path, work)


def test_who_asks_right_after_the_answer_is_answered_too(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        sha1 = await world.store(b"popular")
        await world.request(sha1)
        while not world.bands.said:
            await asyncio.sleep(0.001)
        for _ in range(500):
            await world.request(sha1)
        await world.idle()
        assert world.bands.statuses(sha1) == ["finished", "finished"]
        assert world.shelf.puts == [sha1]

    in_world(tmp_path, work)


def test_a_failed_upload_is_silence_and_tried_again_when_asked_again(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        sha1 = await world.store(b"unlucky")
        for error in (Forbidden("no"), NotFound("deleted"), StorageFull("full"), Unavailable("gone")):
            world.shelf.fails = error
            assert await world.ask(sha1) == []
        world.shelf.fails = None
        assert await world.ask(sha1) == ["finished"]

    in_world(tmp_path, work)


def test_terms_that_end_while_it_waits_end_the_upload(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        names = [await world.store(b"file %d" % number) for number in range(20)]
        world.shelf.gate = asyncio.Event()
        for sha1 in names:
            await world.request(sha1)
        await world.running(file_providers.UPLOADS_PER_PEER)
        world.shelf.terms_now = None
        world.shelf.gate.set()
        await world.idle()
        assert len(world.shelf.puts) <= file_providers.UPLOADS_PER_PEER

    in_world(tmp_path, work)


def test_no_peer_takes_every_slot(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        names = [await world.store(b"file %d" % number) for number in range(30)]
        world.shelf.gate = asyncio.Event()
        for sha1 in names[:29]:
            await world.request(sha1, sender=NODE)
        await world.running(file_providers.UPLOADS_PER_PEER)
        # Time for one more, which must not come.
        await asyncio.sleep(0.1)
        assert world.shelf.running == file_providers.UPLOADS_PER_PEER
        await world.request(names[29], sender=OTHER)
        await world.running(file_providers.UPLOADS_AT_ONCE)
        world.shelf.gate.set()
        await world.idle()
        assert world.shelf.most == file_providers.UPLOADS_AT_ONCE
        assert sorted(world.shelf.puts) == sorted(names)
        assert world.shelf.puts.index(names[29]) < 15

    in_world(tmp_path, work)


def test_a_storm_of_requests_is_cut_off_and_others_are_served(tmp_path: Path) -> None:
    async def work(world: World) -> None:
        sha1 = await world.store(b"wanted")
        looked = 0
        before = world.node.blobs.open

        async def counted(name: Sha1) -> Any:
            nonlocal looked
            looked += 1
            return await before(name)

        world.node.blobs.open = counted  # type: ignore[method-assign]
        for number in range(10_000):
            await world.request(Sha1(f"{number:040x}"), sender=OTHER)
            if number % 500 == 0:
                await asyncio.sleep(0)
        assert len(world.providers._jobs) <= file_providers.JOBS_PER_PEER
        assert await world.ask(sha1) == ["finished"]
        assert [status for _, name, status in world.bands.said if name != sha1] == []
        assert looked <= file_providers.REQUESTS_AT_ONCE + file_providers.JOBS_PER_PEER

    in_world(tmp_path, work)


def test_the_manifest_of_a_channels_file_is_the_channels_too(tmp_path: Path) -> None:
    """What says something about a fetched file goes no further than the file."""

    async def work(world: World) -> None:
        data = os.urandom(20_000_001)
        await world.node.origins.record(sha1_of(data), "hub/tracking")

        stored = await world.received(data)
        assert stored.manifest_sha1 is not None
        assert await world.ask(stored.manifest_sha1) == []
        # Stored here by somebody of this node, both are this node's.
        again = await world.store(data)
        assert again == stored.sha1
        assert await world.ask(again) == ["finished"]
        assert await world.ask(stored.manifest_sha1) == ["finished"]

    in_world(tmp_path, work)
