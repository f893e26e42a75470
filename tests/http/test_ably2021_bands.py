"""Messages and rights on the bands, over a raw WebSocket of the provider's protocol; each refusal is paired."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.band_messages import MAX_PAYLOAD, SHAPES, encode_payload, parse_payload
from kachery_lab.core.bands import BANDS, capability, role_for
from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.ids import NodeId, NodeLabel, UserName
from kachery_lab.core.roles import Role
from kachery_lab.core.signatures import sign_2021
from kachery_lab.services.certificates import Bearer
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.subjects import Subject
from tests.hubs import OWNER, Hub, LabNode
from tests.members2021 import (
    ACK,
    ATTACHED,
    CONNECTED,
    DETACH,
    DETACHED,
    DISCONNECTED,
    ERROR,
    MESSAGE,
    PUBLISH_MODE,
    SUBSCRIBE_MODE,
    Wire,
    joined,
    payload,
    request_file,
    token_details,
)

VECTORS = Path(__file__).parents[1] / "vectors"
RECORDED = json.loads((VECTORS / "pubsub_messages.json").read_text())["recorded"]
SHA1 = "0" * 40


# -- messages ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded_hub(hub: Hub) -> Hub:
    """The hub with the channel of the recordings. Their keys are not known, so their tokens are issued directly."""
    hub.make_channel("testchan")
    senders = {json.loads(one["payloadText"])["messages"][0]["fromNodeId"] for one in RECORDED}
    for number, sender in enumerate(sorted(senders)):
        hub.call(hub.node.nodes.add(OPERATOR, NodeId(sender), UserName(OWNER), NodeLabel(f"recorder-{number}")))
        hub.join(NodeId(sender), "testchan")
    return hub


def token_of(hub: Hub, node_id: str, channel: str) -> str:
    bearer = Bearer(hub.node.data.channel(channel), Subject("node", node_id))
    return hub.node.band_tokens.issue(bearer, capability(channel, Role.ALL))[0]


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_recorded_messages_reach_the_others(recorded_hub: Hub, wire: str, number: int) -> None:
    recorded = RECORDED[number]
    assert recorded["valid"] and recorded["signatureVerifies"]
    data, name = recorded["payloadText"].encode(), recorded["pubsubChannel"]
    sender = json.loads(data)["messages"][0]["fromNodeId"]
    listener = next(node for node, in_channel in _members(recorded_hub, "testchan") if node != sender)
    with (
        Wire(recorded_hub.port, token_of(recorded_hub, sender, "testchan"), wire) as one,
        Wire(recorded_hub.port, token_of(recorded_hub, listener, "testchan"), wire) as two,
    ):
        one.expect(CONNECTED)
        two.expect(CONNECTED)
        assert two.attach(name)["action"] == ATTACHED
        assert one.publish(name, data)["action"] == ACK
        got = two.expect(MESSAGE)
        assert got["channel"] == name
        assert isinstance(got["id"], str)
        assert isinstance(got["connectionId"], str)
        assert abs(got["timestamp"] - time.time() * 1000) < 60_000
        (text,) = two.payloads(got)
        assert json.loads(text) == json.loads(data)
        # What comes from another node is not passed on, however good its signature is.
        assert two.publish(name, data)["error"]["code"] == 40160


def _members(hub: Hub, channel: str) -> list[tuple[str, str]]:
    return sorted((node, name) for name, node in hub.node.data.memberships if name == channel)


@pytest.mark.parametrize("shape", json.loads((VECTORS / "pubsub_messages.json").read_text())["bodyShapes"], ids=repr)
def test_recorded_shapes(hub: Hub, channel: str, member: LabNode, shape: dict[str, Any]) -> None:
    """Shapes that the daemon takes are passed on; others are refused, whatever their signature."""
    body = json.loads(shape["json"])
    signature = sign_2021(member.key, canonical_2021(body))
    data = json.dumps({"body": body, "fromNodeId": member.id, "signature": signature}).encode()
    kind = body.get("type") if isinstance(body, dict) else None
    band = SHAPES[kind].band if kind in SHAPES else "requestFiles"
    with joined(hub, member, channel) as one:
        answer = one.publish(f"{channel}-{band}", data)
        assert (answer["action"] == ACK) == shape["valid"], answer
        assert shape["valid"] or answer["error"]["code"] == 40013


def test_both_formats_meet(hub: Hub, channel: str, member: LabNode, other: LabNode) -> None:
    name = f"{channel}-requestFiles"
    with joined(hub, member, channel, "json") as one, joined(hub, other, channel, "msgpack") as two:
        for here, there, node in ((one, two, member), (two, one, other)):
            assert there.attach(name)["action"] == ATTACHED
            data = request_file(node, SHA1)
            assert here.publish(name, data)["action"] == ACK
            assert there.payloads(there.expect(MESSAGE)) == [data]
            there.send(DETACH, channel=name)
            there.expect(DETACHED)


def test_a_publisher_hears_itself_when_it_is_attached(pair: tuple[Wire, Wire], channel: str, member: LabNode) -> None:
    one, _ = pair
    name = f"{channel}-requestFiles"
    one.attach(name)
    one.send_message(name, request_file(member, SHA1))
    assert {one.receive()["action"], one.receive()["action"]} == {ACK, MESSAGE}


def test_several_messages_and_payloads(pair: tuple[Wire, Wire], channel: str, member: LabNode) -> None:
    one, two = pair
    name = f"{channel}-requestFiles"
    two.attach(name)
    first, second, third = (request_file(member, digit * 40) for digit in "abc")
    both = encode_payload([*parse_payload(first), *parse_payload(second)])
    bare = json.dumps(json.loads(third)["messages"][0]).encode()
    assert one.publish(name, both, bare)["action"] == ACK
    got = [json.loads(text)["messages"][0] for _ in range(3) for text in two.payloads(two.expect(MESSAGE))]
    assert [one["body"]["fileKey"]["sha1"][0] for one in got] == list("abc")
    # All or none: one that is wrong keeps the others back.
    assert one.publish(name, first, b"{}")["error"]["code"] == 40013
    assert two.silent()


def test_detached_hears_nothing_more(pair: tuple[Wire, Wire], channel: str, member: LabNode) -> None:
    one, two = pair
    name = f"{channel}-requestFiles"
    two.attach(name)
    one.publish(name, request_file(member, SHA1))
    two.expect(MESSAGE)
    two.send(DETACH, channel=name)
    assert two.expect(DETACHED)["channel"] == name
    one.publish(name, request_file(member, SHA1))
    assert two.silent()


def test_65536_bytes(pair: tuple[Wire, Wire], channel: str, member: LabNode) -> None:
    one, two = pair
    name = f"{channel}-requestTasks"
    two.attach(name)
    empty = len(payload(member, task_request("")))
    largest = payload(member, task_request("x" * (MAX_PAYLOAD - empty)))
    assert len(largest) == MAX_PAYLOAD
    assert one.publish(name, largest)["action"] == ACK
    assert two.payloads(two.expect(MESSAGE)) == [largest]
    assert one.publish(name, largest.replace(b"{", b"{ ", 1))["error"]["code"] == 40009
    half = payload(member, task_request("x" * 32_768))
    assert one.publish(name, half)["action"] == ACK
    assert one.publish(name, half, half)["error"]["code"] == 40009


def task_request(text: str) -> dict[str, Any]:
    return {
        "type": "requestTask",
        "backendId": None,
        "taskId": "t",
        "taskFunctionId": "f.1",
        "taskFunctionType": "query",
        "taskKwargs": {"a": text},
    }


# -- rights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("band", BANDS)
def test_each_right_needs_its_role(hub: Hub, channel: str, band: str, wire: str) -> None:
    """Twelve rights: a node that has just the one role uses them, one that has all others does not."""
    name = f"{channel}-{band}"
    for right in ("publish", "subscribe"):
        role = role_for(band, right)
        for roles, allowed in ((role, True), (Role.ALL & ~role, False)):
            node = LabNode()
            hub.register(node)
            hub.join(node, channel, roles)
            with joined(hub, node, channel, wire) as one:
                answer = one.publish(name, b"{}") if right == "publish" else one.attach(name)
                if right == "publish":
                    # The payload is no message; what may not be published is not looked at.
                    assert answer["error"]["code"] == (40013 if allowed else 40160)
                else:
                    assert answer["action"] == (ATTACHED if allowed else ERROR)
                    assert allowed or answer["error"]["code"] == 40160


def test_attaching_only_to_publish(hub: Hub, channel: str) -> None:
    node = LabNode()
    hub.register(node)
    hub.join(node, channel, Role.REQUEST_FILES)
    name = f"{channel}-requestFiles"
    with joined(hub, node, channel) as one:
        assert one.attach(name, flags=PUBLISH_MODE)["flags"] == PUBLISH_MODE
        assert one.attach(name, flags=SUBSCRIBE_MODE)["error"]["code"] == 40160
        assert one.attach(name)["error"]["code"] == 40160
        assert one.attach(f"{channel}-provideFiles")["flags"] == SUBSCRIBE_MODE
        assert one.publish(name, request_file(node, SHA1))["action"] == ACK


def test_other_channels_do_not_exist(hub: Hub, channel: str, member: LabNode) -> None:
    """A band of another channel of the same node, of one of others, and none at all: the same answer."""
    hub.make_channel(f"{channel}x")
    hub.join(member, f"{channel}x")
    with joined(hub, member, channel) as one:
        texts = set()
        for name in (f"{channel}x-requestFiles", "nothing-requestFiles", f"{channel}-nothing", channel, "x" * 100):
            answer = one.attach(name)
            assert (answer["action"], answer["channel"], answer["error"]["code"]) == (ERROR, name, 40160)
            assert one.publish(name, request_file(member, SHA1))["error"]["code"] == 40160
            texts.add(answer["error"]["message"].replace(name, ""))
        assert len(texts) == 1
        assert one.attach(f"{channel}-requestFiles")["action"] == ATTACHED


def test_the_token_is_a_ceiling(hub: Hub, channel: str, member: LabNode) -> None:
    name = f"{channel}-requestFiles"
    less = token_details(hub, member, channel, {name: ["subscribe"]})["token"]
    with Wire(hub.port, less) as one, joined(hub, member, channel) as two:
        one.expect(CONNECTED)
        assert one.publish(name, request_file(member, SHA1))["error"]["code"] == 40160
        assert two.publish(name, request_file(member, SHA1))["action"] == ACK
        assert one.attach(name)["flags"] == SUBSCRIBE_MODE
        assert one.attach(f"{channel}-provideFiles")["error"]["code"] == 40160
    assert (f"node:{member.id}", "band.publish", name) in [entry[:3] for entry in hub.refusals()]


def test_nobody_speaks_for_another(pair: tuple[Wire, Wire], channel: str, member: LabNode, other: LabNode) -> None:
    one, two = pair
    name = f"{channel}-requestFiles"
    two.attach(name)
    good = json.loads(request_file(member, SHA1))["messages"][0]
    for forged, code in [
        (json.loads(request_file(other, SHA1))["messages"][0], 40160),
        ({**good, "fromNodeId": other.id}, 40160),
        ({**good, "signature": "0" * 128}, 40013),
        ({**good, "signature": good["signature"][:-2]}, 40013),
        ({**good, "body": {**good["body"], "fileKey": {"sha1": "1" * 40}}}, 40013),
        ({**good, "more": 1}, 40013),
    ]:
        assert one.publish(name, json.dumps({"messages": [forged]}).encode())["error"]["code"] == code
    assert two.silent(0.1)
    assert one.publish(name, json.dumps({"messages": [good]}).encode())["action"] == ACK
    two.expect(MESSAGE)


def test_roles_that_go_and_come_back(hub: Hub, channel: str, member: LabNode, other: LabNode, wire: str) -> None:
    name = f"{channel}-requestFiles"
    everything = PUBLISH_MODE | SUBSCRIBE_MODE
    with joined(hub, member, channel, wire) as one, joined(hub, other, channel, wire) as two:

        def heard() -> bool:
            assert one.publish(name, request_file(member, SHA1))["action"] == ACK
            try:
                return two.receive(0.3)["action"] == MESSAGE
            except TimeoutError:
                return False

        assert two.attach(name)["flags"] == everything
        assert heard()
        # What is left may still be used: the library publishes only on bands that it has attached or never did.
        hub.grant(other.id, channel, Role.ALL & ~Role.PROVIDE_FILES)
        less = two.expect(ATTACHED, seconds=1)
        assert (less["channel"], less["flags"], less["error"]["code"]) == (name, PUBLISH_MODE, 40160)
        assert not heard()
        assert two.publish(name, request_file(other, SHA1))["action"] == ACK
        assert (answer := two.attach(name))["flags"] == PUBLISH_MODE
        assert answer["error"]["code"] == 40160
        hub.grant(other.id, channel, Role.PROVIDE_FEEDS)
        gone = two.expect(DETACHED, seconds=1)
        assert (gone["channel"], gone["error"]["code"]) == (name, 40160)
        assert two.publish(name, request_file(other, SHA1))["error"]["code"] == 40160
        # The library attaches again at once; it is told to try later.
        assert (answer := two.attach(name))["action"] == DETACHED
        assert answer["error"]["code"] == 40160
        assert not heard()
        hub.grant(other.id, channel, Role.PROVIDE_FILES)
        assert two.expect(ATTACHED, seconds=1)["flags"] == SUBSCRIBE_MODE
        assert heard()
        hub.grant(other.id, channel, Role.ALL)
        assert (answer := two.expect(ATTACHED, seconds=1))["flags"] == everything
        assert "error" not in answer
        assert heard()
        two.send(DETACH, channel=name)
        two.expect(DETACHED)
        hub.revoke(other.id, channel)
        hub.grant(other.id, channel, Role.ALL)
        assert not heard()


@pytest.mark.parametrize("role", [one for one in Role if one in Role.ALL], ids=lambda role: str(role.name))
def test_each_role_stops_its_publications_at_once(
    hub: Hub, channel: str, member: LabNode, other: LabNode, role: Role
) -> None:
    with joined(hub, member, channel) as one:
        bands = [band for band in BANDS if role_for(band, "publish") == role]
        (band,) = bands
        data = payload(member, EXAMPLES[band])
        assert one.publish(f"{channel}-{band}", data)["action"] == ACK
        hub.grant(member.id, channel, Role.ALL & ~role)
        answer = one.publish(f"{channel}-{band}", data)
        assert answer["error"]["code"] == 40160
        hub.grant(member.id, channel, role)
        assert one.publish(f"{channel}-{band}", data)["action"] == ACK


EXAMPLES: dict[str, dict[str, Any]] = {
    "requestFiles": {"type": "requestFile", "fileKey": {"sha1": SHA1}},
    "provideFiles": {"type": "uploadFileStatus", "fileKey": {"sha1": SHA1}, "status": "started"},
    "requestFeeds": {"type": "subscribeToSubfeed", "feedId": "a" * 64, "subfeedHash": SHA1, "position": 0},
    "provideFeeds": {"type": "numSubfeedMessagesUploaded", "feedId": "a" * 64, "subfeedHash": SHA1, "numMessages": 1},
    "requestTasks": {"type": "probeTaskFunctions", "taskFunctionIds": ["f.1"]},
    "provideTasks": {"type": "updateTaskStatus", "taskId": "t", "status": "running"},
}


def test_a_node_that_is_no_longer_approved_is_cut_off(hub: Hub, channel: str, member: LabNode, wire: str) -> None:
    token = token_details(hub, member, channel)["token"]
    with Wire(hub.port, token, wire) as one:
        one.expect(CONNECTED)
        hub.call(hub.node.nodes.remove(OPERATOR, member.id))
        assert one.expect(DISCONNECTED, seconds=1)["error"]["code"] == 40141
        assert one.ended() == []
    with Wire(hub.port, token, wire) as one:
        assert one.expect(ERROR)["error"]["code"] == 40141
    hub.register(member)
    hub.join(member, channel)
    with Wire(hub.port, token, wire) as one:
        one.expect(CONNECTED)
