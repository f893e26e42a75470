"""What no library sends: refused with the provider's codes, never a 5xx or a dead server; each beside a good frame."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kachery_lab.errors import InvalidInput, TooLarge
from kachery_lab.http.protocols.ably2021.translate import MAX_FRAME, MAX_MESSAGES, decode, payloads
from tests.hubs import Hub, LabNode
from tests.members2021 import ACK, CONNECTED, ERROR, MESSAGE, NACK, Wire, joined, request_file, token_details

SHA1 = "0" * 40
FRAMES: list[str | bytes] = [
    "",
    " ",
    "null",
    "[]",
    "{}",
    "15",
    '"x"',
    '{"action":"15"}',
    '{"action":true}',
    '{"action":15.5}',
    '{"action":-1}',
    '{"action":99}',
    '{"action":1e999}',
    '{"action":NaN}',
    '{"action":0,"action":0}',
    '{"action":0,"id":"\\ud800"}',
    '{"action":4,"connectionId":"x"}',
    '{"action":1,"msgSerial":0,"count":1}',
    '{"action":10}',
    '{"action":10,"channel":5}',
    '{"action":10,"channel":""}',
    '{"action":10,"channel":"' + "x" * 101 + '"}',
    '{"action":15,"channel":"c-requestFiles"}',
    '{"action":15,"channel":"c-requestFiles","msgSerial":-1}',
    '{"action":15,"channel":"c-requestFiles","msgSerial":1.5}',
    '{"action":15,"channel":"c-requestFiles","msgSerial":9007199254740993}',
    '{"action":14}',
    '{"a":' * 20 + "1" + "}" * 20,
    "[" * 50_000,
    '{"action":0,"x":"' + "x" * MAX_FRAME + '"}',
    b"",
    b"\xc1",
    b"\xc0",
    b"\x90",
    b"\x80",
    b"\x81",
    b"\x0f",
    b"\xff" * 100,
    b"\x91" * 400 + b"\xc0",
    b"\x91" * 100_000,
    b"\x81\xa1a" * 30_000,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\x81\xa6action\xd6\xff\x00\x00\x00\x00",
    b"\x81\xa6action\xa2\xff\xfe",
    b"\x81\xc0\x0f",
    b"\x81\xa6action\x0f\x00",
    msgpack.packb({"action": 10, "channel": b"c-requestFiles"}),
    msgpack.packb({"action": 15, "channel": "c-requestFiles", "msgSerial": "0"}),
    msgpack.packb({"action": 0, "x": list(range(MAX_MESSAGES + 1))}),
    msgpack.packb({"action": 0, "x": b"x" * MAX_FRAME}),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: repr(frame)[:40])
def test_no_protocol_message(hub: Hub, channel: str, member: LabNode, frame: str | bytes) -> None:
    wire = "json" if isinstance(frame, str) else "msgpack"
    token = token_details(hub, member, channel)["token"]
    with Wire(hub.port, token, wire) as one, Wire(hub.port, token, wire) as beside:
        one.expect(CONNECTED)
        beside.expect(CONNECTED)
        good = one.publish(f"{channel}-requestFiles", request_file(member, SHA1))
        assert good["action"] == ACK
        one.send_raw(frame)
        answer = one.expect(ERROR)
        assert (answer["error"]["code"], answer["error"]["statusCode"]) == (40000, 400), answer
        assert "channel" not in answer
        assert one.ended() == []
        assert beside.publish(f"{channel}-requestFiles", request_file(member, SHA1))["action"] == ACK


def test_a_frame_beyond_all_limits_ends_the_connection(hub: Hub, channel: str, member: LabNode) -> None:
    for wire, frame in (("json", "x" * 300_000), ("msgpack", b"x" * 300_000)):
        with joined(hub, member, channel, wire) as one:
            one.send_raw(frame)  # type: ignore[arg-type]
            assert [answer["action"] for answer in one.ended()] in ([], [ERROR])
            assert one.socket.close_code == 1009


GOOD = base64.b64encode(b"{}").decode()


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        {},
        "x",
        [None],
        [[]],
        [{}],
        [{"data": None}],
        [{"data": 5}],
        [{"data": {"a": 1}}],
        [{"data": "text"}],
        [{"data": "{}", "encoding": "json"}],
        [{"data": "{}", "encoding": "utf-8"}],
        [{"data": GOOD, "encoding": "cipher+aes-128-cbc/base64"}],
        [{"data": GOOD, "encoding": ["base64"]}],
        [{"data": "*", "encoding": "base64"}],
        [{"data": "AAA", "encoding": "base64"}],
        [{"data": "é", "encoding": "base64"}],
        [{"data": GOOD, "encoding": "base64"}] * 2,
        [{"data": GOOD, "encoding": "base64"}] * (MAX_MESSAGES + 1),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_no_publication(hub: Hub, channel: str, member: LabNode, messages: Any) -> None:
    """Refused, and the connection goes on."""
    name = f"{channel}-requestFiles"
    with joined(hub, member, channel) as one:
        one.send(MESSAGE, channel=name, msgSerial=7, messages=messages)
        answer = one.expect(NACK)
        assert (answer["msgSerial"], answer["error"]["code"]) == (7, 40013)
        assert one.publish(name, request_file(member, SHA1))["action"] == ACK


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b"null",
        b"[]",
        b"{}",
        b'{"messages":{}}',
        b'{"messages":[1]}',
        b'{"messages":[],"x":1}',
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"[" * 60_000,
        b"1" * 60_000,
        b'{"messages":[{"body":{"type":"nothing"},"fromNodeId":"'
        + b"0" * 64
        + b'","signature":"'
        + b"0" * 128
        + b'"}]}',
    ],
    ids=lambda value: repr(value)[:40],
)
def test_no_payload(hub: Hub, channel: str, member: LabNode, data: bytes) -> None:
    name = f"{channel}-requestFiles"
    with joined(hub, member, channel, "msgpack") as one:
        assert one.publish(name, data)["error"]["code"] == 40013
        assert one.publish(name, request_file(member, SHA1))["action"] == ACK


def test_odd_flags_and_members_do_no_harm(hub: Hub, channel: str, member: LabNode) -> None:
    name = f"{channel}-requestFiles"
    with joined(hub, member, channel) as one:
        for flags in (None, "x", -1, 2**60, 1.5, True, [], 1 << 16):
            answer = one.attach(name, flags=flags, params={"rewind": "1"}, channelSerial="x", more={"a": [1]})
            assert answer["channel"] == name, answer
        assert one.publish(name, request_file(member, SHA1))["action"] in (ACK, MESSAGE)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(frame=st.one_of(st.binary(max_size=300), st.text(max_size=200)))
def test_decoding_fails_in_one_way_only(frame: str | bytes) -> None:
    try:
        fields = decode(frame)
    except (InvalidInput, TooLarge):
        return
    try:
        payloads(fields)
    except (InvalidInput, TooLarge):
        return


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.binary(max_size=20)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(messages=_VALUES, cut=st.integers(0, 40))
def test_payloads_fail_in_one_way_only(messages: Any, cut: int) -> None:
    frame = msgpack.packb({"action": 15, "messages": messages})
    for data in (frame, frame[: len(frame) - cut]):
        try:
            payloads(decode(data))
        except (InvalidInput, TooLarge):
            continue


def test_claimed_lengths_cost_nothing() -> None:
    """A header may claim 4 GiB; nothing is reserved for it."""
    for header in (b"\xdb", b"\xc6", b"\xdd", b"\xdf"):
        with pytest.raises(InvalidInput):
            decode(b"\x81\xa1a" + header + struct.pack(">I", 0xFFFFFFFF))
    assert decode(msgpack.packb({"action": 0})) == {"action": 0}
    assert decode(json.dumps({"action": 0})) == {"action": 0}
