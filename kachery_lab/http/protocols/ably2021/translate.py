"""Between the provider's protocol messages and our types: JSON in text frames, msgpack in binary ones."""

from __future__ import annotations

import base64
import binascii
import json
from enum import IntEnum
from typing import Any, Literal

import msgpack  # type: ignore[import-untyped]

from kachery_lab.core import strict_json
from kachery_lab.core.band_messages import MAX_PAYLOAD
from kachery_lab.errors import InvalidInput, TooLarge

Format = Literal["json", "msgpack"]
Frame = str | bytes

MAX_FRAME = 4 * MAX_PAYLOAD // 3 + 16_384
"""Bytes of a frame: a payload in base64, and what is around it."""
MAX_MESSAGES = 100
"""Payloads in one protocol message; the library sends one for each publication."""
_MAX_MEMBERS = 64
_MAX_DEPTH = 16


class Action(IntEnum):
    """What a protocol message is."""

    HEARTBEAT = 0
    ACK = 1
    NACK = 2
    CONNECTED = 4
    DISCONNECT = 5
    DISCONNECTED = 6
    CLOSE = 7
    CLOSED = 8
    ERROR = 9
    ATTACH = 10
    ATTACHED = 11
    DETACH = 12
    DETACHED = 13
    PRESENCE = 14
    MESSAGE = 15
    SYNC = 16
    AUTH = 17


MODE_PRESENCE, MODE_PUBLISH, MODE_SUBSCRIBE, MODE_PRESENCE_SUBSCRIBE = 1 << 16, 1 << 17, 1 << 18, 1 << 19
MODES = MODE_PRESENCE | MODE_PUBLISH | MODE_SUBSCRIBE | MODE_PRESENCE_SUBSCRIBE
"""Flags of ATTACH and ATTACHED: what is asked for, and what is given. None asked: all that is allowed."""


def decode(frame: Frame) -> dict[str, Any]:
    """A protocol message. Raises InvalidInput, TooLarge."""
    data = frame.encode() if isinstance(frame, str) else frame
    if len(data) > MAX_FRAME:
        raise TooLarge(f"a protocol message may have {MAX_FRAME} bytes, this one has {len(data)}")
    found: object = strict_json.loads(data, max_depth=_MAX_DEPTH) if isinstance(frame, str) else _unpack(data)
    if not isinstance(found, dict):
        raise InvalidInput("expected a protocol message, an object with the member action")
    return found


def _unpack(data: bytes) -> object:
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_FRAME,
            max_bin_len=MAX_FRAME,
            max_array_len=MAX_MESSAGES,
            max_map_len=_MAX_MEMBERS,
            max_ext_len=0,
        )
    except ValueError as error:
        raise InvalidInput(f"not msgpack: {type(error).__name__}") from None


def encode(fields: dict[str, Any], wire: Format) -> Frame:
    """A protocol message for the wire. In JSON, bytes in `data` of its messages become base64."""
    if wire == "msgpack":
        return bytes(msgpack.packb(fields))
    if "messages" in fields:
        fields = {**fields, "messages": [_base64(message) for message in fields["messages"]]}
    return json.dumps(fields, separators=(",", ":"))


def _base64(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "data": base64.b64encode(message["data"]).decode("ascii"), "encoding": "base64"}


def action_of(fields: dict[str, Any]) -> Action:
    """What a protocol message is. Raises InvalidInput."""
    value = fields.get("action")
    try:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError
        return Action(value)
    except ValueError:
        raise InvalidInput(f"action: expected one of {', '.join(map(str, map(int, Action)))}") from None


def payloads(fields: dict[str, Any]) -> list[bytes]:
    """The payloads of a MESSAGE, in order. Raises InvalidInput, TooLarge (all of them together have a limit)."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise InvalidInput(f"messages: expected a list of 1 to {MAX_MESSAGES} messages")
    found = [_payload(message, f"messages[{index}]") for index, message in enumerate(messages)]
    size = sum(map(len, found))
    if size > MAX_PAYLOAD:
        raise TooLarge(f"a publication may have {MAX_PAYLOAD} bytes, this one has {size}")
    return found


def _payload(message: object, where: str) -> bytes:
    data = message.get("data") if isinstance(message, dict) else None
    encoding = message.get("encoding") if isinstance(message, dict) else None
    if isinstance(data, bytes) and encoding is None:
        return data
    if isinstance(data, str) and encoding == "base64":
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            pass
    raise InvalidInput(f"{where}.data: expected bytes, or base64 text with encoding base64")
