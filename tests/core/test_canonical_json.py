"""Canonical JSON against the recorded vectors, RFC 8785's own data, and itself."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_lab.core.canonical_json import canonical_2021, exact_2021, jcs, loads_2021, number_text, python_form
from kachery_lab.errors import InvalidInput, InvalidJson
from tests.third_party import shared_vectors

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = json.loads((VECTORS / "canonical_json.json").read_text("utf-8"))["cases"]

NUMBERS = st.integers() | st.integers(-(10**25), 10**25) | st.floats() | st.floats(allow_nan=False, width=16)
TEXTS = (
    st.text(max_size=8) | st.text(alphabet=st.characters(), max_size=4) | st.sampled_from(["e-5", "1.0,", "__proto__"])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.loads(json.dumps(value)))  # what a JSON parser can return


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded(case):
    value = loads_2021(case["json"])
    assert canonical_2021(value) == exact_2021(value) == case["canonical"]
    assert loads_2021(case["json"].encode()) == value
    encoded = case["canonical"].encode("utf-8")
    assert encoded.hex() == case.get("canonicalUtf8Hex", encoded.hex())
    assert hashlib.sha1(encoded).hexdigest() == case["sha1"]


def test_all_cases_were_read():
    assert len(CASES) == 85


@given(VALUES)
def test_the_shortcut_changes_nothing(value):
    assert canonical_2021(value) == exact_2021(value)


@given(VALUES)
def test_idempotent(value):
    text = canonical_2021(value)
    assert canonical_2021(loads_2021(text)) == text
    assert canonical_2021(loads_2021(text.encode("utf-8"))) == text


@given(VALUES)
def test_agrees_with_rfc_8785_where_that_admits_the_value(value):
    try:
        data = jcs(value)
    except InvalidInput:
        return
    if b'"__proto__"' not in data:
        assert data == canonical_2021(value).encode("utf-8")


@given(st.integers(0, 2**64 - 1))
def test_numbers_read_back_exactly(bits):
    (value,) = struct.unpack("<d", bits.to_bytes(8, "little"))
    text = number_text(value)
    if value != value or value in (float("inf"), float("-inf")):
        assert text == "null"
    else:
        assert float(text) == value
        assert ".0" not in text or text[-2:] != ".0"


@pytest.mark.parametrize("name", ["arrays", "french", "structures", "unicode", "values", "weird"])
def test_rfc_8785_data(name):
    folder = shared_vectors("jcs")
    value = json.loads((folder / "input" / f"{name}.json").read_bytes())
    expected = (folder / "output" / f"{name}.json").read_bytes()
    assert jcs(value) == expected
    assert canonical_2021(value).encode("utf-8") == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53 + 1, "\ud800", {"\udc00": 1}, [b""], {1: 1}])
def test_jcs_refuses(value):
    with pytest.raises(InvalidInput):
        jcs(value)


def test_jcs_takes_proto_for_a_key():
    assert jcs({"o": {}, "__proto__": {"x": 1.0}}) == b'{"__proto__":{"x":1},"o":{}}'
    with pytest.raises(InvalidInput):
        jcs({"__proto__": [2**60]})


def test_dialect_2021_never_raises_anything_else():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for function in (canonical_2021, exact_2021, jcs, python_form):
        with pytest.raises(InvalidInput):
            function(deep)
        with pytest.raises(InvalidInput):
            function({"a": object()})


@pytest.mark.parametrize("text", ["[" * 257 + "]" * 257, "[" * 100_000, "NaN", "\ufeff1", "", '"\ud800"', "[1,]"])
def test_loads_2021_refuses(text):
    with pytest.raises(InvalidJson):
        loads_2021(text)


def test_loads_2021_reads_numbers_as_doubles():
    assert loads_2021(b"[9007199254740993,1e400,-1e400,-0,1.0]") == [2**53, float("inf"), float("-inf"), 0, 1]
    assert loads_2021(b"1" * 400) == float("inf")
    assert loads_2021("[" * 256 + "]" * 256)
    assert canonical_2021(loads_2021("[" * 256 + "]" * 256)) == "[" * 256 + "]" * 256


def test_python_form_differs_where_the_client_does():
    value = json.loads('{"n":1.0,"s":"\\u00e9"}')
    assert python_form(value) == '{"n":1.0,"s":"\\u00e9"}'
    assert canonical_2021(value) == '{"n":1,"s":"é"}'
