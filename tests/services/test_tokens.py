"""Tokens: made and ended by admins, in force at once, narrowed where that means something."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import UserName
from kachery_lab.core.roles import Role
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from kachery_lab.node import Node
from kachery_lab.services.principals import OPERATOR, SCOPES
from kachery_lab.services.subjects import subject_of
from tests.services.opened import ADMIN, ANN, LOCAL, NODE, READER, RECORDINGS, TRACKING, furnish, outcomes, run_on

USER = UserName("ann")


def test_made_used_ended(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        token, secret = await node.tokens.create(ADMIN, USER, ["write", "read", "read"], "rig")
        assert token.scopes == ("read", "write")
        caller = node.access.by_token(secret, "192.0.2.1")
        assert (caller.name, caller.scopes, caller.channels) == ("ann", {"read", "write"}, None)
        await node.tokens.revoke(ADMIN, token.id)
        with pytest.raises(Unauthenticated):
            node.access.by_token(secret, None)
        with pytest.raises(Conflict):
            await node.tokens.revoke(ADMIN, token.id)
        with pytest.raises(NotFound):
            await node.tokens.revoke(ADMIN, "00000000")
        assert node.tokens.get(OPERATOR, token.id).revoked_at is not None
        assert await outcomes(node, "token.create") == [("user:boss", "ann", "done")]
        assert [entry[2] for entry in await outcomes(node, "token.revoke")] == ["done", "conflict", "not_found"]
        for entry in await node.audit.list(None, 100):
            assert secret not in str(entry)

    run_on(tmp_path, work)


def test_it_expires(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        expires = int(time.time() * 1000) + 3000
        _, secret = await node.tokens.create(ADMIN, USER, ["read"], expires_at=expires)
        assert node.access.by_token(secret, None).name == "ann"
        time.sleep(max(0.0, expires / 1000 - time.time()) + 0.05)
        with pytest.raises(Unauthenticated):
            node.access.by_token(secret, None)

    run_on(tmp_path, work)


@pytest.mark.parametrize("actor", [ANN, READER, LOCAL], ids=str)
def test_only_admins(tmp_path: Path, actor: Any) -> None:
    async def work(node: Node) -> None:
        before = len(node.tokens.list(OPERATOR))
        with pytest.raises(Forbidden):
            await node.tokens.create(actor, USER, ["read"])
        with pytest.raises(Forbidden):
            await node.tokens.revoke(actor, node.tokens.list(OPERATOR)[0].id)
        with pytest.raises(Forbidden):
            node.tokens.list(actor)
        with pytest.raises(Forbidden):
            node.tokens.get(actor, "00000000")
        assert len(node.tokens.list(OPERATOR)) == before
        assert [entry[2] for entry in await outcomes(node, "token.create")] == ["forbidden"]

    run_on(tmp_path, work)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scopes": []},
        {"scopes": ["root"]},
        {"scopes": [["read"]]},
        {"scopes": "read"},
        {"scopes": ["read"], "label": "x" * 101},
        {"scopes": ["read"], "label": "a\x1b[2J"},
        {"scopes": ["read"], "expires_at": 1},
        {"scopes": ["read"], "expires_at": 2**63},
        {"scopes": ["read"], "channels": []},
        {"scopes": ["read"], "channels": ["no channel"]},
        {"scopes": ["read"], "channels": "recordings"},
        {"scopes": ["read"], "channels": [str(number) * 2 for number in range(101)]},
        {"scopes": ["read", "admin"], "channels": ["recordings"]},
        {"scopes": ["client"], "channels": ["recordings"]},
    ],
    ids=str,
)
def test_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    async def work(node: Node) -> None:
        users = dict(node.data.users)
        with pytest.raises(InvalidInput):
            await node.tokens.create(ADMIN, UserName("dora"), **wrong)
        assert node.data.users == users

    run_on(tmp_path, work)


def test_narrowed_to_channels(tmp_path: Path) -> None:
    """What its user may do in other channels, the token may not."""

    async def work(node: Node) -> None:
        await furnish(node)
        await node.authorizations.grant(ADMIN, TRACKING, "user", "ann", Role.ALL)
        _, wide = await node.tokens.create(ADMIN, USER, ["read", "write"])
        _, narrow = await node.tokens.create(ADMIN, USER, ["read"], channels=[RECORDINGS])
        for secret, expected in ((wide, (Role.ALL, Role.ALL)), (narrow, (Role(7), Role.NONE))):
            subject = subject_of(node.access.by_token(secret, None), NODE)
            assert tuple(node.roles.roles(subject, name) for name in (RECORDINGS, TRACKING)) == expected
        with pytest.raises(Forbidden, match="requestFiles in the channel tracking"):
            subject = subject_of(node.access.by_token(narrow, None), NODE)
            node.roles.require(subject, TRACKING, Role.REQUEST_FILES)

    run_on(tmp_path, work)


def test_the_first_admin_token(tmp_path: Path) -> None:
    """It is made at the first start, also when tokens were made before."""

    async def before(node: Node) -> None:
        await node.tokens.create(OPERATOR, USER, ["read"])

    async def after(node: Node) -> set[str]:
        secret = node.metadata.admin_token.read_text().strip()
        return set(node.access.by_token(secret, None).scopes)

    run_on(tmp_path, before, start=False)
    assert run_on(tmp_path, after) == set(SCOPES) - {"metrics"}
    assert run_on(tmp_path, after) == set(SCOPES) - {"metrics"}
    assert (tmp_path / "metadata" / "admin-token").stat().st_mode & 0o777 == 0o600
