"""Band messages: recorded ones are read as the older daemon reads them, and what we sign it would accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.band_messages import (
    MAX_PAYLOAD,
    SHAPES,
    band_of,
    check_body,
    encode_payload,
    parse_message,
    parse_messages,
    parse_payload,
    payload_size,
    sign_message,
    split_feed_messages,
    split_messages,
)
from kachery_lab.core.bands import BANDS, rights, role_for
from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.feeds import SubfeedHead, sign_messages
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role
from kachery_lab.errors import InvalidInput, InvalidJson, TooLarge

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "pubsub_messages.json").read_text())
KEY = PrivateKey.from_seed("07" * 32)
SHA1 = "943a702d06f34599aee1f8da8ef9f7296031d699"
FILE = {"type": "requestFile", "fileKey": {"sha1": SHA1}}


def feed_body(sizes: list[int]) -> dict[str, Any]:
    texts = [canonical_2021({"text": "x" * size}) for size in sizes]
    signed, _ = sign_messages(KEY, SubfeedHead(), texts, 1_700_000_000_000)
    previous, messages = None, []
    for message in signed:
        messages.append(json.loads(message.envelope_text(previous)))
        previous = message.signature
    return {"type": "newSubfeedMessages", "feedId": KEY.public_hex, "subfeedHash": SHA1, "messages": messages}


@pytest.mark.parametrize("case", VECTORS["recorded"], ids=lambda case: case["pubsubChannel"])
def test_recorded_payloads(case: dict[str, Any]) -> None:
    assert case["valid"] and case["signatureVerifies"]
    (message,) = parse_payload(case["payloadText"].encode())
    assert message.canonical == case["canonicalBody"]
    assert message.verify()
    assert case["pubsubChannel"] == f"testchan-{band_of(message.kind)}"
    # On our wires it reads the same.
    assert parse_payload(encode_payload([message])) == [message]
    # A bare message is a payload too.
    assert parse_payload(message.text.encode()) == [message]


@pytest.mark.parametrize("case", VECTORS["bodyShapes"], ids=lambda case: case["json"][:60])
def test_recorded_shapes(case: dict[str, Any]) -> None:
    body = json.loads(case["json"])
    if case["valid"]:
        assert check_body(body) == body
    else:
        with pytest.raises(InvalidInput):
            check_body(body)


def test_each_type_has_a_band() -> None:
    assert {shape.band for shape in SHAPES.values()} == set(BANDS)
    with pytest.raises(InvalidInput, match="requestFile"):
        band_of("requestFiles")


@pytest.mark.parametrize("band", BANDS)
def test_rights_and_roles_say_the_same(band: str) -> None:
    for right in ("publish", "subscribe"):
        role = role_for(band, right)  # type: ignore[arg-type]
        assert right in rights(role)[band]
        assert right not in rights(Role.ALL & ~role).get(band, ())


def test_altered_messages_do_not_verify() -> None:
    message = sign_message(KEY, dict(FILE))
    assert message.verify()
    assert parse_message(json.loads(message.text)).verify()
    other = PrivateKey.from_seed("08" * 32).public_hex
    for changed in (
        message.text.replace(SHA1, "0" * 40),
        message.text.replace(KEY.public_hex, other),
        message.text.replace(message.signature, "0" * 128),
    ):
        assert not parse_message(json.loads(changed)).verify()


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"fromNodeId": "x"},
        {"signature": "ab"},
        {"body": []},
        {"body": {"type": ["requestFile"]}},
        {"body": {**FILE, "fileKey": None}},
        {"body": {**FILE, "fileKey": {"sha1": SHA1, "chunkOf": None}}},
    ],
    ids=str,
)
def test_other_shapes_are_refused(change: dict[str, Any]) -> None:
    good = json.loads(sign_message(KEY, dict(FILE)).text)
    assert parse_message(dict(good))
    with pytest.raises(InvalidInput):
        parse_message({**good, **change})


def test_whole_numbers_become_ints() -> None:
    body = {"type": "subscribeToSubfeed", "feedId": KEY.public_hex, "subfeedHash": SHA1, "position": 3.0}
    checked = check_body(body)
    assert (checked["position"], type(checked["position"])) == (3, int)


def test_what_cannot_be_signed_exactly() -> None:
    base = {"type": "requestTask", "taskId": "t", "taskFunctionId": "f.1", "taskFunctionType": "query"}
    assert sign_message(KEY, {**base, "taskKwargs": {"a": [1.5, "\u00e9\U0001f600"]}}).verify()
    for kwargs in ({"a": 2**53 + 1}, {"a": float("nan")}, {"a": "\ud800"}, {"__proto__": 1}, {"a": [{"__proto__": 1}]}):
        with pytest.raises(InvalidInput):
            sign_message(KEY, {**base, "taskKwargs": kwargs})
    # As text it is no key.
    quoted = sign_message(KEY, {**base, "taskKwargs": {"a": '"__proto__":'}})
    assert parse_payload(encode_payload([quoted]))[0].verify()
    hostile = {**json.loads(quoted.text), "body": {**base, "taskKwargs": {"__proto__": 1}}}
    with pytest.raises(InvalidInput, match="__proto__"):
        parse_message(hostile)


def test_payload_limit() -> None:
    body = {**FILE, "type": "requestFile"}
    one = payload_size([sign_message(KEY, body)])
    assert one == len(encode_payload([sign_message(KEY, body)]))
    room = MAX_PAYLOAD - len(encode_payload([sign_message(KEY, task("x" * 1000))])) + 1000
    largest = sign_message(KEY, task("x" * room))
    assert len(encode_payload([largest])) == MAX_PAYLOAD
    assert parse_payload(encode_payload([largest])) == [largest]
    with pytest.raises(TooLarge, match="65536"):
        sign_message(KEY, task("x" * (room + 1)))
    with pytest.raises(TooLarge):
        parse_payload(b" " * (MAX_PAYLOAD + 1))


def task(text: str) -> dict[str, Any]:
    return {
        "type": "requestTask",
        "taskId": "t",
        "taskFunctionId": "f.1",
        "taskFunctionType": "query",
        "taskKwargs": {"a": text},
    }


def test_splitting() -> None:
    messages = [sign_message(KEY, task("\u00e9" * size)) for size in (100, 9000, 9000, 10_000, 9500, 30_000, 1)]
    groups = list(split_messages(messages))
    assert [message for group in groups for message in group] == messages
    assert len(groups) == 3
    for group in groups:
        assert len(encode_payload(group)) == payload_size(group) <= MAX_PAYLOAD
    assert list(split_messages([])) == []


def test_splitting_feed_messages() -> None:
    body = feed_body([20_000, 20_000, 20_000, 30_000, 50_000, 10])
    parts = list(split_feed_messages(body))
    assert [message for part in parts for message in part["messages"]] == body["messages"]
    assert len(parts) > 1
    for part in parts:
        assert payload_size([sign_message(KEY, part)]) <= MAX_PAYLOAD
    too_large = feed_body([100, 70_000, 100])
    assert [message for part in split_feed_messages(too_large) for message in part["messages"]] == (
        too_large["messages"][:1]
    )


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"1", b'{"messages":{}}', b'{"messages":[],"x":1}', b"\xff", b'{"messages":[1]}', b"[" * 9000]
)
def test_garbage(data: bytes) -> None:
    with pytest.raises((InvalidInput, InvalidJson)):
        parse_payload(data)


def test_all_or_none() -> None:
    good = json.loads(sign_message(KEY, dict(FILE)).text)
    assert len(parse_messages({"messages": [good, good]})) == 2
    with pytest.raises(InvalidInput, match=r"messages\[1\]"):
        parse_messages({"messages": [good, {**good, "x": 1}]})
