"""WebSocket `/p/{token}`: who may provide, how many, and how soon that ends. Each refusal beside what is served."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from kachery_lab.core.roles import Role
from kachery_lab.services import resource_providers
from kachery_lab.services.principals import OPERATOR
from tests import resource_providers as providers
from tests.hubs import Hub
from tests.resource_providers import SECONDS, Reader, all_gone, opened, providing, refused
from tests.zones import Zone

hub, zone, reader, data = providers.hub, providers.zone, providers.reader, providers.data


def test_refused_before_the_upgrade(zone: Zone) -> None:
    hub = zone.hub
    assert refused(hub, f"klk_{'a' * 32}")[0] == 401
    for scopes in (["read"], ["admin"], ["channel-owner"], ["metrics"]):
        status, text = refused(hub, zone.token("writer", *scopes))
        assert (status, "write" in text) == (403, True)
    with opened(hub, zone.token("writer", "write")):
        pass


def test_who_may_not_provide_there(zone: Zone) -> None:
    hub = zone.hub
    tokens = {
        "reader": zone.reader,
        "other": zone.other,
        "narrowed": zone.token("writer", "write", channels=["elsewhere"]),
        "the node, which is no member": zone.token("writer", "client"),
    }
    for who, token in tokens.items():
        with opened(hub, token) as line:
            line.initialize(zone.name)
            code, reason = line.end()
            assert (code, reason[:11]) == (1008, "forbidden: "), who
            assert "provideFiles" in reason
    assert any(action == "resource.provide" and what == zone.name for _, action, what, _ in hub.refusals())
    with opened(hub, zone.writer) as line:
        line.initialize("nowhere.at.all")
        assert "provideFiles" in line.end()[1]
    with providing(hub, zone.token("writer", "write", channels=[zone.name]), zone.name):
        pass


def test_one_provider_for_each_zone(zone: Zone) -> None:
    other = Zone(zone.hub)
    with providing(zone.hub, zone.writer, zone.name), providing(zone.hub, other.writer, other.name):
        for token in (zone.writer, zone.owner):
            with opened(zone.hub, token) as line:
                line.initialize(zone.name)
                code, reason = line.end()
                assert (code, reason) == (1008, f"conflict: the zone {zone.name} has a provider already")
    all_gone(zone.hub)
    with providing(zone.hub, zone.owner, zone.name):
        pass


@pytest.mark.parametrize(("name", "whose"), [("MAX_PER_SUBJECT", "writer"), ("MAX_PROVIDERS", "this server")])
def test_bounded_connections(zone: Zone, monkeypatch: pytest.MonkeyPatch, name: str, whose: str) -> None:
    monkeypatch.setattr(resource_providers, name, 2)
    with opened(zone.hub, zone.writer), opened(zone.hub, zone.writer):
        status, text = refused(zone.hub, zone.token("writer", "write"))
        assert (status, whose in text) == (429, True)
    all_gone(zone.hub)
    with providing(zone.hub, zone.writer, zone.name):
        pass


def take_role(zone: Zone, _token: str) -> None:
    zone.revoke("writer")


def give_other_role(zone: Zone, _token: str) -> None:
    zone.grant("writer", Role.REQUEST_FILES)


def remove_zone(zone: Zone, _token: str) -> None:
    zone.hub.call(zone.hub.node.channels.remove(OPERATOR, zone.name))


def remove_user(zone: Zone, _token: str) -> None:
    zone.revoke("writer")
    zone.hub.call(zone.hub.node.users.remove(OPERATOR, zone.user("writer")))


def revoke_token(zone: Zone, token: str) -> None:
    found = zone.hub.node.access.by_token(token, None)
    assert found.token is not None
    zone.hub.call(zone.hub.node.tokens.revoke(OPERATOR, found.token))


@pytest.mark.parametrize("take", [take_role, give_other_role, remove_zone, remove_user, revoke_token])
def test_rights_that_end(zone: Zone, reader: Reader, data: bytes, take: Any) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        zone.grant("reader", Role.ALL)
        line.say(type="ping")
        asked = reader.begin(data)
        line.wanted()
        take(zone, zone.writer)
        code, reason = line.end()
        assert (code, reason[:11]) == (1008, "forbidden: ")
        found = asked.result(SECONDS)
        assert found["status"] == "error"
        assert "disconnected" in found["error"]


def test_a_token_that_expires(zone: Zone) -> None:
    # On a busy machine a short one may be over before it is used.
    for seconds in (2, 8, 32):
        token = zone.token("writer", "write", expires_at=int((time.time() + seconds) * 1000))
        try:
            with providing(zone.hub, token, zone.name) as line:
                code, reason = line.end()
                break
        except (InvalidStatus, ConnectionClosed, AssertionError):
            continue
    else:
        raise AssertionError("no token lived long enough")
    assert code == 1008
    assert "has expired" in reason


def test_the_server_stops(tmp_path: Path) -> None:
    with ExitStack() as lines:
        with Hub(tmp_path) as hub:
            zone = Zone(hub)
            serving = lines.enter_context(providing(hub, zone.writer, zone.name))
            silent = lines.enter_context(opened(hub, zone.writer))
        assert serving.end()[0] == 1012
        assert silent.end()[0] == 1012
