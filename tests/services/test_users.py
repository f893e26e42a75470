"""Users: made and removed by admins; who owns something stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from kachery_lab.core.ids import UserName
from kachery_lab.core.roles import Role
from kachery_lab.errors import Conflict, Forbidden, NotFound
from kachery_lab.node import Node
from kachery_lab.services.principals import OPERATOR
from tests.services.opened import ADMIN, ANN, LOCAL, READER, RECORDINGS, furnish, outcomes, run_on

CAROL = UserName("carol@example.org")


def test_made_seen_removed(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        for actor in (ADMIN, OPERATOR):
            await node.users.create(actor, CAROL)
            assert CAROL in dict(node.users.list(actor))
            assert node.users.get(actor, CAROL)[0] == CAROL
            with pytest.raises(Conflict):
                await node.users.create(actor, CAROL)
            await node.users.remove(actor, CAROL)
            with pytest.raises(NotFound):
                node.users.get(actor, CAROL)
            with pytest.raises(NotFound):
                await node.users.remove(actor, CAROL)
        assert await outcomes(node, "user.create") == [
            *[("user:boss", CAROL, "done"), ("user:boss", CAROL, "conflict")],
            *[("operator:operator", CAROL, "done"), ("operator:operator", CAROL, "conflict")],
        ]

    run_on(tmp_path, work)


@pytest.mark.parametrize("actor", [ANN, READER, LOCAL], ids=str)
def test_only_admins(tmp_path: Path, actor: object) -> None:
    async def work(node: Node) -> None:
        before = dict(node.data.users)
        with pytest.raises(Forbidden):
            await node.users.create(actor, CAROL)  # type: ignore[arg-type]
        with pytest.raises(Forbidden):
            await node.users.remove(actor, "admin")  # type: ignore[arg-type]
        with pytest.raises(Forbidden):
            node.users.list(actor)  # type: ignore[arg-type]
        with pytest.raises(Forbidden):
            node.users.get(actor, "nobody")  # type: ignore[arg-type]
        assert node.data.users == before
        assert [entry[2] for entry in await outcomes(node, "user.create")] == ["forbidden"]
        assert [entry[2] for entry in await outcomes(node, "user.remove")] == ["forbidden"]

    run_on(tmp_path, work)


def test_owners_stay(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        with pytest.raises(Conflict, match="channel recordings, node"):
            await node.users.remove(ADMIN, "ann")
        await node.channels.update(ADMIN, RECORDINGS, {"owner": UserName("ben")})
        with pytest.raises(Conflict, match="node"):
            await node.users.remove(ADMIN, "ann")

    run_on(tmp_path, work)


def test_rights_and_tokens_go_with_a_user(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        _, secret = await node.tokens.create(ADMIN, CAROL, ["read"])
        await node.authorizations.grant(ANN, RECORDINGS, "user", CAROL, Role.ALL)
        assert node.tokens.find(secret) is not None
        assert node.data.user_roles(RECORDINGS, CAROL) == Role.ALL
        await node.users.remove(ADMIN, CAROL)
        assert node.tokens.find(secret) is None
        assert node.data.user_roles(RECORDINGS, CAROL) == Role.NONE
        await node.users.create(ADMIN, CAROL)
        assert node.tokens.find(secret) is None
        assert node.data.user_roles(RECORDINGS, CAROL) == Role.NONE

    run_on(tmp_path, work)
