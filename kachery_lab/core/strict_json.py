"""The one decoder for JSON that clients send, and the rule for what may be signed.

I-JSON (RFC 7493) with two exceptions: numbers keep their precision (integers beyond 2^53 stay integers), and any
value may be the top level. What older nodes signed is read by `canonical_json.loads_2021` instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import accumulate
from math import isfinite
from typing import TypeAlias, cast

from kachery_lab.errors import InvalidInput, InvalidJson, TooLarge

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

MAX_DEPTH = 64
MAX_WEIGHT = 5_000_000
"""Values in one JSON text: decoding so many takes well under a second."""
KEY_WEIGHT = 10
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*"', re.DOTALL)
MAX_SAFE_INTEGER = 2**53
MAX_INTEGER_DIGITS = 309

SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_TO_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
TO_SHAPE = bytes.maketrans(b"123456789E", b"000000000e")
# A double overflows only with an exponent of three digits, or with more than 200 digits before a shorter one.
_LONG_RUN = b"0" * 200
_PIECE = 65536


def exceeds_depth(data: bytes, max_depth: int) -> bool:
    """Whether JSON text nests arrays and objects deeper than `max_depth`, as far as a parser gets before its first
    error.

    Linear in the length and never recursive; cheap for text with few brackets. For text that is not JSON the answer
    may be wrong about what follows the first error.
    """
    if data.count(b"[") + data.count(b"{") <= max_depth:
        return False
    if b"\\" in data:
        # A run of backslashes is read in pairs from its start, so what is left before a quote is a real escape.
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside_strings = b"".join(data.translate(None, _NOT_STRUCTURE).split(b'"')[::2])
    steps = memoryview(outside_strings.translate(_TO_STEPS)).cast("b")
    depth = 0
    # In pieces, so that hostile text is found out early and other threads get their turn.
    for start in range(0, len(steps), _PIECE):
        depths = list(accumulate(steps[start : start + _PIECE], initial=depth))
        if max(depths) > max_depth:
            return True
        depth = depths[-1]
    return False


def decode_utf8(data: bytes) -> str:
    """UTF-8 bytes as text.

    Raises InvalidJson for a byte order mark, other encodings, overlong forms and encoded surrogates.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise InvalidJson("JSON starts with a byte order mark", hint="send UTF-8 without one")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJson(f"JSON is not UTF-8: {error.reason} at byte {error.start}") from None


def refuse_constant(name: str) -> float:
    """For `parse_constant`: NaN, Infinity and -Infinity are not JSON."""
    raise InvalidJson(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidJson(f"key {shorten(key)} occurs twice in one object")
            seen.add(key)
    return result


def _finite_float(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise InvalidJson(f"number {shorten(text)} is too large for a double")
    return value


def _bounded_int(text: str) -> int:
    digits = len(text) - text.startswith("-")
    if digits > MAX_INTEGER_DIGITS:
        raise InvalidJson(f"an integer has {digits} digits; the most is {MAX_INTEGER_DIGITS}")
    return int(text)


def _decoder(parse_float: Callable[[str], float] | None, parse_int: Callable[[str], int] | None) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=_object, parse_constant=refuse_constant, parse_float=parse_float, parse_int=parse_int
    )


_PLAIN = _decoder(None, None)
_CHECKING = _decoder(_finite_float, _bounded_int)


def shorten(value: object, limit: int = 60) -> str:
    """A printable ASCII form of a client's value for an error message, at most `limit` characters and three dots."""
    text = ascii(value[: limit + 1]) if isinstance(value, str) else ascii(type(value).__name__)
    return text if len(text) <= limit else f"{text[:limit]}..."


def loads(data: bytes, *, max_depth: int = MAX_DEPTH) -> Json:
    """Decode JSON bytes; raises InvalidJson, and nothing else, for what is refused.

    Refused: anything but UTF-8, NaN and infinities, numbers that overflow a double (1e999), integers of more than 309
    digits, duplicate keys, lone surrogates in any spelling, nesting over `max_depth`. Integers beyond 2^53 are kept
    exactly. The time is linear in the length; a cap on the length is the caller's. Raises TooLarge for more than
    MAX_WEIGHT values: the decoder holds the interpreter, and no other request is answered meanwhile.
    """
    _check_weight(data)
    if exceeds_depth(data, max_depth):
        raise InvalidJson(f"JSON is nested deeper than {max_depth}")
    text = decode_utf8(data)
    shape = data.translate(TO_SHAPE)
    suspicious = _LONG_RUN in shape or b"0e000" in shape or b"0e+000" in shape
    try:
        value = (_CHECKING if suspicious else _PLAIN).decode(text)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise InvalidJson("JSON is nested too deeply") from None
    if _ESCAPED_SURROGATE.search(data):
        _refuse_lone_surrogates(value)
    return cast(Json, value)


def _check_weight(data: bytes) -> None:
    """A value weighs 1, a member of an object KEY_WEIGHT more. Separators inside strings do not count, but they are
    looked at only when all of them together would be too many."""
    if _weight(data) > MAX_WEIGHT and _weight(_STRING.sub(b"", data)) > MAX_WEIGHT:
        raise TooLarge(f"the JSON has more than {MAX_WEIGHT} values", hint="Store large arrays as files")


def _weight(data: bytes) -> int:
    return data.count(b",") + KEY_WEIGHT * data.count(b":")


def _refuse_lone_surrogates(value: object) -> None:
    try:
        # The decoder has joined every pair, so a surrogate that is left is alone, and UTF-8 has no form for it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidJson("a string has half of a surrogate pair") from None


def check_signable(value: object, path: str = "$", *, allow_proto_key: bool = False) -> None:
    """Raise InvalidInput, naming the JSON path, for a value whose 2021 signature would not fix it exactly.

    Refused: integers beyond 2^53, NaN and infinities, lone surrogates, keys `__proto__` (which the 2021 dialect
    spreads to every object), and what is not a JSON value. Not refused: `-0` and `1.0`, which are signed as 0 and 1.
    """
    try:
        found = _unsignable(value, allow_proto_key)
    except RecursionError:
        raise InvalidInput(f"{path}: nested too deeply to be signed") from None
    if found is not None:
        steps, reason = found
        raise InvalidInput(f"{path}{''.join(reversed(steps))}: {reason}")


def _unsignable(value: object, allow_proto_key: bool) -> tuple[list[str], str] | None:
    """What cannot be signed, as the steps to it, innermost first, and the reason."""
    if isinstance(value, str):
        if not value.isascii() and SURROGATE.search(value):
            return [], "half of a surrogate pair cannot be signed"
    elif value is None or isinstance(value, bool):
        pass
    elif isinstance(value, int):
        if not -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
            return [], "an integer beyond 2^53 cannot be signed exactly; send it as a string"
    elif isinstance(value, float):
        if not isfinite(value):
            return [], "NaN and infinities cannot be signed"
    elif isinstance(value, dict):
        return _unsignable_member(value, allow_proto_key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            found = _unsignable(item, allow_proto_key)
            if found is not None:
                found[0].append(f"[{index}]")
                return found
    else:
        return [], f"{type(value).__name__} is not a JSON value"
    return None


def _unsignable_member(members: dict[object, object], allow_proto_key: bool) -> tuple[list[str], str] | None:
    for key, item in members.items():
        if not isinstance(key, str):
            return [], "a key is not a string"
        if key == "__proto__" and not allow_proto_key:
            return [], "the key __proto__ cannot be signed"
        if not key.isascii() and SURROGATE.search(key):
            return [], "a key has half of a surrogate pair"
        found = _unsignable(item, allow_proto_key)
        if found is not None:
            found[0].append(f".{key}" if key.isidentifier() and key.isascii() else f"[{shorten(key)}]")
            return found
    return None
