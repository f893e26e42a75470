"""The strict decoder: JSONTestSuite, and the cases in which the standard library is too lenient."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kachery_lab.core import canonical_json, strict_json
from kachery_lab.errors import InvalidInput, InvalidJson, KacheryLabError, TooLarge
from tests.third_party import shared_vectors

DUPLICATE_KEYS = {"y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"}


def accepts(data: bytes) -> bool:
    try:
        strict_json.loads(data)
    except InvalidJson:
        return False
    return True


def test_json_test_suite():
    files = sorted(shared_vectors("json").glob("*.json"))
    outcome = {file.name: accepts(file.read_bytes()) for file in files}
    assert len(files) == 318
    assert {name for name in outcome if name.startswith("y_") and not outcome[name]} == DUPLICATE_KEYS
    assert [name for name in outcome if name.startswith("n_") and outcome[name]] == []
    assert {name for name in outcome if name.startswith("i_") and outcome[name]} == {
        "i_number_double_huge_neg_exp.json",
        "i_number_real_underflow.json",
        "i_number_too_big_neg_int.json",
        "i_number_too_big_pos_int.json",
        "i_number_very_big_negative_int.json",
    }


def test_json_test_suite_in_the_2021_dialect():
    for file in sorted(shared_vectors("json").glob("*.json")):
        try:
            value = canonical_json.loads_2021(file.read_bytes())
        except InvalidJson:
            assert not file.name.startswith("y_"), file.name
        else:
            assert not file.name.startswith("n_"), file.name
            text = canonical_json.canonical_2021(value)
            assert canonical_json.canonical_2021(canonical_json.loads_2021(text)) == text


@pytest.mark.parametrize(
    "data",
    [
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b"-1E+999",
        b"1" * 250 + b"e99",
        b"1" * 310,
        b"-" + b"1" * 5000,
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":2}',
        b'"\\ud800"',
        b'{"\\udc00":1}',
        b'["\\uDE00\\uD83D"]',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        '{"a":1}'.encode("utf-16-le"),
        b'"\xc0\xaf"',
        b'"\xed\xa0\x80"',
        b'"\xff"',
        b'"\x00"',
        b"\x00",
        b"",
        b" ",
        b"[1,]",
        b"{'a':1}",
        b"[" * 65 + b"]" * 65,
        b'{"a":' * 65 + b"1" + b"}" * 65,
        b"[" * 100_000,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_refuses(data):
    with pytest.raises(InvalidJson):
        strict_json.loads(data)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"-0", 0),
        (b"1.0", 1.0),
        (b"1e308", 1e308),
        (b"1e-999", 0.0),
        (b"9007199254740993", 9007199254740993),
        (b"1" * 309, int("1" * 309)),
        (b'"' + b"1" * 5000 + b'e999"', "1" * 5000 + "e999"),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"\\\\ud800"', "\\ud800"),
        (b'"\\u0000"', "\x00"),
        (b'{"__proto__":null}', {"__proto__": None}),
        (b" null\r\n\t ", None),
        (b'"' + b"[" * 1000 + b'"', "[" * 1000),
        (b'["\\"[[[", "\\\\"]'.replace(b"[[[", b"[" * 100), ['"' + "[" * 100, "\\"]),
    ],
    ids=lambda data: repr(data)[:24],
)
def test_accepts(data, value):
    assert strict_json.loads(data) == value


def test_depth_is_counted_exactly():
    assert strict_json.loads(b"[" * 64 + b"]" * 64)
    wide = b"[" + b",".join([b'{"a":[1,2]}'] * 1000) + b"]"
    assert len(strict_json.loads(wide)) == 1000
    assert strict_json.loads(b"[[1],[[2]]]", max_depth=3)
    with pytest.raises(InvalidJson):
        strict_json.loads(b"[[1],[[2]]]", max_depth=2)


@given(st.recursive(st.text(alphabet='[]{}"\\a', max_size=6), lambda inner: st.lists(inner, max_size=4), max_leaves=20))
def test_depth_ignores_brackets_in_strings(value):
    def depth(item):
        return 1 + max(map(depth, item), default=0) if isinstance(item, list) else 0

    data = json.dumps(value).encode()
    assert not strict_json.exceeds_depth(data, depth(value))
    assert depth(value) == 0 or strict_json.exceeds_depth(data, depth(value) - 1)


@given(st.binary(max_size=60) | st.text(alphabet='[]{}:,"\\u0dDe+-.19tnl ', max_size=40).map(str.encode))
def test_raises_nothing_else(data):
    for load in (strict_json.loads, canonical_json.loads_2021):
        try:
            load(data)
        except KacheryLabError:
            pass


@pytest.mark.parametrize(
    "data",
    [b"[" * 8_000_000, b'["' + b'\\"[' * 2_000_000, b"1" * 8_000_000, b"[1." + b"1" * 8_000_000, b'"' * 8_000_000],
)
def test_hostile_text_takes_linear_time(data):
    start = time.perf_counter()
    assert not accepts(data)
    assert time.perf_counter() - start < 5


def test_the_standard_library_is_too_lenient():
    """Positive control: without the decoder these would all come through, or break something else."""
    assert json.loads(b'{"a":1,"a":2}') == {"a": 2}
    assert json.loads(b'"\\ud800"') == "\ud800"
    assert json.loads(b"1e999") == float("inf")
    assert json.loads(b"[NaN]") != []
    assert json.loads('{"a":1}'.encode("utf-16")) == {"a": 1}
    with pytest.raises(RecursionError):
        json.loads(b"[" * 100_000)
    with pytest.raises(ValueError, match="digits"):
        json.loads(b"1" * 5000)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (2**53 + 1, "$:"),
        ([0, -(2**53) - 1], "$[1]:"),
        ({"a": [{"b": float("nan")}]}, "$.a[0].b:"),
        ({"a": float("inf")}, "$.a:"),
        ({"a b": "\ud800"}, "$['a b']:"),
        ({"a": {"\udc00": 1}}, "$.a:"),
        ({"a": {"__proto__": 1}}, "$.a:"),
        ({"a": b"x"}, "$.a:"),
        ({1: 2}, "$:"),
    ],
)
def test_check_signable_names_the_path(value, path):
    with pytest.raises(InvalidInput) as caught:
        strict_json.check_signable(value)
    assert caught.value.message.startswith(path)


def test_check_signable_lets_the_rest_through():
    strict_json.check_signable({"a": [2**53, -(2**53), -0.0, 1.0, None, True, "\U0001f600é", 1e300]})
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidInput):
        strict_json.check_signable(deep)


def test_values_are_limited_but_text_is_not() -> None:
    """A long decode would keep every other request waiting; commas inside one string cost nothing."""
    for data in (b"[" + b"0," * 6_000_000 + b"0]", b"{" + b'"k":0,' * 2_000_000 + b'"z":0}'):
        with pytest.raises(TooLarge):
            strict_json.loads(data)
    text = "a,b:c\\n" * 1_000_000
    assert strict_json.loads(b'["' + text.encode() + b'"]') == [text.replace("\\n", "\n")]
    numbers = strict_json.loads(b"[" + b"0," * 1_000_000 + b"0]")
    assert isinstance(numbers, list) and len(numbers) == 1_000_001
