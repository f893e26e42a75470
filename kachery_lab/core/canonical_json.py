"""Canonical JSON, one function for each named dialect.

* `canonical_2021`: what the nodes of 2021 sign and hash (spec/signing.md section 1, recorded in
  tests/vectors/canonical_json.json).
* `jcs`: RFC 8785, for what only this project signs.
* `python_form`: what the Python client of 2021 signs and hashes by itself (spec/signing.md section 2).

For every value that RFC 8785 admits the first two agree, except that 2021 spreads the key `__proto__`.
"""

from __future__ import annotations

import json
from typing import cast

from kachery_lab.core.strict_json import (
    MAX_SAFE_INTEGER,
    SURROGATE,
    TO_SHAPE,
    Json,
    check_signable,
    decode_utf8,
    exceeds_depth,
    refuse_constant,
)
from kachery_lab.errors import InvalidInput, InvalidJson

MAX_DEPTH_2021 = 256

_WHOLE_FLOAT = (b".0,", b".0]", b".0}")
# 2^53 has 16 digits: an integer with a shorter run of digits is exact as a double.
_LONG_RUN = b"0" * 16
# What every object inherits when some object of the value has a key `__proto__`.
_INHERITED_PROTO = '{"__proto__":null}'

_sorted_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")).encode
_string_text = json.JSONEncoder(ensure_ascii=False).encode
_python_text = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def canonical_2021(value: object) -> str:
    """The canonical text of a JSON value as the nodes of 2021 write it; always encodable as UTF-8.

    Integers beyond 2^53 are rounded to doubles, infinities and NaN become `null`, lone surrogates are escaped, and a
    key `__proto__` anywhere adds one to every object. Raises InvalidInput for what is not a JSON value (dict, list,
    str, int, float, bool, None) or is nested too deeply for the stack. That keys are str is the caller's promise.
    """
    text = _plain_text(value)
    return exact_2021(value) if text is None else text


def exact_2021(value: object) -> str:
    """`canonical_2021` without its shortcut for common values; the same text, slower."""
    try:
        return _write(value, _has_proto_key(value))
    except RecursionError:
        raise InvalidInput("the value is nested too deeply") from None


def jcs(value: object) -> bytes:
    """The RFC 8785 bytes of a JSON value.

    Raises InvalidInput for NaN, infinities, lone surrogates and integers beyond 2^53, which have no exact form. A key
    `__proto__` is a key like any other.
    """
    try:
        check_signable(value, allow_proto_key=True)
        return _write(value, spread_proto=False).encode("utf-8")
    except RecursionError:
        raise InvalidInput("the value is nested too deeply") from None


def python_form(value: object) -> str:
    """Compact JSON with sorted keys as the Python client of 2021 writes it: `\\uXXXX` for non-ASCII text, floats as
    Python prints them.

    Raises InvalidInput for what is not a JSON value or is nested too deeply.
    """
    try:
        return _python_text(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"no JSON text for this value ({type(error).__name__})") from None


def loads_2021(data: bytes | str) -> Json:
    """Decode JSON as the nodes of 2021 do, for values that come signed from elsewhere.

    Lenient: of duplicate keys the last wins, numbers that overflow are infinite, integers beyond 2^53 become the
    nearest double, lone surrogates may be escaped. Raises InvalidJson for everything that is not JSON, for anything
    but UTF-8, and for nesting over 256.
    """
    text = decode_utf8(data) if isinstance(data, bytes) else data
    try:
        encoded = data if isinstance(data, bytes) else data.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidJson("the text has half of a surrogate pair") from None
    if exceeds_depth(encoded, MAX_DEPTH_2021):
        raise InvalidJson(f"JSON is nested deeper than {MAX_DEPTH_2021}")
    decoder = _ROUNDING if _LONG_RUN in encoded.translate(TO_SHAPE) else _LENIENT
    try:
        return cast(Json, decoder.decode(text))
    except json.JSONDecodeError as error:
        raise InvalidJson(f"not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise InvalidJson("JSON is nested too deeply") from None


def _double(text: str) -> int | float:
    if len(text) < len(_LONG_RUN):
        return int(text)
    value = float(text)
    return int(value) if abs(value) <= MAX_SAFE_INTEGER else value


_LENIENT = json.JSONDecoder(parse_constant=refuse_constant)
_ROUNDING = json.JSONDecoder(parse_constant=refuse_constant, parse_int=_double)


def _plain_text(value: object) -> str | None:
    """The text by the standard encoder, if a scan of it shows that it is canonical; None means "perhaps not"."""
    try:
        text = _sorted_text(value)
    except (TypeError, ValueError, RecursionError):
        return None
    if text.isascii():
        encoded = text.encode("ascii")
    else:
        try:
            if len(text.encode("utf-16-le")) != 2 * len(text):
                return None  # above U+FFFF the order of code points is not the order of UTF-16 units
        except UnicodeEncodeError:
            return None
        encoded = text.encode("utf-8")
    if b".0" in encoded and (encoded.endswith(b".0") or any(tail in encoded for tail in _WHOLE_FLOAT)):
        return None
    shape = encoded.translate(TO_SHAPE)
    if _LONG_RUN in shape or b"0e-0" in shape or b"0e+0" in shape or b'"__proto__"' in encoded:
        return None
    return text


def _write(value: object, spread_proto: bool) -> str:
    if isinstance(value, str):
        return _write_string(value)
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, int | float):
        return number_text(value)
    if isinstance(value, dict):
        members = [(_utf16(key), key) for key in value]
        if spread_proto and "__proto__" not in value:
            members.append((_utf16("__proto__"), None))
        members.sort()
        texts = []
        for _, key in members:
            if key is None:
                texts.append(f'"__proto__":{_INHERITED_PROTO}')
            else:
                texts.append(f"{_write_string(key)}:{_write(value[key], spread_proto)}")
        return "{" + ",".join(texts) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join([_write(item, spread_proto) for item in value]) + "]"
    raise InvalidInput(f"{type(value).__name__} is not a JSON value")


def _utf16(key: object) -> bytes:
    if not isinstance(key, str):
        raise InvalidInput("a key is not a string")
    return key.encode("utf-16-be", "surrogatepass")


def _write_string(text: str) -> str:
    if not text.isascii() and SURROGATE.search(text):
        # The round trip joins halves that stand next to each other; those that are left are alone.
        text = text.encode("utf-16-be", "surrogatepass").decode("utf-16-be", "surrogatepass")
        return SURROGATE.sub(lambda half: f"\\u{ord(half[0]):04x}", _string_text(text))
    return _string_text(text)


def number_text(value: int | float) -> str:
    """A number as JavaScript prints the nearest double; `null` if that is infinite or NaN."""
    if isinstance(value, int) and -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
        return int.__repr__(value)
    try:
        text = float.__repr__(float(value))
    except OverflowError:
        return "null"
    if text in ("inf", "-inf", "nan"):
        return "null"
    sign, text = ("-", text[1:]) if text.startswith("-") else ("", text)
    mantissa, _, exponent = text.partition("e")
    whole, _, fraction = mantissa.partition(".")
    all_digits = whole + fraction
    digits = all_digits.lstrip("0")
    if not digits:
        return "0"
    # The value is 0.DIGITS times ten to the power of `point`.
    point = len(whole) + int(exponent or 0) - (len(all_digits) - len(digits))
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        return f"{sign}{digits}{'0' * (point - len(digits))}"
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    rest = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{rest}e{point - 1:+d}"


def _has_proto_key(value: object) -> bool:
    if isinstance(value, dict):
        return "__proto__" in value or any(_has_proto_key(item) for item in value.values())
    return isinstance(value, list | tuple) and any(_has_proto_key(item) for item in value)
