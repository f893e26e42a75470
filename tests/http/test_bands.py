"""`/api/v1/bands` on a real server, by a WebSocket client that is not ours."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from kachery_lab.core.bands import BANDS, role_for
from kachery_lab.core.roles import NAMES, Role
from kachery_lab.services import member_connections
from kachery_lab.services.principals import OPERATOR
from tests.bands import CHANNEL, TARGET, Line, Member, connected
from tests.hubs import Hub


def line(hub: Hub, member: Member, **how: Any) -> AbstractContextManager[Line]:
    return connected(hub.port, hub.node.identity.node_id, member, **how)


def header(hub: Hub, member: Member, **changes: Any) -> dict[str, str]:
    return member.header(**{"hub_id": hub.node.identity.node_id, **changes})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path) as running:
        running.make_channel(CHANNEL)
        yield running


def member_of(hub: Hub, roles: Role = Role.ALL) -> Member:
    member = Member()
    hub.register(member)
    hub.join(member, CHANNEL, roles)
    return member


def refused(hub: Hub, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Status and problem of an upgrade that is not made."""
    with pytest.raises(InvalidStatus) as found:
        connect(f"ws://127.0.0.1:{hub.port}{TARGET}", additional_headers=headers, proxy=None)
    response = found.value.response
    assert response.headers["content-type"] == "application/problem+json"
    return response.status_code, json.loads(response.body or b"")


# -- who ---------------------------------------------------------------------------------------------------------


def test_hello(hub: Hub) -> None:
    member = member_of(hub, Role.REQUEST_FILES | Role.PROVIDE_TASKS)
    with line(hub, member) as open_line:
        assert open_line.next("roles")["channels"] == {CHANNEL: ["requestFiles", "provideTasks"]}


def test_bad_hellos(hub: Hub) -> None:
    member, other = member_of(hub), Member()
    good = header(hub, member)
    with line(hub, member, headers=good):
        pass
    assert refused(hub, good)[0] == 409, "replayed"
    for headers in (
        {},
        {"Kachery-Node": "v1 nonsense"},
        header(hub, member, hub_id=other.id),
        header(hub, member, target="/api/v1/nodes/memberships"),
        header(hub, member, method="POST"),
        header(hub, other, node_id=member.id),
        {"Authorization": f"Bearer {hub.node.tokens.list(OPERATOR)[0].id}"},
    ):
        status, problem = refused(hub, headers)
        assert (status, problem["code"]) == (401, "unauthenticated"), headers
    for shift in (-3600, -301, 301, 3600, -int(time.time())):
        at = int(time.time()) + shift
        status, problem = refused(hub, header(hub, member, at=at))
        assert status == 401
        assert "the server's time is" in problem["detail"]
    with line(hub, member):
        pass


def test_only_approved_nodes(hub: Hub) -> None:
    stranger = Member()
    assert refused(hub, header(hub, stranger))[0] == 403
    hub.register(stranger)
    with line(hub, stranger) as open_line:
        assert open_line.next("roles")["channels"] == {}
        assert open_line.publish("requestFiles", stranger.signed("requestFiles")) == "not_found"
        hub.join(stranger, CHANNEL)
        while not open_line.next("roles")["channels"].get(CHANNEL):
            pass
        assert open_line.publish("requestFiles", stranger.signed("requestFiles")) == "done"
        hub.call(hub.node.nodes.remove(OPERATOR, stranger.id))
        with pytest.raises(ConnectionClosed, match="not_approved"):
            while open_line.read(2):
                pass
    assert refused(hub, header(hub, stranger))[0] == 403


def test_pages_of_other_sites(hub: Hub) -> None:
    member = member_of(hub)
    status, problem = refused(hub, {**header(hub, member), "Origin": "https://evil.example"})
    assert (status, problem["code"]) == (403, "forbidden")
    with line(hub, member, headers={"Origin": "http://localhost:3000"}):
        pass
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    upgrade["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
    assert hub.request("GET", TARGET, headers={**upgrade, **header(hub, member), "Host": "evil.example"}).status == 421
    assert hub.request("GET", TARGET, headers={**upgrade, **header(hub, member), "Host": "localhost"}).status == 101


def test_one_connection_for_each_node(hub: Hub) -> None:
    member = member_of(hub)
    with line(hub, member) as first, line(hub, member) as second:
        with pytest.raises(ConnectionClosed, match="replaced"):
            while first.read(2):
                pass
        second.subscribe("requestFiles")


# -- what --------------------------------------------------------------------------------------------------------


def test_messages_flow(hub: Hub) -> None:
    with line(hub, member_of(hub)) as first, line(hub, member_of(hub)) as second:
        for one in (first, second):
            one.subscribe("requestFiles")
        assert second.ask("subscribe", channel=CHANNEL, band="requestFiles") == "done"
        sent = [first.member.signed("requestFiles", fileKey={"sha1": f"{number:040x}"}) for number in range(20)]
        assert first.publish("requestFiles", *sent) == "done"
        for one in (first, second):
            got = one.messages()
            assert [json.dumps(item["data"]["body"], sort_keys=True) for item in got] == [
                json.dumps(message.body, sort_keys=True) for message in sent
            ]
            assert {item["data"]["fromNodeId"] for item in got} == {first.member.id}
            assert {(item["channel"], item["band"]) for item in got} == {(CHANNEL, "requestFiles")}
        assert second.ask("unsubscribe", channel=CHANNEL, band="requestFiles") == "done"
        assert first.publish("requestFiles", sent[0]) == "done"
        assert (len(first.messages()), len(second.messages())) == (1, 0)


@pytest.mark.parametrize("band", BANDS)
def test_each_flow_needs_its_roles(hub: Hub, band: str) -> None:
    publishing, listening = role_for(band, "publish"), role_for(band, "subscribe")
    with (
        line(hub, member_of(hub, publishing)) as speaker,
        line(hub, member_of(hub, listening)) as listener,
        line(hub, member_of(hub, Role.ALL & ~publishing & ~listening)) as outsider,
    ):
        listener.subscribe(band)
        assert speaker.ask("subscribe", channel=CHANNEL, band=band) == "forbidden"
        assert outsider.ask("subscribe", channel=CHANNEL, band=band) == "forbidden"
        assert listener.publish(band, listener.member.signed(band)) == "forbidden"
        assert outsider.publish(band, outsider.member.signed(band)) == "forbidden"
        assert listener.messages() == []
        assert speaker.publish(band, speaker.member.signed(band)) == "done"
        assert len(listener.messages()) == 1


def test_forged_messages(hub: Hub) -> None:
    with line(hub, member_of(hub)) as first, line(hub, member_of(hub)) as second:
        second.subscribe(*BANDS)
        good = json.loads(first.member.signed("requestFiles").text)
        theirs = json.loads(second.member.signed("requestFiles").text)
        assert first.publish("requestFiles", theirs) == "forbidden"
        assert first.publish("requestFiles", {**theirs, "fromNodeId": first.member.id}) == "invalid_input"
        assert first.publish("requestFiles", {**good, "fromNodeId": second.member.id}) == "forbidden"
        assert first.publish("requestFiles", good, theirs) == "forbidden"
        assert first.publish("requestFiles", {**good, "signature": "0" * 128}) == "invalid_input"
        assert first.publish("provideFeeds", good) == "invalid_input"
        assert first.publish("requestFiles", first.member.signed("provideFiles")) == "invalid_input"
        assert first.publish("requestFiles", {**good, "extra": 1}) == "invalid_input"
        assert first.publish("secrets", good) == "invalid_input"
        assert first.publish("requestFiles", good, channel="nowhere") == "not_found"
        assert first.publish("requestFiles", good, channel="../x") == "invalid_input"
        assert first.ask("shout", channel=CHANNEL, band="requestFiles") == "invalid_input"
        assert second.messages() == []
        assert first.publish("requestFiles", good) == "done"
        assert len(second.messages()) == 1


def test_size_limits(hub: Hub) -> None:
    with line(hub, member_of(hub)) as first, line(hub, member_of(hub)) as second:
        second.subscribe("requestTasks")
        ids = ["f" * 390 for _ in range(160)]
        largest = first.member.signed("requestTasks", taskFunctionIds=ids)
        assert first.publish("requestTasks", largest) == "done"
        assert first.publish("requestTasks", largest, largest) == "too_large"
        assert len(second.messages()) == 1
        with pytest.raises(ConnectionClosed) as closed:
            first.socket.send(" " * 300_000)
            while first.read(2):
                pass
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
        assert second.ask("subscribe", channel=CHANNEL, band="requestTasks") == "done"


@pytest.mark.parametrize(
    "frame",
    ["", "{}", "[1]", "[", "nonsense", "[[]]", "[" * 1000, b"[]", json.dumps([{}] * 101), '{"type":"publish"}'],
    ids=str,
)
def test_what_is_no_frame_ends_the_connection(hub: Hub, frame: str | bytes) -> None:
    with line(hub, member_of(hub)) as first:
        first.socket.send(frame)
        with pytest.raises(ConnectionClosed, match="bad_frame") as closed:
            while first.read(2):
                pass
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008


@pytest.mark.parametrize(
    "item",
    [{}, {"id": None}, {"id": -1, "type": "publish"}, {"id": True}, {"id": 1, "type": ["x"]}, {"id": 1.5}],
    ids=str,
)
def test_odd_objects_are_answered(hub: Hub, item: dict[str, Any]) -> None:
    with line(hub, member_of(hub)) as first:
        first.send(item)
        assert first.next("error")["code"] == "invalid_input"
        first.subscribe("requestFiles")


# -- when --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_taking_and_giving_a_role_works_on_open_connections(hub: Hub, name: str) -> None:
    role = NAMES[name]
    band = next(band for band in BANDS if role_for(band, "subscribe") == role)
    member, other = member_of(hub), member_of(hub)
    with line(hub, member) as mine, line(hub, other) as theirs:
        mine.subscribe(band)
        assert theirs.publish(band, other.signed(band)) == "done"
        assert len(mine.messages()) == 1

        began = time.monotonic()
        hub.grant(member.id, CHANNEL, Role.ALL & ~role)
        assert mine.publish(name, member.signed(name)) == "forbidden", "at once"
        while name in mine.next("roles")["channels"][CHANNEL]:
            pass
        assert time.monotonic() - began < 10
        assert theirs.publish(band, other.signed(band)) == "done"
        assert mine.messages() == []

        began = time.monotonic()
        hub.grant(member.id, CHANNEL, Role.ALL)
        while name not in mine.next("roles")["channels"][CHANNEL]:
            pass
        assert time.monotonic() - began < 10
        assert theirs.publish(band, other.signed(band)) == "done"
        assert len(mine.messages()) == 1, "without subscribing again"
        assert mine.publish(name, member.signed(name)) == "done"


def test_a_slow_reader_is_cut_off_while_others_get_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "PUBLISH_BYTES_BURST", 1e9)
    big = ["f" * 390 for _ in range(150)]
    with (
        line(hub, member_of(hub)) as speaker,
        line(hub, member_of(hub)) as quick,
        line(hub, member_of(hub), max_queue=1, ping_interval=None) as slow,
    ):
        quick.subscribe("requestTasks")
        slow.subscribe("requestTasks")
        # Its library reads no more once so many frames wait; ours has to notice.
        sent = [speaker.member.signed("requestTasks", taskFunctionIds=[*big, f"n.{n}"]) for n in range(400)]
        got: list[Any] = []

        def listen() -> None:
            while len(got) < len(sent) and quick.read(10):
                got.extend(
                    item["data"]["body"]["taskFunctionIds"][-1] for item in quick.came if item["type"] == "message"
                )
                quick.came.clear()

        listener = threading.Thread(target=listen)
        listener.start()
        for message in sent:
            assert speaker.publish("requestTasks", message) == "done"
        listener.join(30)
        assert got == [f"n.{n}" for n in range(400)]
        until = time.monotonic() + 5
        while hub.node.hub_bands.present(slow.member.id):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert hub.node.hub_bands._queued < member_connections.MAX_QUEUED_BYTES
        with pytest.raises(ConnectionClosed):
            for _ in range(10_000):
                slow.read(2)
        assert len([item for item in slow.came if item["type"] == "message"]) < 400


def test_more_than_the_quota_is_read_more_slowly(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member_connections, "PUBLISH_BURST", 50.0)
    monkeypatch.setattr(member_connections, "PUBLISH_RATE", 100.0)
    with line(hub, member_of(hub)) as storm, line(hub, member_of(hub)) as other:
        other.subscribe("requestFiles")
        message = json.loads(storm.member.signed("requestFiles").text)
        began = time.monotonic()
        for number in range(150):
            storm.send(
                {"type": "publish", "id": number, "channel": CHANNEL, "band": "requestFiles", "messages": [message]}
            )
        for _ in range(150):
            storm.next("done", 10)
        assert time.monotonic() - began > 0.9
        assert len(other.messages()) == 150, "late, not lost"


def test_the_server_stops(hub: Hub) -> None:
    with line(hub, member_of(hub)) as first:
        began = time.monotonic()
        hub.loop.call_soon_threadsafe(hub.node.stop)
        hub._server.should_exit = True
        with pytest.raises(ConnectionClosed) as closed:
            while first.read(5):
                pass
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
        hub._thread.join(10)
        assert time.monotonic() - began < 30


# -- the edge ----------------------------------------------------------------------------------------------------


def upgraded(hub: Hub, member: Member) -> socket.socket:
    """A bare socket behind the upgrade."""
    raw = socket.create_connection(("127.0.0.1", hub.port))
    head = "".join(f"{name}: {value}\r\n" for name, value in header(hub, member).items())
    raw.sendall(
        f"GET {TARGET} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{head}\r\n".encode()
    )
    assert raw.recv(12) == b"HTTP/1.1 101"
    return raw


def frame(opcode: int, payload: bytes) -> bytes:
    """A masked frame with a mask of zeros."""
    assert len(payload) < 126
    return bytes([opcode, 0x80 | len(payload)]) + bytes(4) + payload


@pytest.mark.parametrize("opcode", [0x89, 0x00], ids=["pings", "fragments"])
def test_a_peer_that_sends_and_never_reads_is_cut_off(hub: Hub, opcode: int) -> None:
    member = member_of(hub)
    with upgraded(hub, member) as raw:
        if opcode == 0x00:
            raw.sendall(frame(0x01, b"["))
        piece = frame(opcode, b"x" * 125 if opcode == 0x89 else b"") * 500
        raw.settimeout(5)
        sent = 0
        with suppress(ConnectionError):
            while sent < 100 << 20:
                sent += raw.send(piece)
        assert sent < 50 << 20, "it took everything"


def test_a_peer_that_does_not_read_the_end_is_forgotten(hub: Hub) -> None:
    member = member_of(hub)
    with upgraded(hub, member) as raw:
        raw.sendall(frame(0x81, b"nonsense"))
        until = time.monotonic() + 10
        while any(getattr(one, "conn", None) for one in hub._server.server_state.connections):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert raw.recv(65536)


def test_it_is_a_websocket_only(hub: Hub) -> None:
    assert hub.get(TARGET).status == 404
