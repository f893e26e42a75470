"""Tokens, time and connections of the provider's protocol, over a raw WebSocket; each refusal is paired."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from kachery_lab.core.band_messages import MAX_PAYLOAD
from kachery_lab.core.bands import BANDS
from kachery_lab.core.roles import Role
from kachery_lab.core.tickets import BandToken
from kachery_lab.errors import Forbidden
from kachery_lab.http.protocols.ably2021 import connection
from kachery_lab.services import broker
from kachery_lab.services.subjects import Subject
from tests.faults.report import wait_for
from tests.hubs import Hub, LabNode, refused
from tests.members2021 import (
    ACK,
    AUTH,
    CLOSE,
    CLOSED,
    CONNECTED,
    DISCONNECT,
    DISCONNECTED,
    ERROR,
    HEARTBEAT,
    MESSAGE,
    NACK,
    PRESENCE,
    SYNC,
    Wire,
    ask_token,
    joined,
    request_file,
    token_details,
)

SHA1 = "0" * 40


# -- tokens --------------------------------------------------------------------------------------------------------


def test_the_token_says_what_the_certificate_says(hub: Hub, channel: str, member: LabNode) -> None:
    details = token_details(hub, member, channel)
    assert details.keys() == {"token", "issued", "expires", "capability"}
    assert details["expires"] - details["issued"] == 3_600_000
    capability = json.loads(details["capability"])
    assert {name: set(rights) for name, rights in capability.items()} == {
        f"{channel}-{band}": {"publish", "subscribe"} for band in BANDS
    }
    # A part of the certificate's rights may be asked for, and none.
    less = {f"{channel}-requestFiles": ["subscribe"]}
    assert json.loads(token_details(hub, member, channel, less)["capability"]) == less
    assert token_details(hub, member, channel, {})["capability"] == "{}"


def test_no_token_for_more_than_the_certificate_allows(hub: Hub, channel: str) -> None:
    node = LabNode()
    hub.register(node)
    hub.join(node, channel, Role.REQUEST_FILES)
    certificate, key = hub.certificate(node, channel)
    resource_id = hub.node.data.channel(channel).resource_id
    assert ask_token(hub, certificate, key, resource_id).status == 200
    for beyond in (
        {f"{channel}-requestFiles": ["publish", "subscribe"]},
        {f"{channel}-provideTasks": ["publish"]},
        {f"{channel}-provideTasks": []},
        {"other-requestFiles": ["publish"]},
        {"*": ["*"]},
    ):
        status = 400 if "*" in beyond else 404
        refused(ask_token(hub, certificate, key, resource_id, beyond), status)
    for malformed in ([], "all", 1, {f"{channel}-requestFiles": "publish"}, {f"{channel}-requestFiles": [["publish"]]}):
        refused(ask_token(hub, certificate, key, resource_id, malformed), 400)
    assert ask_token(hub, certificate, key, resource_id).status == 200


def test_no_token_when_the_roles_are_gone(hub: Hub, channel: str, member: LabNode) -> None:
    certificate, key = hub.certificate(member, channel)
    resource_id = hub.node.data.channel(channel).resource_id
    assert ask_token(hub, certificate, key, resource_id).status == 200
    hub.revoke(member.id, channel)
    assert "no role" in refused(ask_token(hub, certificate, key, resource_id))
    assert (f"node:{member.id}", "band.token", channel) in [entry[:3] for entry in hub.refusals()]


def altered(token: str) -> str:
    body, _, mac = token.partition(".")
    data = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)).replace(b'"publish"', b'"publisH"', 1)
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode() + "." + mac


def test_only_tokens_of_this_hub_connect(hub: Hub, channel: str, member: LabNode, wire: str, tmp_path: Path) -> None:
    good = token_details(hub, member, channel)["token"]
    with Hub(tmp_path) as elsewhere:
        elsewhere.make_channel(channel)
        elsewhere.register(member)
        elsewhere.join(member, channel)
        foreign = token_details(elsewhere, member, channel)["token"]
    reader = hub.node.uploads.capability(channel, Subject("node", member.id))
    for text, code in [
        (None, 40101),
        ("", 40101),
        ("x", 40140),
        ("\x00", 40140),
        ("é.é", 40140),
        (altered(good), 40140),
        (good + "A", 40140),
        (good.partition(".")[0], 40140),
        (foreign, 40140),
        (reader, 40140),
    ]:
        with Wire(hub.port, text, wire) as refused_one:
            error = refused_one.expect(ERROR)["error"]
            assert (error["code"], error["statusCode"]) == (code, 401), text
            assert refused_one.ended() == []
    with Wire(hub.port, good, wire) as accepted:
        accepted.expect(CONNECTED)


def test_old_nodes_can_be_refused(tmp_path: Path) -> None:
    node = LabNode()
    with Hub(tmp_path) as hub:
        hub.make_channel("lab")
        hub.register(node)
        hub.join(node, "lab")
        token = token_details(hub, node, "lab")["token"]
        with Wire(hub.port, token) as accepted:
            accepted.expect(CONNECTED)
    with Hub(tmp_path, legacy_nodes=False) as hub, Wire(hub.port, token) as refused_one:
        assert "KACHERY_LAB_LEGACY_NODES" in refused_one.expect(ERROR)["error"]["message"]


def test_pages_of_other_sites_do_not_connect(hub: Hub, channel: str, member: LabNode) -> None:
    address = f"ws://127.0.0.1:{hub.port}/?access_token={token_details(hub, member, channel)['token']}"
    for origin in ("http://elsewhere.example", "null", "http://127.0.0.1:1"):
        with pytest.raises(InvalidStatus) as refusal, connect(address, origin=origin):  # type: ignore[arg-type]
            pass
        assert refusal.value.response.status_code == 403
        assert b"KACHERY_LAB_CORS_ORIGINS" in (refusal.value.response.body or b"")
    for origin in (None, "http://localhost:3000"):
        with connect(address, origin=origin, compression=None) as socket:  # type: ignore[arg-type]
            assert json.loads(socket.recv())["action"] == CONNECTED


def test_no_token_reaches_the_log(node: Any) -> None:
    with Wire(node.port, "very-secret-text") as refused_one:
        refused_one.expect(ERROR)
    node.request("GET", "/livez")
    until = time.monotonic() + 5
    while '"WEBSOCKET"' not in node.log and time.monotonic() < until:
        pass
    assert '"WEBSOCKET"' in node.log
    assert "very-secret-text" not in node.log


def test_a_token_of_another_time_is_refused() -> None:
    now = 1_700_000_000_000
    token = BandToken("a" * 64, "lab", {}, issued=now, expires=now + 1000, nonce="n")
    token.check(now)
    token.check(now - 59_000)
    for other, at in ((token, now - 61_000), (replace(token, v=2), now)):
        with pytest.raises(Forbidden):
            other.check(at)


# -- time ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_tokens(hub: Hub) -> Iterator[None]:
    """Tokens that live 4 s."""
    before, hub.node.band_tokens.lifetime_ms = hub.node.band_tokens.lifetime_ms, 4000
    yield
    hub.node.band_tokens.lifetime_ms = before


@pytest.mark.usefixtures("short_tokens")
def test_a_token_expires(hub: Hub, channel: str, member: LabNode, wire: str) -> None:
    token = token_details(hub, member, channel)["token"]
    begun = time.monotonic()
    with Wire(hub.port, token, wire) as one:
        one.expect(CONNECTED)
        one.expect(AUTH)
        assert one.publish(f"{channel}-requestFiles", request_file(member, SHA1))["action"] == ACK
        assert one.expect(DISCONNECTED)["error"]["code"] == 40142
        assert 3.5 < time.monotonic() - begun < 30
        assert one.ended() == []
    with Wire(hub.port, token, wire) as one:
        assert one.expect(ERROR)["error"]["code"] == 40142


@pytest.mark.usefixtures("short_tokens")
def test_a_token_is_renewed_in_the_connection(hub: Hub, channel: str, member: LabNode, wire: str) -> None:
    name = f"{channel}-requestFiles"
    with joined(hub, member, channel, wire) as one:
        one.attach(name)
        for _ in range(3):
            one.expect(AUTH)
            one.send(AUTH, auth={"accessToken": token_details(hub, member, channel)["token"]})
            one.expect(CONNECTED)
        one.send_message(name, request_file(member, SHA1))
        assert {one.receive()["action"], one.receive()["action"]} == {ACK, MESSAGE}


def test_a_new_token_may_allow_less(hub: Hub, channel: str, member: LabNode) -> None:
    kept, lost = f"{channel}-requestFiles", f"{channel}-requestFeeds"
    with joined(hub, member, channel) as one:
        one.attach(kept)
        one.attach(lost)
        less = token_details(hub, member, channel, {kept: ["publish", "subscribe"]})["token"]
        one.send(AUTH, auth={"accessToken": less})
        answer = one.expect(ERROR)
        assert (answer["channel"], answer["error"]["code"]) == (lost, 40160)
        one.expect(CONNECTED)
        one.send_message(kept, request_file(member, SHA1))
        assert {one.receive()["action"], one.receive()["action"]} == {ACK, MESSAGE}


def test_a_new_token_of_somebody_else_ends_it(hub: Hub, channel: str, member: LabNode, other: LabNode) -> None:
    hub.make_channel(f"{channel}y")
    hub.join(member, f"{channel}y")
    for token, code in [
        (token_details(hub, other, channel)["token"], 40102),
        (token_details(hub, member, f"{channel}y")["token"], 40102),
        ("x", 40140),
        (None, 40101),
    ]:
        with joined(hub, member, channel) as one:
            one.send(AUTH, auth={"accessToken": token})
            assert one.expect(ERROR)["error"]["code"] == code
            assert one.ended() == []
    with joined(hub, member, channel) as one:
        one.send(AUTH, auth={"accessToken": token_details(hub, member, channel)["token"]})
        one.expect(CONNECTED)


# -- connections ---------------------------------------------------------------------------------------------------


def test_what_connected_says(hub: Hub, channel: str, member: LabNode, wire: str) -> None:
    token = token_details(hub, member, channel)["token"]
    with Wire(hub.port, token, wire) as one:
        first = one.expect(CONNECTED)
    details = first["connectionDetails"]
    assert details["maxMessageSize"] == MAX_PAYLOAD
    assert 0 < details["maxIdleInterval"] <= 30_000
    assert "error" not in first
    with Wire(hub.port, token, wire, resume=details["connectionKey"]) as one:
        again = one.expect(CONNECTED)
        assert again["connectionId"] != first["connectionId"]
        assert again["error"]["code"] == 80008


def test_heartbeats_are_answered(pair: tuple[Wire, Wire]) -> None:
    one, _ = pair
    for fields in ({}, {"id": "ping-1"}):
        one.send(HEARTBEAT, **fields)
        frame = one.socket.recv(timeout=5)
        found = msgpack.unpackb(frame) if isinstance(frame, bytes) else json.loads(frame)
        assert found == {"action": HEARTBEAT, **fields}


def test_presence_is_refused_and_sync_ignored(pair: tuple[Wire, Wire], channel: str, member: LabNode) -> None:
    one, _ = pair
    one.send(PRESENCE, channel=f"{channel}-requestFiles", msgSerial=0, presence=[{"action": 2}])
    answer = one.expect(NACK)
    assert (answer["msgSerial"], answer["error"]["code"]) == (0, 40160)
    one.send(SYNC, channel=f"{channel}-requestFiles")
    assert one.silent()
    assert one.publish(f"{channel}-requestFiles", request_file(member, SHA1))["action"] == ACK


def test_saying_goodbye(hub: Hub, channel: str, member: LabNode, wire: str) -> None:
    name = f"{channel}-requestFiles"
    with joined(hub, member, channel, wire) as one:
        one.send_message(name, request_file(member, SHA1))
        one.send(CLOSE)
        assert [found["action"] for found in one.ended()] == [ACK, CLOSED]
        assert one.socket.close_code == 1000
    with joined(hub, member, channel, wire) as one:
        one.send(DISCONNECT)
        assert [found["action"] for found in one.ended()] == [DISCONNECTED]
    wait_for(lambda: not hub.node.hub_bands.present(member.id), "both connections are forgotten")


def test_a_server_that_stops_says_so(tmp_path: Path) -> None:
    node = LabNode()
    with Hub(tmp_path) as hub:
        hub.make_channel("lab")
        hub.register(node)
        hub.join(node, "lab")
        one = joined(hub, node, "lab")
        hub.loop.call_soon_threadsafe(hub.node.stop)
        found = one.ended()
    assert [(message["action"], message["error"]["code"]) for message in found] == [(DISCONNECTED, 80003)]


def test_so_many_connections_of_one_node(
    hub: Hub, channel: str, member: LabNode, other: LabNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library comes back after DISCONNECTED; other nodes are not concerned."""
    monkeypatch.setattr(broker, "MAX_CONNECTIONS_PER_NODE", 2)
    token = token_details(hub, member, channel)["token"]
    with joined(hub, member, channel), joined(hub, member, channel):
        with Wire(hub.port, token) as third:
            assert third.expect(DISCONNECTED)["error"]["code"] == 42911
            assert third.ended() == []
        joined(hub, other, channel).socket.close()
    wait_for(lambda: not hub.node.hub_bands.present(member.id), "both are forgotten")
    joined(hub, member, channel).socket.close()


def test_silence_is_filled(hub: Hub, channel: str, member: LabNode, wire: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes a connection for lost that is silent for longer than was announced."""
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.2)
    token = token_details(hub, member, channel)["token"]
    with Wire(hub.port, token, wire) as one:
        assert one.expect(CONNECTED)["connectionDetails"]["maxIdleInterval"] == 200
        for _ in range(3):
            frame = one.socket.recv(timeout=2)
            assert (msgpack.unpackb(frame) if isinstance(frame, bytes) else json.loads(frame)) == {"action": HEARTBEAT}
