"""S7 for tokens of the provider's protocol: what is taken away after a token was issued, or while it is used."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_lab.core.roles import Role
from kachery_lab.services.broker import HubBands
from kachery_lab.services.principals import OPERATOR
from tests.faults.report import report
from tests.hubs import Hub, LabNode
from tests.members2021 import ACK, ATTACHED, CONNECTED, MESSAGE, Wire, joined, request_file, token_details

pytestmark = pytest.mark.slow

CHANNEL = "lab"
NAME = f"{CHANNEL}-requestFiles"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path) as running:
        running.make_channel(CHANNEL)
        yield running


def attempts(hub: Hub) -> tuple[int, int]:
    """(Tries, how many had an effect): rights that are taken away at every step between the token and its use."""
    tries = effects = 0
    for moment in ("before connecting", "after connecting", "after attaching", "by leaving the channel"):
        for right in ("publish", "subscribe"):
            node, other = LabNode(), LabNode()
            for one in (node, other):
                hub.register(one)
                hub.join(one, CHANNEL)
            token = token_details(hub, node, CHANNEL)["token"]
            left = Role.ALL & ~(Role.REQUEST_FILES if right == "publish" else Role.PROVIDE_FILES)
            if moment == "before connecting":
                hub.grant(node.id, CHANNEL, left)
            with Wire(hub.port, token) as victim, joined(hub, other, CHANNEL) as good:
                victim.expect(CONNECTED)
                listens, speaks = (good, victim) if right == "publish" else (victim, good)
                if moment == "after connecting":
                    hub.grant(node.id, CHANNEL, left)
                listens.attach(NAME)
                if moment == "after attaching":
                    hub.grant(node.id, CHANNEL, left)
                elif moment == "by leaving the channel":
                    hub.call(hub.node.authorizations.leave(OPERATOR, CHANNEL, node.id))
                if right == "subscribe":
                    # A publication is judged when it comes; what is delivered stops within a second.
                    time.sleep(1)
                speaks.send_message(NAME, request_file(node if speaks is victim else other, "0" * 40))
                tries += 1
                effects += _heard(listens)
    return tries, effects


def _heard(wire: Wire) -> bool:
    try:
        while True:
            if wire.receive(0.4)["action"] == MESSAGE:
                return True
    except TimeoutError:
        return False


def test_revoked_between_token_and_use(hub: Hub) -> None:
    node = LabNode()
    hub.register(node)
    hub.join(node, CHANNEL)
    with joined(hub, node, CHANNEL) as one:
        assert one.attach(NAME)["action"] == ATTACHED
        assert one.publish(NAME, request_file(node, "0" * 40))["action"] in (ACK, MESSAGE)
    tries, effects = attempts(hub)
    report("S7 ably", tries, effects=effects)
    assert effects == 0


def test_without_looking_again_it_has_effect(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: the broker believes the token, and asks nothing when rights change."""

    async def believe(*_arguments: object) -> None:
        return None

    monkeypatch.setattr(HubBands, "_require", believe)
    monkeypatch.setattr(HubBands, "_refresh_topics", lambda *_arguments: None)
    tries, effects = attempts(hub)
    report("S7 ably control", tries, effects=effects)
    assert effects == tries
