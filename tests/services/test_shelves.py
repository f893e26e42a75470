"""The shelf of this server's own hub: what is asked for becomes a reference in the channel's bucket, no copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kachery_lab.core.ids import NodeId, NodeLabel, Sha1, UserName
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden, NotFound
from kachery_lab.node import Node
from kachery_lab.services.shelves import OwnShelf
from kachery_lab.services.subjects import Subject
from tests.services.opened import ADMIN, LOCAL, NODE, OTHER, run_on
from tests.services.providing import CHANNEL, World, chunk_key, sha1_of


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
            await node.uploads.adopt(CHANNEL, shown, 15, Subject("node", node.identity.node_id), on_demand=True)
        # Its owner may decide otherwise; nobody without a name sees it then either.
        own = NodeId(node.identity.node_id)
        await node.authorizations.join(ADMIN, CHANNEL, own, offer="local", public_local=True)
        assert await world.ask(shown) == ["finished"]
        with pytest.raises(NotFound):
            await node.buckets.open(CHANNEL, ObjectPath.parse(file_path(shown)), None)

    run_on(tmp_path, work)


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
