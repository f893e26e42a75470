"""The provider's published library, unmodified, as a member of a channel's bands: what an older daemon does with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import NodeId
from kachery_lab.core.roles import Role
from kachery_lab.services.principals import OPERATOR
from tests.clients.ably.client import AblyClient, Refused
from tests.clients.ably.environment import library, need_library
from tests.faults.report import report, wait_for
from tests.hubs import Hub, LabNode, path_of, sha1_of
from tests.members2021 import payload, request_file, token_details

CHANNEL = "testchan"
ASK, PROVIDE = f"{CHANNEL}-requestFiles", f"{CHANNEL}-provideFiles"
SHA1 = "0" * 40
MODULE = Path(__file__).parents[3] / "docs" / "bands.cjs"


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    need_library()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as running:
        running.make_channel(CHANNEL)
        yield running


def make_member(hub: Hub, roles: Role = Role.ALL) -> LabNode:
    node = LabNode()
    hub.register(node)
    hub.join(node, CHANNEL, roles)
    return node


def client(hub: Hub, node: LabNode, **options: Any) -> AblyClient:
    """The library with this node's tokens."""
    return AblyClient(hub.port, lambda: token_details(hub, node, CHANNEL), **options)


MSGPACK: dict[str, Any] = {"binary": True}
JSON: dict[str, Any] = {"binary": False}
OF_2022: dict[str, Any] = {"binary": True, "package": "ably-2022"}
"""The version of the time of kachery-daemon 1.2.1; it speaks an older version of the protocol."""
kinds = pytest.mark.parametrize("kind", [MSGPACK, JSON, OF_2022], ids=["msgpack", "json", "2022"])


def text(data: bytes) -> str:
    return data.decode()


def status(node: LabNode, sha1: str, value: str) -> str:
    return text(payload(node, {"type": "uploadFileStatus", "fileKey": {"sha1": sha1}, "status": value}))


@kinds
def test_subscribe_publish_detach_close(hub: Hub, kind: dict[str, Any]) -> None:
    one, two = make_member(hub), make_member(hub)
    with (
        client(hub, one, **kind).connected() as a,
        client(hub, two, **(MSGPACK if kind is JSON else JSON)).connected() as b,
    ):
        assert set(b.call("subscribe", channel=ASK)) == {"publish", "subscribe"}
        sent = text(request_file(one, SHA1))
        a.call("publish", channel=ASK, text=sent)
        got = b.wait(event="message", channel=ASK)
        assert (got["text"], got["binary"]) == (sent, True)
        # Who is attached hears itself too.
        own = text(request_file(two, "1" * 40))
        b.call("publish", channel=ASK, text=own)
        assert b.wait(event="message", text=own)
        assert not a.messages()
        assert b.call("ping") < 5000
        b.call("detach", channel=ASK)
        a.call("publish", channel=ASK, text=sent)
        a.call("close")
        b.call("close")
        assert len(b.messages()) == 2
        assert [event["state"] for event in a.events if event["event"] == "connection"] == [
            *("connecting", "connected", "closing", "closed")
        ]
        assert a.tokens_asked == b.tokens_asked == 1
    wait_for(lambda: not hub.node.hub_bands.present(one.id), "the connection is forgotten")


@kinds
def test_what_roles_forbid_is_reported(hub: Hub, kind: dict[str, Any]) -> None:
    """A node that may only ask for files, beside one that may only provide them: all that one may the other may not."""
    asker, provider = make_member(hub, Role.REQUEST_FILES), make_member(hub, Role.PROVIDE_FILES)
    with client(hub, asker, **kind).connected() as a, client(hub, provider, **kind).connected() as p:
        for may, may_not, name in ((p, a, ASK), (a, p, PROVIDE)):
            assert "subscribe" in may.call("subscribe", channel=name)
            with pytest.raises(Refused) as refusal:
                may_not.call("subscribe", channel=name)
            assert (refusal.value.code, refusal.value.status) == (40160, 401)
            assert may_not.wait(event="channel", channel=name, state="failed")["reason"]["code"] == 40160
    with client(hub, asker, **kind).connected() as a, client(hub, provider, **kind).connected() as p:
        a.call("publish", channel=ASK, text=text(request_file(asker, SHA1)))
        p.call("publish", channel=PROVIDE, text=status(provider, SHA1, "started"))
        for who, node, name in ((p, provider, ASK), (a, asker, PROVIDE), (a, asker, "other-requestFiles")):
            with pytest.raises(Refused) as refusal:
                who.call("publish", channel=name, text=text(request_file(node, SHA1)))
            assert refusal.value.code == 40160
        # In the name of another node; no message at all; a member of presence.
        for do, fields, code in (
            ("publish", {"channel": ASK, "text": text(request_file(provider, SHA1))}, 40160),
            ("publish", {"channel": ASK, "text": "{}"}, 40013),
            ("publishObject", {"channel": ASK, "data": {"a": 1}}, 40013),
        ):
            with pytest.raises(Refused) as refusal:
                a.call(do, **fields)
            assert refusal.value.code == code
        with pytest.raises(Refused) as refusal:
            p.call("subscribe", channel=ASK)
            p.call("enter", channel=ASK)
        assert refusal.value.code == 40160
        a.call("publish", channel=ASK, text=text(request_file(asker, SHA1)))


@pytest.mark.parametrize("left", [Role.ALL & ~Role.PROVIDE_FILES, Role.REQUEST_FEEDS], ids=["one role", "all but one"])
def test_roles_that_go_stop_within_a_second(hub: Hub, left: Role) -> None:
    one, two = make_member(hub), make_member(hub)
    with client(hub, one).connected() as a, client(hub, two).connected() as b:
        b.call("subscribe", channel=ASK)
        a.call("publish", channel=ASK, text=text(request_file(one, SHA1)))
        b.wait(event="message")
        seen, begun = len(b.events), time.monotonic()
        hub.grant(two.id, CHANNEL, left)
        lost = b.wait(event="channel", after=seen, channel=ASK)
        assert lost["reason"]["code"] == 40160
        assert lost["state"] == ("attached" if left & Role.REQUEST_FILES else "attaching")
        stopped = lost["at"] - begun
        assert stopped < 10
        a.call("publish", channel=ASK, text=text(request_file(one, "1" * 40)))
        with pytest.raises(Refused) as refusal:
            b.call("publish", channel=PROVIDE, text=status(two, SHA1, "started"))
        assert refusal.value.code == 40160
        if left & Role.REQUEST_FILES:
            # What is left is not disturbed.
            b.call("publish", channel=ASK, text=text(request_file(two, "2" * 40)))
        else:
            b.wait(event="channel", after=seen, channel=ASK, state="suspended")
        assert len(b.messages()) == 1
        # The roles come back: the library hears again without being asked to.
        seen, begun = len(b.events), time.monotonic()
        hub.grant(two.id, CHANNEL, Role.ALL)
        again = b.wait(event="channel", after=seen, channel=ASK, state="attached", seconds=3)["at"] - begun
        a.call("publish", channel=ASK, text=text(request_file(one, "3" * 40)))
        b.wait(event="message", after=seen)
        assert [body["fileKey"]["sha1"][0] for body in b.messages()] == ["0", "3"]
        report("ably roles", 1, stopped_seconds=round(stopped, 3), back_seconds=round(again, 3))


@kinds
def test_the_library_renews_its_token(hub: Hub, kind: dict[str, Any]) -> None:
    """Before it expires, in the open connection: nothing is lost."""
    one = make_member(hub)
    hub.node.band_tokens.lifetime_ms = 3000
    with client(hub, one, **kind).connected() as a:
        a.call("subscribe", channel=ASK)
        sent, until = 0, time.monotonic() + 60
        while a.tokens_asked < 4 and time.monotonic() < until:
            a.call("publish", channel=ASK, text=text(request_file(one, f"{sent:040x}")))
            sent += 1
            time.sleep(0.1)
        wait_for(lambda: len(a.messages()) == sent, "every message came")
        assert a.tokens_asked >= 4
        assert [event["state"] for event in a.events if event["event"] == "connection"][:2] == [
            "connecting",
            "connected",
        ]
        assert not [event for event in a.events if event.get("state") in ("disconnected", "failed", "suspended")]
        report("ably renewal", sent, tokens=a.tokens_asked, lost=0)


def test_an_expired_token_is_renewed_after_40142(hub: Hub) -> None:
    one = make_member(hub)
    hub.node.band_tokens.lifetime_ms = 1
    old = token_details(hub, one, CHANNEL)
    hub.node.band_tokens.lifetime_ms = 60_000
    given = [old]
    with AblyClient(hub.port, lambda: given.pop() if given else token_details(hub, one, CHANNEL)).connected() as a:
        assert a.tokens_asked == 2
        a.call("publish", channel=ASK, text=text(request_file(one, SHA1)))


def test_a_token_that_cannot_be_renewed_ends_the_connection(hub: Hub) -> None:
    """And the library says why: 40142 of this server, then 40171 of its own."""
    one = make_member(hub)
    # Long enough for a program of a busy machine to start and to connect.
    hub.node.band_tokens.lifetime_ms = 6000
    details = token_details(hub, one, CHANNEL)
    no_callback: dict[str, Any] = {"authCallback": None, "tokenDetails": details}
    with AblyClient(hub.port, lambda: details, **no_callback).connected() as a:
        a.call("publish", channel=ASK, text=text(request_file(one, SHA1)))
        ended = a.wait(event="connection", state="failed")
        assert ended["reason"]["code"] in (40142, 40171)


def test_a_node_that_is_removed_gets_no_further(hub: Hub) -> None:
    one = make_member(hub)
    with client(hub, one, disconnectedRetryTimeout=500).connected() as a:
        seen = len(a.events)
        hub.call(hub.node.nodes.remove(OPERATOR, one.id))
        a.wait(event="connection", after=seen, state="disconnected")
        time.sleep(1)
        assert a.call("state") != "connected"
        hub.register(one)
        hub.join(one, CHANNEL)
        a.wait(event="connection", after=seen, state="connected")
        a.call("publish", channel=ASK, text=text(request_file(one, SHA1)))


@kinds
def test_the_library_comes_back_after_a_restart(tmp_path: Path, kind: dict[str, Any]) -> None:
    with Hub(tmp_path) as hub:
        port = hub.port
        hub.make_channel(CHANNEL)
        one, two = make_member(hub), make_member(hub)
        a, b = (
            AblyClient(
                port,
                lambda node=node: token_details(running[-1], node, CHANNEL),  # type: ignore[misc]
                **kind,
                disconnectedRetryTimeout=500,
            )
            for node in (one, two)
        )
        running = [hub]
        a.connected()
        b.connected()
        b.call("subscribe", channel=ASK)
    with a, b:
        seen = len(b.events)
        b.wait(event="connection", state="disconnected")
        with Hub(tmp_path, port=port) as again:
            running.append(again)
            first = b.wait(event="connection", after=seen, state="connected")
            b.wait(event="channel", after=seen, channel=ASK, state="attached")
            assert first["reason"] is None or first["reason"]["code"] == 80008
            a.wait(event="connection", after=4, state="connected")
            a.call("publish", channel=ASK, text=text(request_file(one, SHA1)))
            b.wait(event="message", after=seen)
            assert a.tokens_asked == b.tokens_asked == 1


# -- a program that cannot be told where to connect -------------------------------------------------------------------


@pytest.mark.parametrize("package", ["ably", "ably-2022"])
def test_the_module_of_the_documentation(hub: Hub, tmp_path: Path, package: str) -> None:
    """A program that gives the library no place, as the older daemon, is brought here by the preloaded module alone."""
    one = make_member(hub)

    def tokens() -> dict[str, Any]:
        return token_details(hub, one, CHANNEL)

    plain: dict[str, Any] = {"package": "ably", "autoConnect": False}
    # The program's own `require('ably')` is what the module looks out for, whatever its version.
    if package == "ably-2022":
        modules = tmp_path / "node_modules"
        modules.mkdir()
        (modules / "ably").symlink_to(library() / "node_modules" / "ably-2022")
        plain["directory"] = tmp_path
    with AblyClient(None, tokens, **plain) as a:
        assert a.call("place")["realtimeHost"] != "127.0.0.1"
    env = {"KACHERY_BANDS_URL": hub.base}
    with AblyClient(None, tokens, preload=MODULE, env=env, **{**plain, "autoConnect": True}).connected() as a:
        assert a.call("place") == {"realtimeHost": "127.0.0.1", "port": hub.port, "tls": False}
        a.call("subscribe", channel=ASK)
        a.call("publish", channel=ASK, text=text(request_file(one, SHA1)))
        a.wait(event="message", channel=ASK)


# -- files, with one of our nodes ----------------------------------------------------------------------------------


@pytest.fixture
def lab_node(hub: Hub, tmp_path: Path) -> Iterator[Hub]:
    """A server that has joined the hub's channel with every role."""
    with Hub(tmp_path / "member", hub_url=hub.base) as member:
        node_id = NodeId(member.node.identity.node_id)
        wait_for(lambda: node_id in hub.node.data.nodes, "the node has reported itself")
        hub.call(hub.node.nodes.approve(OPERATOR, node_id))
        hub.join(node_id, CHANNEL)
        wait_for(lambda: hub.node.hub_bands.present(node_id), "the node is on the hub's bands", 30)
        yield member


@kinds
def test_an_older_node_asks_and_one_of_ours_provides(hub: Hub, lab_node: Hub, kind: dict[str, Any]) -> None:
    older, data = make_member(hub), b"provided on demand" * 500
    sha1 = sha1_of(data)
    stored = lab_node.request("POST", "/store", data, {"KACHERY-CLIENT-AUTH-CODE": lab_node.code})
    assert stored.status == 200
    bucket = hub.bucket(older, CHANNEL)
    assert hub.get(f"{bucket}/{path_of(data)}").status == 404
    with client(hub, older, **kind).connected() as a:
        a.call("subscribe", channel=PROVIDE)
        begun = time.monotonic()
        a.call("publish", channel=ASK, text=text(request_file(older, sha1)))
        wait_for(lambda: {"finished"} <= {body["status"] for body in a.messages(PROVIDE)}, "the file was provided")
        took = time.monotonic() - begun
        assert {body["fileKey"]["sha1"] for body in a.messages(PROVIDE)} == {sha1}
        assert hub.get(f"{bucket}/{path_of(data)}").body == data
        # What nobody has is not answered.
        before = len(a.messages())
        a.call("publish", channel=ASK, text=text(request_file(older, "e" * 40)))
        time.sleep(1)
        assert len(a.messages()) == before
    report("ably file asked", 1, seconds=round(took, 3))


@kinds
def test_one_of_ours_asks_and_an_older_node_provides(hub: Hub, lab_node: Hub, kind: dict[str, Any]) -> None:
    older, data = make_member(hub), b"an older node has this" * 500
    sha1 = sha1_of(data)
    answers: list[Any] = []

    def load() -> None:
        wanted = {"fileKey": {"sha1": sha1}, "channelName": CHANNEL}
        answers.append(lab_node.daemon("/loadFile", wanted))

    with client(hub, older, **kind).connected() as a:
        a.call("subscribe", channel=ASK)
        loading = threading.Thread(target=load)
        begun = time.monotonic()
        loading.start()
        asked = json.loads(a.wait(event="message", channel=ASK)["text"])["messages"][0]
        assert asked["body"] == {"type": "requestFile", "fileKey": {"sha1": sha1}}
        assert asked["fromNodeId"] == lab_node.node.identity.node_id
        a.call("publish", channel=PROVIDE, text=status(older, sha1, "started"))
        hub.upload(older, CHANNEL, data)
        a.call("publish", channel=PROVIDE, text=status(older, sha1, "finished"))
        loading.join(30)
        took = time.monotonic() - begun
    assert b'"finished"' in answers[0].body, answers[0].body
    found = lab_node.daemon("/downloadFileData", {"fileKey": {"sha1": sha1}})
    assert found.body == data
    report("ably file provided", 1, seconds=round(took, 3))
