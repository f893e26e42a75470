"""Providing files: what is offered, to whom, how often, and that everything else is silence."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from kachery_lab.core.ids import ChannelName, ChunkOf, FileKey, NodeId, NodeLabel, Sha1, UserName
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden, NotFound, StorageFull, Unavailable
from kachery_lab.node import Node
from kachery_lab.services import file_providers
from kachery_lab.services.bands import BandHandlers, BandMessage
from kachery_lab.services.blobs import Claim
from kachery_lab.services.file_providers import FileProviders, Found, Terms
from kachery_lab.services.shelves import OwnShelf
from tests.services.opened import ADMIN, LOCAL, NODE, OTHER, run_on

T = TypeVar("T")

CHANNEL = ChannelName("recordings")


class Bands:
    def __init__(self) -> None:
        self.said: list[tuple[str, str, str]] = []

    async def publish(self, channel: str, body: dict[str, Any]) -> None:
        self.said.append((channel, body["fileKey"]["sha1"], body["status"]))

    def channels(self) -> Mapping[str, Role]:
        return {}

    def statuses(self, sha1: str) -> list[str]:
        return [status for _, name, status in self.said if name == sha1]


class Shelf:
    """Somebody else's bucket: a dictionary that can be slow, or refuse."""

    def __init__(self) -> None:
        self.bucket: dict[str, bytes] = {}
        self.terms_now: Terms | None = Terms("hub/recordings", True)
        self.puts: list[str] = []
        self.running = self.most = 0
        self.seconds = 0.0
        self.gate: asyncio.Event | None = None
        self.fails: Exception | None = None

    async def terms(self, channel: str, asker: NodeId) -> Terms | None:
        return self.terms_now

    async def shows(self, channel: str, sha1: Sha1) -> bool:
        return sha1 in self.bucket

    async def put(self, channel: str, key: FileKey, found: Found) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
            if self.gate is not None:
                await self.gate.wait()
            if self.fails is not None:
                raise self.fails
            self.puts.append(key.sha1)
            self.bucket[key.sha1] = b"".join([piece async for piece in found.content.read(found.start, found.end)])
        finally:
            self.running -= 1


class World:
    """A node with files, and providers of its own with a shelf."""

    def __init__(self, node: Node, shelf: Shelf | OwnShelf | None = None) -> None:
        self.node = node
        self.handlers = BandHandlers()
        self.bands = Bands()
        self.shelf = Shelf()
        self.providers = FileProviders(
            self.handlers, node.blobs, node.files, node.origins, NodeId(node.identity.node_id)
        )
        self.providers.serve(self.bands, shelf or self.shelf)

    async def store(self, data: bytes) -> Sha1:
        async def stream() -> Any:
            yield data

        return (await self.node.blobs.store(stream(), Claim(size=len(data)), LOCAL)).sha1

    async def request(self, key: FileKey | Sha1, sender: NodeId = NODE, channel: str = CHANNEL) -> None:
        """Hand a request in, without waiting for what comes of it."""
        key = key if isinstance(key, FileKey) else FileKey(key)
        message = BandMessage(channel, "requestFiles", sender, {"type": "requestFile", "fileKey": key.to_json()})
        for handler in self.handlers.of("requestFile"):
            await handler(message, self.bands)

    async def idle(self) -> None:
        """Until nothing is being worked on."""
        while self.providers._jobs:
            await asyncio.sleep(0.005)

    async def running(self, count: int) -> None:
        """Until so many uploads run. Raises TimeoutError."""
        async with asyncio.timeout(60):
            while self.shelf.running < count:
                await asyncio.sleep(0.005)

    async def ask(self, key: FileKey | Sha1, **more: Any) -> list[str]:
        """Statuses that one request brings."""
        before = len(self.bands.said)
        await self.request(key, **more)
        await self.idle()
        return [status for _, _, status in self.bands.said[before:]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_providers, "LINGER", 0.05)
    monkeypatch.setattr(file_providers, "STARTED_AFTER", 0.1)


def in_world(root: Path, work: Callable[[World], Awaitable[T]]) -> T:
    async def run(node: Node) -> T:
        world = World(node)
        try:
            return await work(world)
        finally:
            await world.providers.close()

    return run_on(root, run)


def sha1_of(data: bytes) -> Sha1:
    return Sha1(hashlib.sha1(data).hexdigest())


def chunk_key(data: bytes, parent: Sha1, start: int, end: int) -> FileKey:
    return FileKey(sha1_of(data), None, ChunkOf(FileKey(parent), start, end))


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
            await world.node.blobs.store_bytes(data, LOCAL.__class__("operator", "channel"))
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


# -- the own hub's shelf ----------------------------------------------------------------------------------------------


async def furnish(node: Node) -> World:
    """A private channel with this server's node, and NODE, which may ask for files."""
    own = NodeId(node.identity.node_id)
    await node.channels.create(ADMIN, CHANNEL, UserName("boss"))
    await node.nodes.add(ADMIN, NODE, UserName("boss"), NodeLabel("rig-1"))
    for member in (own, NODE):
        await node.authorizations.join(ADMIN, CHANNEL, member)
        await node.authorizations.grant(ADMIN, CHANNEL, "node", member, Role.ALL)
    return World(node, OwnShelf(node.data, node.roles, node.buckets, node.uploads, node.files, own))


def test_the_own_hub_adds_a_reference_that_counts_for_this_node(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        world = await furnish(node)
        data = os.urandom(30_000)
        sha1 = await world.store(data)
        assert await node.buckets.find(CHANNEL, file_path(sha1)) is None
        assert await world.ask(sha1) == ["finished"]
        found = await node.buckets.find(CHANNEL, file_path(sha1))
        assert found is not None and found.on_demand and found.principal == f"node:{node.identity.node_id}"
        assert await node.buckets.used(CHANNEL) == 30_000
        # A chunk becomes a file of its own.
        part = data[10:20_000]
        assert await world.ask(chunk_key(part, sha1, 10, 20_000)) == ["finished"]
        assert await node.blobs.stat(sha1_of(part)) == len(part)

    run_on(tmp_path, work)


def test_only_for_those_who_may_request(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        world = await furnish(node)
        sha1 = await world.store(b"for members")
        assert await world.ask(sha1, sender=OTHER) == []
        await node.authorizations.grant(ADMIN, CHANNEL, "node", NODE, Role.ALL & ~Role.REQUEST_FILES)
        assert await world.ask(sha1) == []
        await node.authorizations.grant(ADMIN, CHANNEL, "node", NODE, Role.REQUEST_FILES)
        assert await world.ask(sha1) == ["finished"]
        own = NodeId(node.identity.node_id)
        await node.authorizations.grant(ADMIN, CHANNEL, "node", own, Role.ALL & ~Role.PROVIDE_FILES)
        assert await world.ask(await world.store(b"more")) == []

    run_on(tmp_path, work)


def test_a_deleted_object_stays_deleted_until_it_is_uploaded_again(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        world = await furnish(node)
        sha1 = await world.store(b"a patient's name")
        path = file_path(sha1)
        assert await world.ask(sha1) == ["finished"]
        await node.channels.remove_object(ADMIN, CHANNEL, path)
        assert await world.ask(sha1) == []
        assert await node.buckets.find(CHANNEL, path) is None
        hub = await node.offers.find(CHANNEL)
        await hub.upload(sha1, CHANNEL, LOCAL)
        found = await node.buckets.find(CHANNEL, path)
        assert found is not None and not found.on_demand
        assert await world.ask(sha1) == ["finished"]

    run_on(tmp_path, work)


def test_an_upload_makes_an_on_demand_reference_its_own_and_not_the_other_way(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        world = await furnish(node)
        sha1 = await world.store(b"asked for first")
        path = file_path(sha1)
        assert await world.ask(sha1) == ["finished"]
        hub = await node.offers.find(CHANNEL)
        assert not (await hub.upload_url(sha1, CHANNEL, 15, LOCAL)).exists
        await hub.upload(sha1, CHANNEL, LOCAL)
        assert (await hub.upload_url(sha1, CHANNEL, 15, LOCAL)).exists
        assert await world.ask(sha1) == ["finished"]
        found = await node.buckets.find(CHANNEL, path)
        assert found is not None and not found.on_demand

    run_on(tmp_path, work)


def test_a_channel_that_becomes_public_drops_what_was_on_demand(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        world = await furnish(node)
        shown, uploaded = await world.store(b"shown on demand"), await world.store(b"uploaded")
        hub = await node.offers.find(CHANNEL)
        await hub.upload(uploaded, CHANNEL, LOCAL)
        assert await world.ask(shown) == ["finished"]
        await node.channels.update(ADMIN, CHANNEL, {"public": True})
        assert await node.buckets.find(CHANNEL, file_path(shown)) is None
        assert await world.ask(shown) == []
        assert await world.ask(uploaded) == ["finished"]
        with pytest.raises(Forbidden, match="only what was uploaded"):
            await node.uploads.adopt(CHANNEL, shown, 15, hub_subject(node), on_demand=True)
        # Its owner may decide otherwise; nobody without a name sees it then either.
        own = NodeId(node.identity.node_id)
        await node.authorizations.join(ADMIN, CHANNEL, own, offer="local", public_local=True)
        assert await world.ask(shown) == ["finished"]
        with pytest.raises(NotFound):
            await node.buckets.open(CHANNEL, ObjectPath.parse(file_path(shown)), None)

    run_on(tmp_path, work)


def hub_subject(node: Node) -> Any:
    from kachery_lab.services.subjects import Subject

    return Subject("node", node.identity.node_id)


def test_deletions_and_uploads_survive_a_rebuild(tmp_path: Path) -> None:
    """The log alone says the same: what was on demand, what was deleted, what was uploaded over it."""
    names: dict[str, Sha1] = {}

    async def work(node: Node) -> None:
        world = await furnish(node)
        hub = await node.offers.find(CHANNEL)
        for name in ("demand", "deleted", "promoted"):
            names[name] = await world.store(name.encode())
            assert await world.ask(names[name]) == ["finished"]
        await node.channels.remove_object(ADMIN, CHANNEL, file_path(names["deleted"]))
        await hub.upload(names["promoted"], CHANNEL, LOCAL)

    run_on(tmp_path, work)
    (tmp_path / "metadata" / "kachery-lab.db").unlink()

    async def look(node: Node) -> dict[str, bool | None]:
        found = {name: await node.buckets.find(CHANNEL, file_path(sha1)) for name, sha1 in names.items()}
        return {name: None if reference is None else reference.on_demand for name, reference in found.items()}

    assert run_on(tmp_path, look, rebuild=True) == {"demand": True, "deleted": None, "promoted": False}


def test_the_manifest_of_a_channels_file_is_the_channels_too(tmp_path: Path) -> None:
    """What says something about a fetched file goes no further than the file."""

    async def work(world: World) -> None:
        data = os.urandom(20_000_001)
        await world.node.origins.record(sha1_of(data), "hub/tracking")

        async def stream() -> Any:
            yield data

        operator = LOCAL.__class__("operator", "channel")
        stored = await world.node.blobs.store(stream(), Claim(size=len(data)), operator)
        assert stored.manifest_sha1 is not None
        assert await world.ask(stored.manifest_sha1) == []
        # Stored here by somebody of this node, both are this node's.
        again = await world.store(data)
        assert again == stored.sha1
        assert await world.ask(again) == ["finished"]
        assert await world.ask(stored.manifest_sha1) == ["finished"]

    in_world(tmp_path, work)
