"""The audit has every change and every refusal, for as long as is said."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import update

from kachery_lab.core.ids import NodeLabel, UserName
from kachery_lab.core.roles import Role
from kachery_lab.db import models
from kachery_lab.errors import KacheryLabError
from kachery_lab.node import Node
from tests.services.opened import ADMIN, ANN, NODE, READER, RECORDINGS, run_on


def test_every_change_and_every_refusal(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        user, label = UserName("ann"), NodeLabel("rig-1")
        changes = {
            "user.create": lambda actor: node.users.create(actor, user),
            "token.create": lambda actor: node.tokens.create(actor, user, ["read"]),
            "token.revoke": lambda actor: node.tokens.revoke(actor, node.tokens.list(ADMIN)[-1].id),
            "channel.create": lambda actor: node.channels.create(actor, RECORDINGS, user),
            "channel.update": lambda actor: node.channels.update(actor, RECORDINGS, {"max_bytes": 1}),
            "node.add": lambda actor: node.nodes.add(actor, NODE, user, label),
            "node.approve": lambda actor: node.nodes.approve(actor, NODE),
            "node.update": lambda actor: node.nodes.update(actor, NODE, label=label),
            "membership.join": lambda actor: node.authorizations.join(actor, RECORDINGS, NODE),
            "membership.leave": lambda actor: node.authorizations.leave(actor, RECORDINGS, NODE),
            "authorization.grant": lambda actor: node.authorizations.grant(
                actor, RECORDINGS, "user", "ben", Role.REQUEST_FILES
            ),
            "authorization.revoke": lambda actor: node.authorizations.revoke(actor, RECORDINGS, "user", "ben"),
            "passcode.add": lambda actor: node.authorizations.add_passcode(actor, RECORDINGS, Role.ALL),
            "passcode.remove": lambda actor: node.authorizations.remove_passcode(
                actor, RECORDINGS, node.authorizations.passcodes(ADMIN, RECORDINGS)[0].id
            ),
            "node.remove": lambda actor: node.nodes.remove(actor, NODE),
            "channel.remove": lambda actor: node.channels.remove(actor, RECORDINGS),
            "user.remove": lambda actor: node.users.remove(actor, user),
        }
        for change in changes.values():
            with pytest.raises(KacheryLabError):
                await change(READER)
            await change(ADMIN)
        found = await node.audit.list(None, 1000)
        expected = [(name, who, end) for name in changes for who, end in (("ann", "forbidden"), ("boss", "done"))]
        assert [(one.action, one.principal, one.outcome) for one in reversed(found)] == [
            (name, f"user:{who}", end) for name, who, end in expected
        ]
        assert all(one.detail for one in found if one.outcome == "forbidden")
        assert all(abs(one.at - time.time() * 1000) < 60_000 for one in found)

    run_on(tmp_path, work)


def test_filters_and_pages(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        for number in range(5):
            await node.audit.record(ANN if number % 2 else ADMIN, "test", f"thing {number}", "done")
        found = await node.audit.list(None, 3)
        assert [one.object for one in found] == ["thing 4", "thing 3", "thing 2"]
        assert [one.object for one in await node.audit.list(found[-1].id, 3)] == ["thing 1", "thing 0"]
        assert [one.peer for one in await node.audit.list(None, 9, principal="user:ann")] == ["192.0.2.7"] * 2
        assert [one.object for one in await node.audit.list(None, 9, object="thing 4", outcome="done")] == ["thing 4"]
        assert await node.audit.list(None, 9, action="nothing") == []

    run_on(tmp_path, work)


def test_long_texts_are_cut(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await node.audit.record(ADMIN, "test", "x" * 10_000, "done", "y" * 10_000)
        [entry] = await node.audit.list(None, 1)
        assert (len(entry.object), len(entry.detail)) == (500, 500)

    run_on(tmp_path, work)


def test_kept_as_long_as_is_said(tmp_path: Path) -> None:
    day = 86_400_000

    async def work(node: Node) -> None:
        assert node.audit.retention_days == 30
        for name in ("old", "young"):
            await node.audit.record(ADMIN, "test", name, "done")
        for name, days in (("old", 31), ("young", 29)):
            at = int(time.time() * 1000) - days * day
            statement = update(models.audit).where(models.audit.c.object == name).values(at=at)
            await node.database.write(lambda conn, s=statement: conn.execute(s).rowcount)
        assert await node.audit.prune() == 1
        assert [one.object for one in await node.audit.list(None, 9)] == ["young"]

    run_on(tmp_path, work, audit_days=30)


def test_old_entries_go_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the clock has been steady for long enough."""
    monkeypatch.setattr("kachery_lab.lifecycle.PRUNE_SECONDS", 0.05)

    async def write(node: Node) -> None:
        await node.audit.record(ADMIN, "test", "old", "done")
        statement = update(models.audit).values(at=1)
        await node.database.write(lambda conn: conn.execute(statement).rowcount)

    async def look(node: Node, seconds: float) -> int:
        until = time.monotonic() + seconds
        while await node.audit.list(None, 9) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return len(await node.audit.list(None, 9))

    run_on(tmp_path, write)
    assert run_on(tmp_path, partial(look, seconds=1)) == 1
    monkeypatch.setattr("kachery_lab.services.clock.STEADY_SECONDS", 0.2)
    assert run_on(tmp_path, partial(look, seconds=60)) == 0
