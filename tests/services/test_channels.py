"""Channels: owners change their own, others do not even see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import ChannelName, Sha1, UserName
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.roles import Role
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, NotFound
from kachery_lab.node import Node
from kachery_lab.services.channels import DEFAULT
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.subjects import Subject
from tests.services.opened import (
    ADMIN,
    ANN,
    BEN,
    LOCAL,
    NARROW,
    NODE,
    OTHER,
    READER,
    RECORDINGS,
    TRACKING,
    furnish,
    outcomes,
    run_on,
)

ABC = Sha1("a9993e364706816aba3e25717850c26c9cd0d89d")


def test_owners_see_their_own(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        assert [one.name for one in node.channels.list(ANN)] == [RECORDINGS]
        assert [one.name for one in node.channels.list(ADMIN)] == [DEFAULT, RECORDINGS, TRACKING]
        await node.channels.update(ADMIN, TRACKING, {"owner": UserName("ann")})
        assert [one.name for one in node.channels.list(ANN)] == [RECORDINGS, TRACKING]
        assert [one.name for one in node.channels.list(NARROW)] == [RECORDINGS]
        for actor, name in ((BEN, TRACKING), (NARROW, TRACKING), (ANN, "absent")):
            with pytest.raises(NotFound):
                node.channels.require_owner(actor, name)
            with pytest.raises(NotFound):
                await node.channels.update(actor, name, {"public": True})
            with pytest.raises(NotFound):
                await node.channels.remove(actor, name)
            with pytest.raises(NotFound):
                await node.channels.used(actor, name)
        assert not node.data.channel(TRACKING).public
        for actor in (READER, LOCAL):
            with pytest.raises(Forbidden):
                node.channels.require_owner(actor, RECORDINGS)

    run_on(tmp_path, work)


def test_making(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        made = await node.channels.create(ANN, RECORDINGS, max_bytes=1000)
        assert (made.owner, made.public, made.max_bytes, made.retention_days) == ("ann", False, 1000, None)
        for actor in (ANN, BEN, ADMIN):
            with pytest.raises(Conflict):
                await node.channels.create(actor, RECORDINGS)
        with pytest.raises(Forbidden):
            await node.channels.create(ANN, TRACKING, UserName("ben"))
        with pytest.raises(Forbidden):
            await node.channels.create(NARROW, TRACKING)
        with pytest.raises(Forbidden):
            await node.channels.create(READER, TRACKING)
        assert TRACKING not in node.data.channels
        assert (await node.channels.create(OPERATOR, TRACKING, UserName("ben"))).owner == "ben"
        assert (await node.channels.create(OPERATOR, ChannelName("third"))).owner == "admin"
        key = node.channels.resource_key(made)
        assert key.public_hex == made.resource_id

    run_on(tmp_path, work)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"max_bytes": value} for value in (0, -1, True, 1.5, "1", 2**53 + 1, 10**400)),
        {"retention_days": 36_501},
        {"public": 1},
        {"public_local": "yes"},
        {"epoch": 7},
    ],
    ids=lambda wrong: str(wrong)[:40],
)
def test_bad_changes(tmp_path: Path, wrong: dict[str, Any]) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        before = node.data.channel(RECORDINGS)
        with pytest.raises(InvalidInput):
            await node.channels.update(ANN, RECORDINGS, wrong)
        assert node.data.channel(RECORDINGS) == before
        assert await outcomes(node, "channel.update") == [("user:ann", RECORDINGS, "invalid_input")]

    run_on(tmp_path, work)


def test_retention_at_its_limit(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        await node.channels.update(ANN, RECORDINGS, {"retention_days": 36_500})
        assert await node.buckets.expire() == 0
        assert (await node.channels.update(ANN, RECORDINGS, {"retention_days": None})).retention_days is None

    run_on(tmp_path, work)


def test_making_it_public(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        for name in (RECORDINGS, TRACKING):
            await node.authorizations.join(ADMIN, name, NODE)
        before = node.data.channel(RECORDINGS)
        after = await node.channels.update(ANN, RECORDINGS, {"public": True})
        assert (after.public, after.epoch) == (True, before.epoch + 1)
        assert node.data.memberships[RECORDINGS, NODE].offer == "uploaded"
        with pytest.raises(Conflict, match="open to anyone"):
            await node.authorizations.join(ANN, RECORDINGS, NODE, offer="local")
        assert node.data.memberships[RECORDINGS, NODE].offer == "uploaded"
        assert (
            await node.authorizations.join(ANN, RECORDINGS, NODE, offer="local", public_local=True)
        ).offer == "local"
        await node.channels.update(BEN, TRACKING, {"public": True, "public_local": True})
        assert node.data.memberships[TRACKING, NODE].offer == "local"

    run_on(tmp_path, work)


async def _store(node: Node, channel: str) -> ObjectPath:
    stored = await node.blobs.store_bytes(b"abc", LOCAL)
    path = ObjectPath.parse(file_path(stored.sha1))
    await node.buckets.refer(channel, path, stored.sha1, stored.size, Subject("user", "ann"), label="tone")
    return path


def test_objects(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        await node.authorizations.grant(BEN, TRACKING, "user", "ann", Role.ALL)
        path = await _store(node, RECORDINGS)
        await _store(node, TRACKING)
        assert await node.channels.used(ANN, RECORDINGS) == 3
        found = await node.channels.objects(ANN, RECORDINGS, "", 10)
        assert [(one.path, one.label, one.principal) for one in found] == [(path.text, "tone", "user:ann")]
        assert await node.channels.objects(ANN, RECORDINGS, path.text, 10) == []
        for actor, name in ((BEN, RECORDINGS), (NARROW, TRACKING)):
            with pytest.raises(NotFound):
                await node.channels.objects(actor, name, "", 10)
            with pytest.raises(NotFound):
                await node.channels.remove_object(actor, name, path.text)
        with pytest.raises(InvalidInput):
            await node.channels.remove_object(ANN, RECORDINGS, "../../etc/passwd")
        assert await node.channels.used(ANN, RECORDINGS) == 3
        await node.channels.remove_object(ANN, RECORDINGS, path.text)
        with pytest.raises(NotFound):
            await node.channels.remove_object(ANN, RECORDINGS, path.text)
        assert await node.buckets.find(TRACKING, path.text) is not None
        assert (await node.blobs.stat(ABC)) == 3

    run_on(tmp_path, work)


def test_removing(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        await node.authorizations.join(ADMIN, RECORDINGS, OTHER)
        await node.authorizations.grant(BEN, TRACKING, "user", "ann", Role.ALL)
        path = await _store(node, RECORDINGS)
        await _store(node, TRACKING)
        with pytest.raises(Conflict, match="default"):
            await node.channels.remove(ADMIN, DEFAULT)
        await node.channels.remove(ANN, RECORDINGS)
        assert RECORDINGS not in node.data.channels
        assert (RECORDINGS, OTHER) not in node.data.memberships
        assert await node.buckets.find(TRACKING, path.text) is not None
        assert (await node.blobs.stat(ABC)) == 3
        again = await node.channels.create(ANN, RECORDINGS)
        assert await node.channels.objects(ANN, again.name, "", 10) == []

    run_on(tmp_path, work)
