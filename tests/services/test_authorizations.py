"""Effective roles are what is asked and granted; passcodes add to the grant; every change works at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import NodeId, UserName
from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden, InvalidInput, NotFound
from kachery_lab.node import Node
from kachery_lab.services.principals import Principal
from kachery_lab.services.subjects import Subject, subject_of
from tests.services.opened import ADMIN, ANN, BEN, NARROW, NODE, OTHER, READER, RECORDINGS, TRACKING, furnish, run_on

FILES = Role.REQUEST_FILES | Role.PROVIDE_FILES


@pytest.mark.parametrize(
    ("asked", "granted", "effective"),
    [
        (Role.ALL, Role.ALL, Role.ALL),
        (Role.ALL, FILES, FILES),
        (FILES, Role.ALL, FILES),
        (Role.REQUEST_FILES, Role.PROVIDE_FILES, Role.NONE),
        (Role.ALL, None, Role.NONE),
        (None, Role.ALL, Role.NONE),
    ],
)
def test_asked_and_granted(tmp_path: Path, asked: Role | None, granted: Role | None, effective: Role) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        if asked is not None:
            await node.authorizations.join(BEN, RECORDINGS, OTHER, asked)
        if granted is not None:
            await node.authorizations.grant(ANN, RECORDINGS, "node", OTHER, granted)
        assert node.data.node_roles(RECORDINGS, OTHER) == effective
        assert node.roles.roles(Subject("node", OTHER), RECORDINGS) == effective
        assert node.data.node_roles(TRACKING, OTHER) == Role.NONE

    run_on(tmp_path, work)


def test_a_change_works_at_once(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        await node.authorizations.join(BEN, RECORDINGS, OTHER)
        member, person = Subject("node", OTHER), Subject("user", "ben")
        for roles in (Role.ALL, Role.REQUEST_FILES, FILES):
            await node.authorizations.grant(ANN, RECORDINGS, "node", OTHER, roles)
            await node.authorizations.grant(ANN, RECORDINGS, "user", "ben", roles)
            for subject in (member, person):
                assert node.roles.roles(subject, RECORDINGS) == roles
        await node.authorizations.revoke(ANN, RECORDINGS, "node", OTHER)
        await node.authorizations.revoke(ANN, RECORDINGS, "user", "ben")
        for subject in (member, person):
            assert node.roles.roles(subject, RECORDINGS) == Role.NONE
            with pytest.raises(Forbidden, match="requestFiles in the channel recordings"):
                node.roles.require(subject, RECORDINGS, Role.REQUEST_FILES)
        with pytest.raises(NotFound):
            await node.authorizations.revoke(ANN, RECORDINGS, "user", "ben")

    run_on(tmp_path, work)


def test_owners_clients_and_scopes(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        assert node.roles.roles(Subject("user", "ann"), RECORDINGS) == Role.ALL
        assert node.roles.roles(Subject("user", "ben"), RECORDINGS) == Role.NONE
        # A node never has the roles of its owner.
        await node.authorizations.join(ANN, RECORDINGS, NODE)
        assert node.data.node_roles(RECORDINGS, NODE) == Role.NONE
        await node.authorizations.grant(ANN, RECORDINGS, "client", OTHER, Role.REQUEST_FILES)
        # An authorization registers nobody.
        assert node.roles.roles(Subject("client", OTHER), RECORDINGS) == Role.NONE
        await node.clients.add(ADMIN, OTHER, UserName("ben"), "")
        assert node.roles.roles(Subject("client", OTHER), RECORDINGS) == Role.REQUEST_FILES
        assert node.roles.roles(Subject("client", "e" * 64), RECORDINGS) == Role.NONE
        reads = subject_of(Principal("user", "ann", frozenset({"read"})), NODE)
        writes = subject_of(Principal("user", "ann", frozenset({"write"})), NODE)
        assert node.roles.roles(reads, RECORDINGS) | node.roles.roles(writes, RECORDINGS) == Role.ALL
        assert node.roles.roles(reads, RECORDINGS) & node.roles.roles(writes, RECORDINGS) == Role.NONE
        assert node.roles.roles(subject_of(Principal("user", "ann", frozenset({"metrics"})), NODE), RECORDINGS) == 0
        assert node.roles.roles(Subject("user", "ann"), "absent") == Role.NONE

    run_on(tmp_path, work)


def test_passcodes_add_to_the_grant(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        service = node.authorizations
        files, text = await service.add_passcode(ANN, RECORDINGS, Role.REQUEST_FILES, "visitors")
        feeds, _ = await service.add_passcode(ANN, RECORDINGS, Role.REQUEST_FEEDS, passcode="correct horse")
        await service.join(BEN, RECORDINGS, OTHER, shown=[text, "correct horse", "not one of them"])
        assert node.data.node_roles(RECORDINGS, OTHER) == Role.REQUEST_FILES | Role.REQUEST_FEEDS
        await service.grant(ANN, RECORDINGS, "node", OTHER, Role.REQUEST_TASKS)
        assert node.data.node_roles(RECORDINGS, OTHER) == Role(7)
        await service.join(BEN, RECORDINGS, OTHER, Role.REQUEST_FILES, shown=[text])
        assert node.data.node_roles(RECORDINGS, OTHER) == Role.REQUEST_FILES
        await service.join(BEN, RECORDINGS, OTHER, shown=[text, "correct horse"])
        await service.remove_passcode(ANN, RECORDINGS, files.id)
        assert node.data.node_roles(RECORDINGS, OTHER) == Role.REQUEST_FEEDS | Role.REQUEST_TASKS
        assert [one.id for one in service.passcodes(ANN, RECORDINGS)] == [feeds.id]
        assert text not in str(
            await node.database.read(lambda conn: conn.exec_driver_sql("SELECT * FROM passcodes").all())
        )
        # The same text in another channel is another passcode.
        await service.join(BEN, TRACKING, OTHER, shown=["correct horse"])
        assert node.data.node_roles(TRACKING, OTHER) == Role.NONE

    run_on(tmp_path, work)


@pytest.mark.parametrize(
    "wrong",
    [{"passcode": "short"}, {"passcode": ""}, {"passcode": "x" * 41}, {"roles": Role.NONE}, {"label": "a\nb"}],
    ids=str,
)
def test_bad_passcodes(tmp_path: Path, wrong: dict[str, Any]) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        with pytest.raises(InvalidInput):
            await node.authorizations.add_passcode(ANN, RECORDINGS, **{"roles": Role.ALL, **wrong})
        assert node.data.passcodes == {}

    run_on(tmp_path, work)


def test_only_the_owner_grants(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        service = node.authorizations
        passcode, _ = await service.add_passcode(ANN, RECORDINGS, Role.ALL)
        before = (dict(node.data.authorizations), dict(node.data.passcodes))
        for actor, error in ((BEN, NotFound), (READER, Forbidden)):
            with pytest.raises(error):
                await service.grant(actor, RECORDINGS, "user", "ben", Role.ALL)
            with pytest.raises(error):
                await service.revoke(actor, RECORDINGS, "user", "ben")
            with pytest.raises(error):
                await service.add_passcode(actor, RECORDINGS, Role.ALL)
            with pytest.raises(error):
                await service.remove_passcode(actor, RECORDINGS, passcode.id)
            with pytest.raises(error):
                service.granted(actor, RECORDINGS)
            with pytest.raises(error):
                service.passcodes(actor, RECORDINGS)
            with pytest.raises(error):
                service.memberships(actor, RECORDINGS, None)
        assert (node.data.authorizations, node.data.passcodes) == before

    run_on(tmp_path, work)


@pytest.mark.parametrize(
    ("kind", "subject"), [("node", "f"), ("user", "a b"), ("client", "a b"), ("owner", "ann"), ("node", "F" * 64)]
)
def test_bad_subjects(tmp_path: Path, kind: Any, subject: str) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        users = dict(node.data.users)
        with pytest.raises(InvalidInput):
            await node.authorizations.grant(ANN, RECORDINGS, kind, subject, Role.ALL)
        with pytest.raises(InvalidInput):
            await node.authorizations.grant(ANN, RECORDINGS, "user", "eve", Role.NONE)
        assert node.data.users == users
        assert {key for key in node.data.authorizations if key[0] == RECORDINGS} == set()

    run_on(tmp_path, work)


def test_joining_and_leaving(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        service = node.authorizations
        with pytest.raises(NotFound):
            await service.join(ANN, RECORDINGS, OTHER)
        with pytest.raises(NotFound):
            await service.join(ANN, "absent", NODE)
        with pytest.raises(InvalidInput):
            await service.join(ANN, RECORDINGS, NODE, offer="everything")  # type: ignore[arg-type]
        with pytest.raises(InvalidInput):
            await service.join(ANN, RECORDINGS, NODE, shown=["short"])
        assert not [one for one in node.data.memberships if one[0] == RECORDINGS]
        assert (await service.join(BEN, RECORDINGS, OTHER)).offer == "local"
        assert [one.node_id for one in service.memberships(ANN, RECORDINGS, None)] == [OTHER]
        assert [one.channel for one in service.memberships(BEN, None, OTHER)] == [RECORDINGS]
        for actor in (Principal("user", "eve", frozenset({"channel-owner"})), READER):
            with pytest.raises((NotFound, Forbidden)):
                await service.leave(actor, RECORDINGS, OTHER)
        assert (RECORDINGS, OTHER) in node.data.memberships
        await service.leave(ANN, RECORDINGS, OTHER)  # the channel's owner puts it out
        await service.join(BEN, RECORDINGS, OTHER)
        await service.leave(BEN, RECORDINGS, OTHER)  # the node's owner takes it out
        with pytest.raises(NotFound):
            await service.leave(ADMIN, RECORDINGS, NodeId(OTHER))

    run_on(tmp_path, work)


def test_a_token_for_some_channels(tmp_path: Path) -> None:
    """ann's token for `recordings` reaches nothing of what ann has elsewhere."""

    async def work(node: Node) -> None:
        await furnish(node)
        service = node.authorizations
        await node.channels.update(ADMIN, TRACKING, {"owner": UserName("ann")})
        await service.join(ADMIN, TRACKING, OTHER)
        await service.join(NARROW, RECORDINGS, NODE)
        with pytest.raises(Forbidden):
            await service.join(NARROW, TRACKING, NODE)
        with pytest.raises(NotFound):
            await service.leave(NARROW, TRACKING, OTHER)
        with pytest.raises(NotFound):
            await service.grant(NARROW, TRACKING, "user", "eve", Role.ALL)
        await service.join(ANN, TRACKING, NODE)
        assert [one.channel for one in service.memberships(NARROW, None, NODE)] == [RECORDINGS]
        assert {one.channel for one in service.memberships(ANN, None, NODE)} == {RECORDINGS, TRACKING}
        await service.grant(NARROW, RECORDINGS, "user", "eve", Role.ALL)
        assert node.data.user_roles(RECORDINGS, "eve") == Role.ALL

    run_on(tmp_path, work)
