"""Nodes: registered by their owners and admins, or by themselves, waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

from kachery_lab.core.ids import NodeId, NodeLabel, UserName
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, NotFound
from kachery_lab.node import Node
from kachery_lab.services import nodes as module
from tests.services.opened import ADMIN, ANN, BEN, NARROW, NODE, OTHER, READER, RECORDINGS, furnish, outcomes, run_on

OWNER, LABEL = UserName("ann"), NodeLabel("rig-1")


def test_owners_see_their_own(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        assert [one.node_id for one in node.nodes.list(ANN)] == [NODE]
        assert {one.node_id for one in node.nodes.list(ADMIN)} == {NODE, OTHER, node.identity.node_id}
        assert node.nodes.require_speaker(ANN, NODE).label == "rig-1"
        for node_id in (OTHER, NodeId("0" * 64)):
            with pytest.raises(NotFound):
                node.nodes.require_speaker(ANN, node_id)
            with pytest.raises(NotFound):
                await node.nodes.remove(ANN, node_id)
            with pytest.raises(NotFound):
                await node.nodes.update(ANN, node_id, label=LABEL)
        with pytest.raises(Forbidden):
            node.nodes.list(READER)

    run_on(tmp_path, work)


def test_adding(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        with pytest.raises(Forbidden):
            await node.nodes.add(BEN, NODE, OWNER, LABEL)
        with pytest.raises(Forbidden):
            await node.nodes.add(READER, NODE, OWNER, LABEL)
        with pytest.raises(Forbidden):
            await node.nodes.add(NARROW, NODE, OWNER, LABEL)
        with pytest.raises(InvalidInput):
            await node.nodes.add(ANN, NodeId("0" * 64), OWNER, LABEL)  # a weak key
        assert NODE not in node.data.nodes
        assert "ann" not in node.data.users
        assert (await node.nodes.add(ANN, NODE, OWNER, LABEL)).approved_at is not None
        with pytest.raises(Conflict):
            await node.nodes.add(ANN, NODE, OWNER, LABEL)
        with pytest.raises(Conflict):
            await node.nodes.add(ADMIN, NODE, UserName("ben"), LABEL)
        assert [entry[2] for entry in await outcomes(node, "node.add")] == [
            *["forbidden"] * 3,
            *["invalid_input", "done", "conflict", "conflict"],
        ]

    run_on(tmp_path, work)


def test_a_node_that_reports_waits(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await node.channels.create(ANN, RECORDINGS)
        await node.authorizations.grant(ANN, RECORDINGS, "node", NODE, Role.ALL)
        assert await node.nodes.report(NODE, OWNER, LABEL) is False
        await node.authorizations.join(ADMIN, RECORDINGS, NODE)
        assert node.data.node_roles(RECORDINGS, NODE) == Role.NONE
        with pytest.raises(Forbidden):
            await node.nodes.report(NODE, UserName("ben"), LABEL)
        with pytest.raises(Forbidden):
            await node.nodes.approve(ANN, NODE)
        assert node.data.node_roles(RECORDINGS, NODE) == Role.NONE
        await node.nodes.approve(ADMIN, NODE)
        assert node.data.node_roles(RECORDINGS, NODE) == Role.ALL
        assert await node.nodes.report(NODE, OWNER, NodeLabel("rig-9")) is True
        assert node.data.nodes[NODE].label == "rig-9"
        assert [entry[2] for entry in await outcomes(node, "node.approve")] == ["forbidden", "done"]

    run_on(tmp_path, work)


def test_waiting_nodes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)

    async def work(node: Node) -> None:
        ids = [NodeId(PrivateKey.generate().public_hex) for _ in range(3)]
        for node_id in ids[:2]:
            await node.nodes.report(node_id, OWNER, LABEL)
        with pytest.raises(Conflict):
            await node.nodes.report(ids[2], OWNER, LABEL)
        assert ids[2] not in node.data.nodes

    run_on(tmp_path, work)


def test_changing(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        assert (await node.nodes.update(ANN, NODE, label=NodeLabel("rig-7"))).label == "rig-7"
        with pytest.raises(Forbidden):
            await node.nodes.update(ANN, NODE, owner=UserName("ben"))
        with pytest.raises(Forbidden):
            await node.nodes.update(NARROW, NODE, label=LABEL)
        assert (node.data.nodes[NODE].owner, node.data.nodes[NODE].label) == ("ann", "rig-7")
        assert (await node.nodes.update(ADMIN, NODE, owner=UserName("eve"))).owner == "eve"
        with pytest.raises(NotFound):
            node.nodes.require_speaker(ANN, NODE)

    run_on(tmp_path, work)


def test_removing(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        await node.authorizations.grant(ANN, RECORDINGS, "node", NODE, Role.ALL)
        await node.authorizations.join(ANN, RECORDINGS, NODE)
        with pytest.raises(Conflict, match="own node stays"):
            await node.nodes.remove(ADMIN, node.identity.node_id)
        with pytest.raises(Forbidden):
            await node.nodes.remove(NARROW, NODE)
        assert node.data.node_roles(RECORDINGS, NODE) == Role.ALL
        await node.nodes.remove(ANN, NODE)
        assert node.data.node_roles(RECORDINGS, NODE) == Role.NONE
        await node.nodes.add(ANN, NODE, OWNER, LABEL)
        assert (RECORDINGS, NODE) not in node.data.memberships
        assert (RECORDINGS, "node", NODE) not in node.data.authorizations

    run_on(tmp_path, work)
