"""Signed messages and chains against the recorded ones; heads and checkpoints against our own frozen vectors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_lab.core import feeds
from kachery_lab.core.canonical_json import canonical_2021, loads_2021
from kachery_lab.core.feeds import (
    ChainRefused,
    Checkpoint,
    SubfeedHead,
    accept_chain,
    parse_signed_message,
    sign_messages,
)
from kachery_lab.core.ids import FeedId, SubfeedHash
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.signatures import sign_2021
from kachery_lab.errors import InvalidInput

VECTORS = Path(__file__).parents[1] / "vectors"
CHAIN = json.loads((VECTORS / "feed_chain.json").read_text("utf-8"))
SHAPES = json.loads((VECTORS / "signed_message_shapes.json").read_text("utf-8"))["cases"]
NAMES = json.loads((VECTORS / "subfeed_hashes.json").read_text("utf-8"))
CHECKPOINTS = json.loads((VECTORS / "checkpoints.json").read_text("utf-8"))
FEED = FeedId(CHAIN["feedId"])
KEY = PrivateKey.from_seed(CHAIN["feedPrivateKeyHex"])
SIGNATURES = [message["signature"] for message in CHAIN["messages"]]


def previous(position):
    return SIGNATURES[position - 1] if position else None


def received(messages):
    return [parse_signed_message(message) for message in messages]


def test_recorded_texts():
    accepted = accept_chain(FEED, 0, None, received(CHAIN["messages"]))
    for position, message in enumerate(accepted):
        assert message.position == position
        body = message.canonical_body(previous(position))
        assert body == CHAIN["canonicalBodies"][position]
        assert message.body_sha256 == hashlib.sha256(body.encode()).digest()
        assert message.envelope_text(previous(position)) == CHAIN["asStoredInFeedsDb"][position]
    assert accept_chain(FEED, 0, None, received(map(json.loads, CHAIN["asUploadedToBucket"]))) == accepted


def test_signing_gives_the_recorded_signatures():
    end = SubfeedHead()
    for position, message in enumerate(CHAIN["messages"]):
        body = message["body"]
        [signed], end = sign_messages(KEY, end, [canonical_2021(body["message"])], body["timestamp"])
        assert (signed.position, signed.signature) == (position, SIGNATURES[position])
    assert end.num_messages == 5
    assert end.signature == SIGNATURES[-1]


@pytest.mark.parametrize("case", CHAIN["receiving"], ids=lambda case: case["name"])
def test_recorded_outcomes(case):
    have = case["alreadyHave"]
    reason = case.get("error", "gap" if case["name"].startswith("gap") else None)
    if reason == "internal-error":
        reason = None  # the recorded program fails on a batch that brings nothing new
    messages = received(case["messages"])
    if reason is None:
        assert len(accept_chain(FEED, have, previous(have), messages)) == case["accepted"]
    else:
        with pytest.raises(ChainRefused) as caught:
            accept_chain(FEED, have, previous(have), messages)
        assert caught.value.reason == reason


def test_upper_case_signatures_are_kept_in_lower_case():
    [first, *_] = CHAIN["messages"]
    shouted = first | {"signature": first["signature"].upper()}
    assert accept_chain(FEED, 0, None, received([shouted])) == accept_chain(FEED, 0, None, received([first]))


def test_a_weak_feed_id_is_refused():
    with pytest.raises(InvalidInput):
        accept_chain(FeedId("01" + "00" * 31), 0, None, received(CHAIN["messages"]))


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: json.dumps(case["message"])[-80:])
def test_recorded_shapes(case):
    if case["valid"]:
        parse_signed_message(case["message"])
    else:
        with pytest.raises(InvalidInput):
            parse_signed_message(case["message"])


@pytest.mark.parametrize(
    "change",
    [{"messageNumber": -1}, {"messageNumber": 1.5}, {"messageNumber": True}, {"messageNumber": 2**60}, {"metaData": []},
     {"timestamp": float("inf")}, {"previousSignature": "A" * 128}, {"message": None}, {"message": 1}],
)  # fmt: skip
def test_further_shapes_refused(change):
    [first, *_] = CHAIN["messages"]
    with pytest.raises(InvalidInput):
        parse_signed_message({"body": first["body"] | change, "signature": first["signature"]})


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_shape_check_raises_only_invalid_input(value):
    [first, *_] = CHAIN["messages"]
    for message in (value, {"body": value, "signature": value}, {"body": first["body"], "signature": value}):
        with pytest.raises(InvalidInput):
            parse_signed_message(message)


MESSAGES = st.lists(
    st.dictionaries(
        st.text(max_size=5) | st.just("__proto__"), st.integers() | st.floats() | st.text(max_size=5), max_size=3
    )
)


@given(MESSAGES, st.integers(0, 2**53))
def test_what_is_signed_is_accepted(messages, timestamp):
    signed, end = sign_messages(KEY, SubfeedHead(), [canonical_2021(message) for message in messages], timestamp)
    wire, signature = [], None
    for message in signed:
        text = message.envelope_text(signature)
        assert canonical_2021(loads_2021(text)["body"]) == message.canonical_body(signature)
        wire.append(loads_2021(text))
        signature = message.signature
    accepted = accept_chain(FEED, 0, None, received(wire))
    assert [message.signature for message in accepted] == [message.signature for message in signed]
    assert [message.body_sha256 for message in accepted] == [message.body_sha256 for message in signed]
    assert SubfeedHead().extended(accepted) == end
    half = len(signed) // 2
    assert SubfeedHead().extended(signed[:half]).extended(signed[half:]) == end


def test_meta_data_is_signed_and_kept():
    body = {"message": {}, "messageNumber": 0, "timestamp": 5, "metaData": {"b": 1.0, "a": 2}}
    envelope = {"body": body, "signature": sign_2021(KEY, canonical_2021(body))}
    [message] = accept_chain(FEED, 0, None, received([envelope]))
    assert message.meta_data == '{"a":2,"b":1}'
    assert message.canonical_body(None) == canonical_2021(body)
    without = {"body": {name: body[name] for name in body if name != "metaData"}, "signature": envelope["signature"]}
    with pytest.raises(ChainRefused):
        accept_chain(FEED, 0, None, received([without]))


def test_the_proto_oddity_verifies():
    body = loads_2021('{"message":{"__proto__":{"x":1},"o":{}},"messageNumber":0,"timestamp":5}')
    envelope = {"body": body, "signature": sign_2021(KEY, canonical_2021(body))}
    [message] = accept_chain(FEED, 0, None, received([envelope]))
    assert message.canonical_body(None) == canonical_2021(body)
    assert accept_chain(FEED, 0, None, received([loads_2021(message.envelope_text(None))]))


def test_signing_refuses_what_is_no_message():
    assert sign_messages(KEY, SubfeedHead(), [], 0) == ([], SubfeedHead())
    with pytest.raises(InvalidInput):
        sign_messages(KEY, SubfeedHead(), ["{}", '"text"'], 0)


def test_frozen_checkpoints():
    assert CHECKPOINTS["feedId"] == FEED
    accepted = accept_chain(FEED, 0, None, received(CHAIN["messages"]))
    subfeed = SubfeedHash(CHAIN["subfeedHash"])
    for frozen in CHECKPOINTS["checkpoints"]:
        end = SubfeedHead().extended(accepted[: frozen["checkpoint"]["count"]])
        made = Checkpoint.sign(KEY, subfeed, end)
        assert made.to_json() == frozen["checkpoint"]
        data = feeds.checkpoint_bytes(FEED, subfeed, end.num_messages, end.head)
        assert data.decode("ascii") == frozen["signedText"]
        parsed = Checkpoint.parse(frozen["checkpoint"])
        assert parsed == made
        assert parsed.verify()
    assert [frozen["checkpoint"]["count"] for frozen in CHECKPOINTS["checkpoints"]] == [0, 1, 2, 3, 4, 5]
    assert CHECKPOINTS["checkpoints"][0]["checkpoint"]["head"] == "00" * 32


def test_a_checkpoint_fixes_feed_subfeed_count_and_head():
    checkpoint = Checkpoint.parse(CHECKPOINTS["checkpoints"][3]["checkpoint"])
    other = Checkpoint.parse(CHECKPOINTS["checkpoints"][4]["checkpoint"])
    stranger = FeedId(PrivateKey.generate().public_hex)
    for change in (
        {"feed_id": stranger},
        {"feed_id": FeedId("01" + "00" * 31)},
        {"subfeed_hash": SubfeedHash("0" * 40)},
        {"count": 4},
        {"head": other.head},
        {"signature": other.signature},
    ):
        assert not replace(checkpoint, **change).verify()
    for name in checkpoint.to_json():
        for wrong in (None, "x", -1):
            with pytest.raises(InvalidInput):
                Checkpoint.parse(checkpoint.to_json() | {name: wrong})


@pytest.mark.parametrize("case", NAMES["strings"], ids=lambda case: case["name"])
def test_subfeed_hashes_of_strings(case):
    if case["name"] in ("~short", "~943A702D06F34599AEE1F8DA8EF9F7296031D699"):
        with pytest.raises(InvalidInput):
            feeds.subfeed_hash(case["name"])
    else:
        assert feeds.subfeed_hash(case["name"]) == case["subfeedHash"]


@pytest.mark.parametrize("case", NAMES["objects"], ids=lambda case: case["nameJson"])
def test_subfeed_hashes_of_other_names(case):
    name = json.loads(case["nameJson"])
    assert feeds.subfeed_hash(name) == case["subfeedHash"]
    canonical = hashlib.sha1(canonical_2021(name).encode()).hexdigest()
    assert canonical == case["hashByJavascriptCanonicalForm"]
