"""Access data: in force at its commit, copied to the volume, restored from there."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from kachery_lab.core.ids import ChannelName, Sha1, UserName
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.roles import Role
from kachery_lab.db import models
from kachery_lab.errors import Conflict, NotFound, StartRefused
from kachery_lab.maintenance.reindex import reindex
from kachery_lab.node import Node
from kachery_lab.services.access_data import dump
from kachery_lab.services.subjects import Subject
from tests.services.opened import ADMIN, ANN, BEN, LOCAL, NODE, OTHER, RECORDINGS, TRACKING, furnish, run_on


def copy_of(root: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((root / "storage" / "access.json").read_text())
    return loaded


async def fill(node: Node) -> dict[str, str]:
    """Something in every table; the secrets that were shown."""
    await furnish(node)
    _, token = await node.tokens.create(ADMIN, UserName("carol"), ["read"], "rig", channels=[RECORDINGS])
    gone, revoked = await node.tokens.create(ADMIN, UserName("carol"), ["write"])
    await node.tokens.revoke(ADMIN, gone.id)
    await node.authorizations.grant(ANN, RECORDINGS, "user", "carol", Role.REQUEST_FILES)
    await node.authorizations.grant(ANN, RECORDINGS, "node", OTHER, Role.REQUEST_FEEDS)
    _, passcode = await node.authorizations.add_passcode(ANN, RECORDINGS, Role.REQUEST_TASKS, "visitors")
    await node.authorizations.join(BEN, RECORDINGS, OTHER, shown=[passcode])
    await node.channels.update(ANN, RECORDINGS, {"max_bytes": 1000})
    stored = await node.blobs.store_bytes(b"abc", LOCAL)
    path = ObjectPath.parse(file_path(stored.sha1))
    await node.buckets.refer(RECORDINGS, path, stored.sha1, 3, Subject("user", "ann"), label="tone")
    await fill_buckets(node)
    return {"token": token, "revoked": revoked, "passcode": passcode}


async def fill_buckets(node: Node) -> None:
    """References of several kinds, principals and labels; replaced, deleted, and of a channel that was made twice."""
    ann, ben, rig = Subject("user", "ann"), Subject("user", "ben"), Subject("node", OTHER)
    await node.authorizations.grant(BEN, TRACKING, "node", OTHER, Role.ALL)
    await node.authorizations.join(BEN, TRACKING, OTHER)

    async def refer(channel: str, path: str, data: bytes, owner: Subject, **more: Any) -> ObjectPath:
        stored = await node.blobs.store_bytes(data, LOCAL)
        parsed = ObjectPath.parse(path or file_path(stored.sha1))
        await node.buckets.refer(channel, parsed, stored.sha1, stored.size, owner, **more)
        return parsed

    await refer(TRACKING, "", b"abc", ben, label="the same bytes, ü")
    await refer(TRACKING, "", b"by a node", rig)
    await refer(TRACKING, "", b"asked for", rig, on_demand=True)
    result = "task_results/" + "/".join(("cd", "cd", "cd", "cd" * 20))
    for number in (1, 2):
        await refer(TRACKING, result, b'{"result":%d}' % number, ben)
    await node.buckets.forget(RECORDINGS, await refer(RECORDINGS, "", b"deleted", ann), ann)
    again = await refer(RECORDINGS, "", b"deleted and back", ann)
    await node.buckets.forget(RECORDINGS, again, ann)
    await refer(RECORDINGS, "", b"deleted and back", ann, label="back")
    twice = ChannelName("made-twice")
    for data in (b"of the first", b"of the second"):
        await node.channels.create(ANN, twice)
        await refer(twice, "", data, ann)
        if data == b"of the first":
            await node.channels.remove(ANN, twice)


async def read_all(node: Node) -> dict[str, bytes]:
    """What the owners read in the buckets."""
    found = {}
    for channel, owner in ((RECORDINGS, "ann"), (TRACKING, "ben"), ("made-twice", "ann")):
        for one in await node.buckets.list(channel, "", 100):
            _, content = await node.buckets.open(channel, ObjectPath.parse(one.path), Subject("user", owner))
            found[f"{channel}/{one.path}"] = b"".join([piece async for piece in content.read(0, content.size)])
            content.close()
    return found


async def state(node: Node) -> dict[str, Any]:
    """All that access data decides, and every field of every reference."""
    names = (RECORDINGS, TRACKING, "made-twice")
    found = [one for name in names for one in await node.buckets.list(name, "", 100)]
    deleted = ObjectPath.parse(file_path(Sha1(hashlib.sha1(b"deleted").hexdigest())))
    try:
        await node.buckets.refer(
            RECORDINGS, deleted, Sha1(deleted.text[-40:]), 7, Subject("user", "ann"), on_demand=True
        )
        gone = False
    except NotFound:
        gone = True
    return {
        "tables": await node.database.read(dump),
        "roles": [
            node.data.node_roles(RECORDINGS, OTHER),
            node.data.user_roles(RECORDINGS, "carol"),
            node.data.user_roles(RECORDINGS, "ann"),
            node.data.node_roles(TRACKING, OTHER),
        ],
        "resource": node.channels.resource_key(node.data.channel(RECORDINGS)).seed_hex(),
        "objects": found,
        "bytes": await read_all(node),
        "used": [await node.buckets.used(name) for name in names],
        "deleted stays deleted": gone,
    }


def test_the_copy_follows_each_change(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        for name in ("ann", "ben"):
            await node.users.create(ADMIN, UserName(name))
            await node.data.flush()
            assert name in {row["name"] for row in copy_of(tmp_path)["tables"]["users"]}
        await node.users.remove(ADMIN, UserName("ben"))
        await node.data.flush()
        assert "ben" not in {row["name"] for row in copy_of(tmp_path)["tables"]["users"]}

    run_on(tmp_path, work)
    assert (tmp_path / "storage" / "access.json").stat().st_mode & 0o777 == 0o600


def test_no_secret_is_in_the_copy(tmp_path: Path) -> None:
    async def work(node: Node) -> list[str]:
        secrets = await fill(node)
        key = node.channels.resource_key(node.data.channel(RECORDINGS)).seed_hex()
        return [*secrets.values(), node.metadata.admin_token.read_text().strip(), key]

    secrets = run_on(tmp_path, work)
    text = (tmp_path / "storage" / "access.json").read_text()
    assert [secret for secret in secrets if secret in text] == []


def test_reindex_restores_everything(tmp_path: Path) -> None:
    """`rm` of the database: users, token hashes, channels, roles and references answer as before."""

    async def before(node: Node) -> tuple[dict[str, str], dict[str, Any]]:
        return await fill(node), await state(node)

    async def rebuild(node: Node) -> None:
        report = await reindex(node)
        assert report.failed == 0
        await node.acknowledge_volume()

    async def after(node: Node) -> dict[str, Any]:
        caller = node.access.by_token(secrets["token"], None)
        assert (caller.name, caller.scopes, caller.channels) == ("carol", {"read"}, {RECORDINGS})
        assert node.tokens.find(secrets["revoked"]) is None
        assert node.tokens.find(node.metadata.admin_token.read_text().strip()) is not None
        return await state(node)

    secrets, expected = run_on(tmp_path, before)
    assert expected["roles"] == [Role.REQUEST_FEEDS | Role.REQUEST_TASKS, Role.REQUEST_FILES, Role.ALL, Role.ALL]
    kinds = {(one.label, one.principal, one.on_demand) for one in expected["objects"]}
    assert kinds == {
        ("tone", "user:ann", False),
        ("back", "user:ann", False),
        ("the same bytes, ü", "user:ben", False),
        ("", "user:ben", False),
        ("", f"node:{OTHER}", False),
        ("", f"node:{OTHER}", True),
        ("", "user:ann", False),
    }
    assert expected["deleted stays deleted"] is True
    assert b"of the first" not in expected["bytes"].values()
    for file in (tmp_path / "metadata").glob("*.db*"):
        file.unlink()
    with pytest.raises(StartRefused, match="reindex"):
        run_on(tmp_path, after)
    run_on(tmp_path, rebuild, start=False, rebuild=True)
    assert run_on(tmp_path, after) == expected


def test_without_the_records_log_no_reference_is_known(tmp_path: Path) -> None:
    """Positive control: it is the log that references come from."""

    async def before(node: Node) -> int:
        await fill(node)
        return len(await node.buckets.list(TRACKING, "", 100))

    async def after(node: Node) -> tuple[int, bool]:
        return len(await node.buckets.list(TRACKING, "", 100)), "ann" in node.data.users

    assert run_on(tmp_path, before) == 4
    for file in (tmp_path / "metadata").glob("*.db*"):
        file.unlink()
    shutil.rmtree(tmp_path / "storage" / "records-log")
    assert run_on(tmp_path, after, start=False, rebuild=True) == (0, True)


def test_without_the_copy_nobody_is_known(tmp_path: Path) -> None:
    """Positive control: it is the copy that `reindex` restores from."""

    async def before(node: Node) -> None:
        await fill(node)

    async def users(node: Node) -> list[str]:
        return sorted(node.data.users)

    run_on(tmp_path, before)
    for file in (tmp_path / "metadata").glob("*.db*"):
        file.unlink()
    (tmp_path / "storage" / "access.json").unlink()
    assert run_on(tmp_path, users, start=False, rebuild=True) == []


@pytest.mark.parametrize(
    "rows", ["", "{", "7", '["ann"]', '[{"name": "ann", "created_at": null}]', '[{"name": {}, "created_at": 1}]']
)
def test_a_damaged_copy_is_refused(tmp_path: Path, rows: str) -> None:
    async def nothing(node: Node) -> None:
        await node.users.create(ADMIN, UserName("ann"))

    run_on(tmp_path, nothing)
    for file in (tmp_path / "metadata").glob("*.db*"):
        file.unlink()
    (tmp_path / "storage" / "access.json").write_text('{"version": 1, "tables": {"users": ' + rows + "}}")
    with pytest.raises(StartRefused, match=r"access\.json cannot be read"):
        run_on(tmp_path, nothing, start=False, rebuild=True)


def test_a_copy_that_cannot_be_written_holds_nothing_up(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        file = node.storage.access
        await node.data.flush()
        file.unlink()
        file.mkdir()
        await node.users.create(ADMIN, UserName("ann"))
        await node.data.flush()
        assert "ann" in node.data.users
        file.rmdir()
        await node.users.create(ADMIN, UserName("ben"))
        await node.data.flush()
        assert {"ann", "ben"} <= {row["name"] for row in copy_of(tmp_path)["tables"]["users"]}

    run_on(tmp_path, work)


def test_many_changes_at_once(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        names = [UserName(f"user-{number}") for number in range(50)]
        await asyncio.gather(*(node.users.create(ADMIN, name) for name in names))
        assert set(names) <= set(node.data.users)
        await node.data.flush()
        assert {row["name"] for row in copy_of(tmp_path)["tables"]["users"]} == set(node.data.users)

    run_on(tmp_path, work)


def test_a_lost_race_is_a_conflict(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        before = node.data.channels
        row = {"channel": "gone", "node_id": NODE, "asked": 1, "offer": "local", "created_at": 1}
        with pytest.raises(Conflict):
            await node.data.change(lambda conn: conn.execute(insert(models.memberships), row).rowcount)
        assert node.data.channels == before
        joins = [node.authorizations.join(ADMIN, RECORDINGS, NODE) for _ in range(5)]
        results = await asyncio.gather(*joins, node.channels.remove(ADMIN, RECORDINGS), return_exceptions=True)
        assert not [one for one in results if isinstance(one, Exception) and not isinstance(one, Conflict | NotFound)]

    run_on(tmp_path, work)
