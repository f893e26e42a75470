"""Identifiers against the recorded validators; where this server is stricter, the difference is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_lab.core import ids
from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.errors import InvalidInput

VECTORS = Path(__file__).parents[1] / "vectors"
RECORDED = json.loads((VECTORS / "identifiers.json").read_text("utf-8"))["cases"]
FILE_KEYS = json.loads((VECTORS / "file_keys.json").read_text("utf-8"))

TYPES = {
    "channelName": ids.ChannelName,
    "nodeLabel": ids.NodeLabel,
    "taskFunctionId": ids.TaskFunctionId,
    "nodeId": ids.NodeId,
    "feedName": ids.FeedName,
    "sha1Hash": ids.Sha1,
}


def valid(parse, value, **options):
    try:
        parsed = parse(value, "field", **options)
    except InvalidInput as error:
        assert error.message.startswith("field: ")
        return False
    assert parsed == value
    return True


@pytest.mark.parametrize("name", TYPES)
def test_recorded(name):
    differences = []
    for case in RECORDED[name]:
        if valid(TYPES[name].parse, case["value"]) != case["valid"]:
            differences.append(case["value"])
    # Two-letter and long channels exist for newer clients; upper-case hex is refused.
    assert differences == {
        "channelName": ["ab", "a" * 41],
        "nodeId": [case["value"] for case in RECORDED["nodeId"] if case["value"].startswith("03A1")],
        "sha1Hash": ["943A702D06F34599AEE1F8DA8EF9F7296031D699"],
    }.get(name, [])


def test_channels_that_nodes_of_2021_can_join():
    accepted = [
        case["value"] for case in RECORDED["channelName"] if valid(ids.ChannelName.parse, case["value"], legacy=True)
    ]
    assert accepted == ["abc", "a" * 27, "a.b", "a-b", "a_b", "-ab"]
    assert not valid(ids.ChannelName.parse, "a" * 28, legacy=True)


@pytest.mark.parametrize("value", ["api", "upload", "~x", "a" * 101, "abc\n", "a", "a.b.", None, 5, ["abc"]])
def test_channel_names_refused(value):
    assert not valid(ids.ChannelName.parse, value)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (ids.Sha1, ["0" * 40], ["0" * 39, "0" * 41, "0" * 40 + "\n", "A" * 40, "\u0660" * 40, b"0" * 40, None, 0]),
        (ids.SubfeedHash, ["f" * 40], ["short", "F" * 40]),
        (ids.Sha256, ["a" * 64], ["a" * 40, "A" * 64]),
        (ids.FeedId, ["a" * 64], ["a" * 63]),
        (ids.UserName, ["me@example.org", "!", "x" * 80], ["", "a b", "a/b", "a:b", "é", "x" * 81, "a\n", "a\x7f"]),
        (ids.FeedName, ["x", "é" * 100, "a\nb"], ["", "x" * 101, "\ud800", None]),
        (ids.RequestId, ["x", "a b", "~" * 64], ["", "x" * 65, "é", "a\n"]),
        (ids.NodeLabel, ["a-b.c"], ["a-.b", "a\n"]),
        (ids.TaskFunctionId, ["ns.sub-name_2@x.3"], ["f\n", "a" * 401]),
    ],
)
def test_forms(kind, good, bad):
    assert [value for value in good if not valid(kind.parse, value)] == []
    assert [value for value in bad if valid(kind.parse, value)] == []


def test_upper_case_is_refused_in_plain_words():
    with pytest.raises(InvalidInput, match="sha1: upper-case"):
        ids.Sha1.parse("A" * 40)


@given(st.text(alphabet=st.characters(), max_size=20) | st.none() | st.integers() | st.lists(st.text()))
def test_parse_raises_only_invalid_input(value):
    for kind in [*TYPES.values(), ids.UserName, ids.RequestId, ids.FileKey, ids.ChunkOf]:
        try:
            kind.parse(value)
        except InvalidInput as error:
            assert error.message.isascii()


@pytest.mark.parametrize("case", FILE_KEYS["hashes"], ids=lambda case: case["json"][:60])
def test_file_key_hashes(case):
    if '"943A' in case["json"]:
        with pytest.raises(InvalidInput):
            ids.FileKey.parse(json.loads(case["json"]))
        return
    key = ids.FileKey.parse(json.loads(case["json"]))
    assert key.hash() == case["fileKeyHash"]
    assert canonical_2021(key.to_json()) == case["canonical"]
    assert ids.FileKey.parse(key.to_json()) == key


def test_file_key_validity():
    differences = []
    for case in FILE_KEYS["validity"]:
        try:
            ids.FileKey.parse(json.loads(case["json"]))
            accepted = True
        except InvalidInput:
            accepted = False
        if accepted != case["valid"]:
            differences.append(case["json"])
    # Stricter than the recorded validators: upper case, start after end, half a byte.
    assert len(differences) == 3
    assert "943A" in differences[0]
    assert '"startByte":10,"endByte":3' in differences[1]
    assert '"startByte":0.5' in differences[2]


def test_whole_numbers():
    assert ids.parse_whole_number(1.0, "n") == 1
    assert isinstance(ids.parse_whole_number(1.0, "n"), int)
    for value in (True, -1, 0.5, 2**53 + 1, float("inf"), float("nan"), "1", None, 10**5000):
        with pytest.raises(InvalidInput):
            ids.parse_whole_number(value, "n")
