"""The hub API of 2021: what was recorded from its clients, and everything that must be refused.

Each refusal stands beside the same request that succeeds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kachery_lab.core.canonical_json import canonical_2021, python_form
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role
from kachery_lab.core.signatures import sign_2021
from tests.http import shapes2021
from tests.hubs import OWNER, Hub, LabNode, path_of, refused, upload_request

VECTORS = Path(__file__).parents[1] / "vectors"
EXCHANGES = json.loads((VECTORS / "hub_exchanges.json").read_text("utf-8"))["exchanges"]
SHAPES = json.loads((VECTORS / "hub_response_shapes.json").read_text("utf-8"))
PYTHON = json.loads((VECTORS / "signatures_python_client.json").read_text("utf-8"))
CURVE_ORDER = 2**252 + 27742317777372353535851937790883648493


# -- what was recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHAPES["responses"], ids=lambda case: f"{case['requestType']}: {case['name']}")
def test_the_validator_agrees_with_the_recorded_daemon(case: dict[str, Any]) -> None:
    assert shapes2021.ANSWERS[case["requestType"]](case["response"]) is case["acceptedByDaemon"]


@pytest.mark.parametrize("public", [False, True])
def test_every_answer_passes_the_daemons_validators(hub: Hub, public: bool) -> None:
    name, node = f"v{time.monotonic_ns():x}", LabNode()
    hub.make_channel(name, public=public)
    hub.register(node)
    hub.join(node, name, Role.REQUEST_FILES | Role.PROVIDE_FEEDS)
    assert hub.ask(node, "report", nodeLabel="nodeA").json() == {"success": True, "found": True}
    for kind, fields in (
        ("getNodeConfig", {}),
        ("getChannelConfig", {"channelName": name}),
        ("getBitwooderCertForChannel", {"channelName": name}),
    ):
        answer = hub.ask(node, kind, **fields)
        assert answer.status == 200
        assert shapes2021.ANSWERS[kind](answer.json()), answer.body
    config = hub.ask(node, "getNodeConfig").json()["nodeConfig"]
    (membership,) = config["channelMemberships"]
    assert membership["roles"] == {}
    assert membership["channelResourceId"] == hub.node.data.channel(name).resource_id
    granted = membership["authorization"]["permissions"]
    assert {role for role, is_granted in granted.items() if is_granted} == {"requestFiles", "provideFeeds"}
    assert (membership["channelBucketBaseUrl"] == f"{hub.base}/bucket") is public
    assert config["lastNodeReport"] == {"nodeId": node.id, "ownerId": OWNER, "nodeLabel": "nodeA"}


def recorded(kind: str, sender: str) -> Any:
    for exchange in EXCHANGES:
        body = exchange["request"].get("json", {}).get("body", {})
        if body.get("type") == kind and exchange["from"].startswith(sender):
            return exchange
    raise AssertionError(kind)


@pytest.mark.parametrize(
    ("sender", "kinds"),
    [
        ("kachery-daemon", ["report", "getNodeConfig", "getChannelConfig", "getBitwooderCertForChannel"]),
        ("kachery-client", ["getNodeConfig", "getChannelConfig", "getBitwooderCertForChannel"]),
    ],
)
def test_recorded_requests_are_answered_like_the_recorded_answers(
    tmp_path: Path, sender: str, kinds: list[str]
) -> None:
    with Hub(tmp_path) as hub:
        envelope = recorded("getNodeConfig", sender)["request"]["json"]
        assert hub.post("/api/kacheryNode", envelope).json() == {"found": False}
        node = SimpleNamespace(id=envelope["nodeId"], owner=OWNER)
        hub.make_channel("testchan")
        hub.register(node)  # type: ignore[arg-type]
        hub.join(node.id, "testchan")
        for kind in kinds:
            exchange = recorded(kind, sender)
            answer = hub.post("/api/kacheryNode", exchange["request"]["json"])
            assert answer.status == exchange["response"]["status"]
            ours, theirs = answer.json(), exchange["response"]["json"]
            assert set(ours) == set(theirs)
            if kind == "getNodeConfig":
                (a,), (b,) = (x["nodeConfig"]["channelMemberships"] for x in (ours, theirs))
                assert a["authorization"] == b["authorization"]
                assert set(a) == set(b)
            elif kind == "getChannelConfig":
                assert set(ours["channelConfig"]) == set(theirs["channelConfig"])
            elif kind == "getBitwooderCertForChannel":
                a, b = (x["cert"]["payload"] for x in (ours, theirs))
                assert set(a) == set(b)
                assert a["attributes"]["ablyCapability"] == b["attributes"]["ablyCapability"]
        base = hub.post("/api/getChannelBucketBaseUrl", {"channelName": "testchan"})
        assert base.json() == {"url": f"{hub.base}/bucket"}


def test_a_recorded_upload_request_fails_only_because_its_certificate_is_foreign(hub: Hub, member: LabNode) -> None:
    requests = [e["request"]["json"] for e in EXCHANGES if e["request"]["path"] == "/api/resource"]
    assert len(requests) >= 5
    for request in requests:
        assert "there is no such resource" in refused(hub.post("/api/resource", request))


@pytest.mark.parametrize("case", SHAPES["resourceRequestShapes"], ids=lambda case: case["name"])
def test_shapes_of_resource_requests(hub: Hub, case: dict[str, Any]) -> None:
    answer = hub.post("/api/resource", case["request"])
    # What the daemon's validator accepts is well-formed here too; nothing of it is known or certified.
    refused(answer, 404 if case["valid"] and case["name"] != "getResourceInfo by key" else answer.status)
    if not case["valid"]:
        assert answer.status == 400


NODE_REQUESTS = [case for case in PYTHON["cases"] if "getUploadUrls" not in case["bodyAsSentJson"]]


@pytest.mark.parametrize("case", NODE_REQUESTS, ids=lambda case: case["textSignedByClient"][:60])
def test_what_the_python_client_signs_is_accepted(hub: Hub, case: dict[str, Any]) -> None:
    body = json.loads(case["bodyAsSentJson"])
    text = f'{{"body": {case["bodyAsSentJson"]}, "nodeId": "{PYTHON["publicKeyHex"]}", "signature": "%s"}}'
    answer = hub.post("/api/kacheryNode", (text % case["signature"]).encode())
    if body["type"] == "getNodeConfig":
        assert answer.json() == {"found": False}
    else:
        assert "no channel" in refused(answer)
    wrong = ("0" if case["signature"][0] != "0" else "1") + case["signature"][1:]
    assert "signature" in refused(hub.post("/api/kacheryNode", (text % wrong).encode()))


@pytest.mark.parametrize("whole", [False, True], ids=["fraction", "whole float"])
def test_expires_as_the_python_client_sends_it(hub: Hub, channel: str, member: LabNode, whole: bool) -> None:
    certificate, key = hub.certificate(member, channel)
    request = upload_request(
        certificate, key, hub.node.data.channel(channel).resource_id, [f"{channel}/{path_of(b'x')}"], [1]
    )
    expires = float(int(time.time() * 1000) + 60_000) + (0 if whole else 0.25)
    payload = {**request["payload"], "expires": expires}
    request["payload"] = payload
    request["auth"]["signature"] = sign_2021(PrivateKey.from_seed(key), python_form(payload))
    assert (f"{int(expires)}.0" in json.dumps(request)) is whole
    assert hub.post("/api/resource", request).status == 200
    request["payload"] = {**payload, "expires": expires + 1}
    assert "signature" in refused(hub.post("/api/resource", request))


def test_the_legacy_signature_is_accepted(hub: Hub, member: LabNode) -> None:
    envelope = member.envelope("getNodeConfig")
    envelope["signature"] = member.key.sign(canonical_2021(envelope["body"]).encode()).hex()
    assert hub.post("/api/kacheryNode", envelope).json()["found"] is True
    assert hub.post("//api/kacheryNode", envelope).json()["found"] is True


# -- who is refused ----------------------------------------------------------------------------------------------------


def test_forged_signatures(hub: Hub, channel: str, member: LabNode) -> None:
    other = LabNode()
    good = member.envelope("getNodeConfig")
    assert hub.post("/api/kacheryNode", good).status == 200
    signature = good["signature"]
    tail = int.from_bytes(bytes.fromhex(signature)[32:], "little") + CURVE_ORDER
    forged = [
        {**good, "nodeId": other.id},
        {**good, "signature": other.envelope("getNodeConfig")["signature"]},
        {**good, "signature": "0" * 128},
        {**good, "signature": signature[64:] + signature[:64]},
        {**good, "signature": signature[:64] + tail.to_bytes(32, "little").hex()},
        {**good, "body": {**good["body"], "ownerId": "somebody@else"}},
        {**other.envelope("getNodeConfig"), "body": good["body"]},
        # A point of small order, for which one signature fits every message.
        {**good, "nodeId": "01" + "00" * 31, "signature": "01" + "00" * 63},
    ]
    for envelope in forged:
        assert "signature" in refused(hub.post("/api/kacheryNode", envelope))
    signed_for_other = other.envelope("getNodeConfig", nodeId=member.id)
    assert "body.nodeId" in refused(hub.post("/api/kacheryNode", signed_for_other))
    for signature_text in (signature[:126], signature + "00", "", None, 5):
        refused(hub.post("/api/kacheryNode", {**good, "signature": signature_text}), 400)


def test_a_wrong_owner(hub: Hub, channel: str, member: LabNode) -> None:
    stranger = LabNode("other@example.org")
    stranger.key = member.key
    assert hub.ask(stranger, "getNodeConfig").json() == {"found": False}
    assert "owner" in refused(hub.ask(stranger, "getBitwooderCertForChannel", channelName=channel))
    refused(hub.ask(stranger, "report", nodeLabel="n"))
    assert hub.ask(member, "getNodeConfig").json()["found"] is True
    assert hub.certificate(member, channel)
    assert hub.ask(member, "report", nodeLabel="n").json()["found"] is True


def test_a_node_waits_for_approval(hub: Hub, channel: str) -> None:
    node = LabNode()
    assert hub.ask(node, "report", nodeLabel="late").json() == {"success": True, "found": False}
    hub.join(node, channel)
    assert hub.ask(node, "getNodeConfig").json() == {"found": False}
    refused(hub.ask(node, "getChannelConfig", channelName=channel))
    refused(hub.ask(node, "getBitwooderCertForChannel", channelName=channel))
    hub.register(node)
    assert hub.ask(node, "report", nodeLabel="late").json() == {"success": True, "found": True}
    assert hub.ask(node, "getNodeConfig").json()["found"] is True
    assert hub.ask(node, "getChannelConfig", channelName=channel).status == 200
    assert hub.certificate(node, channel)


def test_a_channel_shows_itself_to_members_only(hub: Hub, channel: str, member: LabNode) -> None:
    stranger = LabNode()
    hub.register(stranger)
    for kind in ("getChannelConfig", "getBitwooderCertForChannel"):
        about_real = refused(hub.ask(stranger, kind, channelName=channel))
        about_none = refused(hub.ask(stranger, kind, channelName="no-such-channel"))
        assert about_real.replace(channel, "") == about_none.replace("no-such-channel", "")
        assert hub.ask(member, kind, channelName=channel).status == 200
    urls = {hub.post("/api/getChannelBucketBaseUrl", {"channelName": n}).body for n in (channel, "no-such-channel")}
    assert len(urls) == 1


def test_names_that_nodes_of_2021_cannot_take_are_left_out(hub: Hub) -> None:
    node = LabNode()
    hub.register(node)
    for name in ("n" * 27, "n" * 28, "nn"):
        hub.make_channel(name)
        hub.join(node, name)
    config = hub.ask(node, "getNodeConfig").json()["nodeConfig"]
    assert [found["channelName"] for found in config["channelMemberships"]] == ["n" * 27]
    assert hub.ask(node, "getChannelConfig", channelName="n" * 27).status == 200
    for name in ("n" * 28, "nn"):
        refused(hub.ask(node, "getChannelConfig", channelName=name))


OLDER = [
    {"type": "getPubsubAuthForChannel", "channelName": "c"},
    {"type": "createSignedFileUploadUrl", "channelName": "c", "sha1": "0" * 40, "size": 1},
    {"type": "createSignedSubfeedMessageUploadUrl"},
    {"type": "createSignedTaskResultUploadUrl"},
]


@pytest.mark.parametrize("body", OLDER, ids=lambda body: body["type"])
def test_older_types_get_a_hint(hub: Hub, member: LabNode, body: dict[str, Any]) -> None:
    assert "update the node" in refused(hub.ask(member, body["type"]))


def test_the_older_hubs_own_page_gets_a_hint(hub: Hub) -> None:
    assert "/api/admin/v1" in refused(hub.post("/api/kacheryHub", {"type": "getAllChannels"}))


def test_old_nodes_can_be_refused(tmp_path: Path) -> None:
    node = LabNode()
    with Hub(tmp_path, legacy_nodes=False) as hub:
        hub.register(node)
        for path in ("/api/kacheryNode", "/api/resource", "/api/getChannelBucketBaseUrl"):
            assert "KACHERY_LAB_LEGACY_NODES" in refused(hub.post(path, node.envelope("getNodeConfig")))
    with Hub(tmp_path) as hub:
        assert hub.ask(node, "getNodeConfig").json()["found"] is True


MALFORMED = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b'{"body":{},"nodeId":"","signature":""}',
    b'{"body": NaN}',
    b'{"body": 1e999}',
    b'{"a":1,"a":1}',
    b'{"a":"\\ud800"}',
    b"\xef\xbb\xbf{}",
    b'{"a":"\xff"}',
    b"[" * 100_000,
    b"1" * 5000,
]


@pytest.mark.parametrize("path", ["/api/kacheryNode", "/api/resource", "/api/getChannelBucketBaseUrl"])
@pytest.mark.parametrize("data", MALFORMED, ids=lambda data: repr(data[:24]))
def test_malformed_bodies_are_400(hub: Hub, path: str, data: bytes) -> None:
    refused(hub.post(path, data), 400)


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"channelName": None},
        {"channelName": 5},
        {"channelName": "a/b"},
        {"channelName": ""},
        {"channelName": ["lab"]},
        {"type": "unknown"},
        {"type": None},
        {"big": 2**53 + 1},
        {"__proto__": 1},
    ],
    ids=repr,
)
def test_malformed_node_requests_are_400(hub: Hub, channel: str, member: LabNode, change: dict[str, Any]) -> None:
    good = member.envelope("getChannelConfig", channelName=channel)
    assert hub.post("/api/kacheryNode", good).status == 200
    body = {**good["body"], **change}
    signed = {"body": body, "nodeId": member.id, "signature": sign_2021(member.key, canonical_2021(body))}
    refused(hub.post("/api/kacheryNode", signed), 400)
    refused(hub.post("/api/kacheryNode", {**good, "more": 1}), 400)
