"""Client keys: registered in three ways, acting with their user's roles or an authorization of their own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kachery_lab.core.ids import ChannelName, UserName
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role
from kachery_lab.core.signatures import sign_2021
from kachery_lab.errors import (
    Conflict,
    Forbidden,
    InvalidInput,
    KacheryLabError,
    NotFound,
    TooManyRequests,
    Unauthenticated,
)
from kachery_lab.node import Node
from kachery_lab.services import clients
from kachery_lab.services.subjects import Subject
from tests.services.opened import ADMIN, ANN, RECORDINGS, furnish, outcomes, run_on

KEY, OTHER = PrivateKey.from_seed("05" * 32), PrivateKey.from_seed("06" * 32)
ID = KEY.public_hex
CAROL, DAN = UserName("carol"), UserName("dan")
LINK = '{"type":"addClient"}'


def signed(key: PrivateKey) -> str:
    return sign_2021(key, LINK)


def roles(node: Node, channel: ChannelName = RECORDINGS) -> Role:
    return node.roles.roles(Subject("client", ID), channel)


def test_a_key_has_its_users_roles_or_its_own(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        await node.authorizations.grant(ANN, RECORDINGS, "user", CAROL, Role.REQUEST_FILES | Role.PROVIDE_FILES)
        assert roles(node) == Role.NONE
        await node.clients.add(ADMIN, ID, CAROL, "rig")
        assert roles(node) == Role.REQUEST_FILES | Role.PROVIDE_FILES
        assert roles(node, ChannelName("tracking")) == Role.NONE
        await node.authorizations.grant(ANN, RECORDINGS, "client", ID, Role.REQUEST_FILES)
        assert roles(node) == Role.REQUEST_FILES
        await node.authorizations.revoke(ANN, RECORDINGS, "client", ID)
        await node.authorizations.revoke(ANN, RECORDINGS, "user", CAROL)
        assert roles(node) == Role.NONE

    run_on(tmp_path, work)


def test_an_owners_key_has_all_roles_and_speaks_for_the_zone(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        with pytest.raises(Forbidden):
            node.clients.as_owner(ID, RECORDINGS, None)
        await node.clients.add(ADMIN, ID, UserName("ann"), "")
        assert roles(node) == Role.ALL
        actor = node.clients.as_owner(ID, RECORDINGS, "192.0.2.1")
        assert node.channels.require_owner(actor, RECORDINGS).name == RECORDINGS
        for channel in ("tracking", "nowhere"):
            with pytest.raises(Forbidden):
                node.clients.as_owner(ID, channel, None)
        await node.authorizations.grant(ANN, RECORDINGS, "client", ID, Role.REQUEST_FILES)
        with pytest.raises(Forbidden, match="does not speak"):
            node.clients.as_owner(ID, RECORDINGS, None)

    run_on(tmp_path, work)


def test_adding_and_removing(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        for wrong in ("f" * 63, "F" * 64, "01" + "00" * 31):
            with pytest.raises(InvalidInput):
                await node.clients.add(ADMIN, wrong, CAROL, "")
        with pytest.raises(InvalidInput):
            await node.clients.add(ADMIN, ID, CAROL, "a\nb")
        with pytest.raises(Forbidden):
            await node.clients.add(ANN, ID, CAROL, "")
        added = await node.clients.add(ADMIN, ID, CAROL, "rig")
        assert (added.client_id, added.user, added.label) == (ID, "carol", "rig")
        assert added.approved_at is not None
        with pytest.raises(Conflict):
            await node.clients.add(ADMIN, ID, DAN, "")
        assert (await node.clients.relabel(ADMIN, ID, "rig-2")).label == "rig-2"
        await node.authorizations.grant(ANN, RECORDINGS, "client", ID, Role.ALL)
        await node.clients.remove(ADMIN, ID)
        assert (RECORDINGS, "client", ID) not in node.data.authorizations
        with pytest.raises(NotFound):
            await node.clients.remove(ADMIN, ID)
        assert [outcome for _, _, outcome in await outcomes(node, "client.add")][-2:] == ["done", "conflict"]

    run_on(tmp_path, work)


def test_a_removed_user_takes_the_keys_along(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        await node.clients.add(ADMIN, ID, CAROL, "")
        _, text = await node.clients.add_code(ADMIN, CAROL)
        await node.authorizations.grant(ANN, RECORDINGS, "client", ID, Role.ALL)
        assert roles(node) == Role.ALL
        await node.users.remove(ADMIN, CAROL)
        assert roles(node) == Role.NONE
        assert node.data.clients == {}
        assert (RECORDINGS, "client", ID) not in node.data.authorizations
        with pytest.raises(Unauthenticated):
            await node.clients.enrol(ID, signed(KEY), "", text, None)

    run_on(tmp_path, work)


def test_a_signed_link_waits_for_an_admin(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        for signature in (signed(OTHER), "0" * 128, "", None):
            with pytest.raises(Unauthenticated):
                await node.clients.ask(ID, signature, "rig", "carol", None)
        waiting = await node.clients.ask(ID, signed(KEY), "rig", "carol", "192.0.2.1")
        assert (waiting.user, waiting.approved_at, waiting.asked_as) == (None, None, "carol")
        assert "carol" not in node.data.users
        assert roles(node) == Role.NONE
        # The link can be shown again by anybody who saw it: nothing changes.
        assert await node.clients.ask(ID, signed(KEY), "other", "dan", "192.0.2.9") == waiting
        with pytest.raises(Forbidden):
            await node.clients.approve(ANN, ID)
        approved = await node.clients.approve(ADMIN, ID)
        assert (approved.user, approved.label) == ("carol", "rig")
        assert await node.clients.approve(ADMIN, ID) == approved
        with pytest.raises(Conflict):
            await node.clients.approve(ADMIN, ID, DAN)
        nobody = await node.clients.ask(OTHER.public_hex, signed(OTHER), "", "", None)
        with pytest.raises(InvalidInput):
            await node.clients.approve(ADMIN, nobody.client_id)
        assert (await node.clients.approve(ADMIN, nobody.client_id, DAN)).user == "dan"

    run_on(tmp_path, work)


def test_the_number_that_wait_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(node: Node) -> None:
        async def ask(number: int, peer: str) -> None:
            key = PrivateKey(number.to_bytes(32, "big"))
            await node.clients.ask(key.public_hex, signed(key), "", "", peer)

        monkeypatch.setattr(clients, "MAX_WAITING", 5)
        monkeypatch.setattr(clients, "MAX_WAITING_OF_PEER", 3)
        for number in range(1, 4):
            await ask(number, "192.0.2.1")
        with pytest.raises(Forbidden, match="too many"):
            await ask(4, "192.0.2.1")
        for number in range(4, 6):
            await ask(number, "192.0.2.2")
        with pytest.raises(Forbidden, match="too many"):
            await ask(6, "192.0.2.3")
        monkeypatch.setattr(clients, "WAITING_MS", -1)
        await ask(6, "192.0.2.3")
        assert len(node.data.clients) == 1

    run_on(tmp_path, work)


def test_enrolment_codes(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        await furnish(node)
        with pytest.raises(Forbidden):
            await node.clients.add_code(ANN, CAROL)
        for uses, until in ((0, None), (1001, None), (1, 1), (1, int(time.time() * 1000) + 91 * 86_400_000)):
            with pytest.raises(InvalidInput):
                await node.clients.add_code(ADMIN, CAROL, "", uses, until)
        code, text = await node.clients.add_code(ADMIN, CAROL, "students", 1)
        with pytest.raises(Unauthenticated, match="not signed"):
            await node.clients.enrol(ID, signed(OTHER), "", text, None)
        with pytest.raises(Unauthenticated, match="code"):
            await node.clients.enrol(ID, signed(KEY), "", text + "x", None)
        enrolled = await node.clients.enrol(ID, signed(KEY), "laptop", text, None)
        assert (enrolled.user, enrolled.label) == ("carol", "laptop")
        # Again for the same key: nothing is used up, nothing is refused.
        assert await node.clients.enrol(ID, signed(KEY), "laptop", text, None) == enrolled
        with pytest.raises(Unauthenticated, match="used up"):
            await node.clients.enrol(OTHER.public_hex, signed(OTHER), "", text, None)
        assert [one.uses_left for one in node.clients.codes(ADMIN)] == [0]
        dans, second = await node.clients.add_code(ADMIN, DAN)
        with pytest.raises(Conflict):
            await node.clients.enrol(ID, signed(KEY), "", second, None)
        await node.clients.remove_code(ADMIN, dans.id)
        with pytest.raises(Unauthenticated):
            await node.clients.enrol(OTHER.public_hex, signed(OTHER), "", second, None)
        with pytest.raises(NotFound):
            await node.clients.remove_code(ADMIN, dans.id)
        assert await outcomes(node, "client.enrol") == [
            ("user:carol", ID, "done"),
            ("user:carol", OTHER.public_hex, "unauthenticated"),
        ]
        assert code.id in {one.id for one in node.clients.codes(ADMIN)}

    run_on(tmp_path, work)


def test_wrong_codes_are_counted_by_address(tmp_path: Path) -> None:
    async def work(node: Node) -> None:
        seen: list[type[KacheryLabError]] = []
        for _ in range(25):
            with pytest.raises(KacheryLabError) as caught:
                await node.clients.enrol(ID, signed(KEY), "", "guess", "192.0.2.1")
            seen.append(caught.type)
        assert seen == [Unauthenticated] * 20 + [TooManyRequests] * 5
        _, text = await node.clients.add_code(ADMIN, CAROL)
        assert (await node.clients.enrol(ID, signed(KEY), "", text, "192.0.2.1")).user == "carol"

    run_on(tmp_path, work)


def test_keys_and_codes_outlive_the_database(tmp_path: Path) -> None:
    async def make(node: Node) -> tuple[object, object]:
        await node.clients.add(ADMIN, ID, CAROL, "rig")
        await node.clients.ask(OTHER.public_hex, signed(OTHER), "", "", "192.0.2.1")
        await node.clients.add_code(ADMIN, DAN, "", 3)
        return node.data.clients, node.data.enrolment_codes

    async def look(node: Node) -> tuple[object, object]:
        await node.acknowledge_volume()
        return node.data.clients, node.data.enrolment_codes

    before = run_on(tmp_path, make)
    for path in (tmp_path / "metadata").glob("kachery-lab.db*"):
        path.unlink()
    assert run_on(tmp_path, look, start=False, rebuild=True) == before
