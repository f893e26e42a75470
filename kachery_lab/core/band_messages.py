"""Messages on bands: closed shapes, envelopes and signatures (spec/pubsub-bands.md sections 2 and 3).

A payload is UTF-8 JSON, `{"messages": [<message>, ...]}` or one message; a message is `{body, fromNodeId, signature}`,
signed by the node's key in the 2021 dialect. What `parse_message` returns has a known type and its exact fields; who
may send it, and where, is not looked at here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kachery_lab.core.canonical_json import canonical_2021, loads_2021
from kachery_lab.core.feeds import parse_signed_message
from kachery_lab.core.ids import (
    ChannelName,
    FeedId,
    FileKey,
    NodeId,
    Sha256,
    SubfeedHash,
    TaskFunctionId,
    parse_fields,
    parse_whole_number,
)
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.signatures import parse_signature, sign_2021, verify_2021
from kachery_lab.core.strict_json import check_signable, shorten
from kachery_lab.core.tasks import MAX_ERROR, parse_backend_id, parse_kind, parse_status, parse_task_id
from kachery_lab.errors import InvalidInput, TooLarge

MAX_PAYLOAD = 65_536
"""Bytes of one payload; the older nodes' provider refuses more."""

Body = dict[str, Any]
Check = Callable[[Any, str], object]

_PREFIX, _SUFFIX = '{"messages":[', "]}"
# The 2021 dialect spreads this key to every object, so what is signed would not be what is read. The quotes of a key
# inside a string are escaped.
_PROTO_KEY = '"__proto__":'


def _upload_status(value: object, where: str) -> object:
    if value not in ("started", "finished"):
        raise InvalidInput(f"{where}: expected one of finished, started, got {shorten(value)}")
    return value


def _error_message(value: object, where: str) -> object:
    if not isinstance(value, str) or len(value) > MAX_ERROR:
        raise InvalidInput(f"{where}: expected 0 to {MAX_ERROR} characters, got {shorten(value)}")
    return value


def _list_of(check: Check) -> Check:
    def check_all(value: object, where: str) -> object:
        if not isinstance(value, list):
            raise InvalidInput(f"{where}: expected a list, got {shorten(value)}")
        value[:] = [check(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return value

    return check_all


def _unchanged(check: Check) -> Check:
    """For values whose parsed form is another type than their JSON."""

    def checked(value: object, where: str) -> object:
        check(value, where)
        return value

    return checked


def _kwargs(value: object, where: str) -> object:
    # The older nodes take a list for an object here.
    if not isinstance(value, dict | list):
        raise InvalidInput(f"{where}: expected an object, got {shorten(value)}")
    return value


def _registered(value: object, where: str) -> object:
    fields = parse_fields(value, where, frozenset({"channelName", "taskFunctionId", "taskFunctionType"}), frozenset())
    ChannelName.parse(fields["channelName"], f"{where}.channelName")
    TaskFunctionId.parse(fields["taskFunctionId"], f"{where}.taskFunctionId")
    parse_kind(fields["taskFunctionType"], f"{where}.taskFunctionType")
    return value


_SUBFEED: Mapping[str, Check] = {"feedId": FeedId.parse, "subfeedHash": SubfeedHash.parse}


@dataclass(frozen=True, slots=True)
class Shape:
    """A message type: the band that it belongs to, and a check for each of its fields."""

    band: str
    required: Mapping[str, Check]
    optional: Mapping[str, Check]

    def check(self, body: Body, where: str) -> None:
        """Raises InvalidInput unless the body has exactly these fields. Whole numbers become ints in place."""
        required = frozenset(self.required) | {"type"}
        parse_fields(body, where, required, frozenset(self.optional))
        for name, value in body.items():
            if name != "type":
                body[name] = (self.required.get(name) or self.optional[name])(value, f"{where}.{name}")


SHAPES: dict[str, Shape] = {
    "requestFile": Shape("requestFiles", {"fileKey": _unchanged(FileKey.parse)}, {}),
    "uploadFileStatus": Shape(
        "provideFiles",
        {"fileKey": _unchanged(FileKey.parse), "status": _upload_status},
        {},
    ),
    "subscribeToSubfeed": Shape("requestFeeds", {**_SUBFEED, "position": parse_whole_number}, {}),
    "newSubfeedMessages": Shape(
        "provideFeeds", {**_SUBFEED, "messages": _list_of(_unchanged(parse_signed_message))}, {}
    ),
    "numSubfeedMessagesUploaded": Shape("provideFeeds", {**_SUBFEED, "numMessages": parse_whole_number}, {}),
    # Only our nodes know this one: `core.feeds.Checkpoint` as it is.
    "subfeedCheckpoint": Shape(
        "provideFeeds",
        {**_SUBFEED, "count": parse_whole_number, "head": Sha256.parse, "signature": parse_signature},
        {},
    ),
    "requestTask": Shape(
        "requestTasks",
        {
            "taskId": parse_task_id,
            "taskFunctionId": TaskFunctionId.parse,
            "taskFunctionType": parse_kind,
            "taskKwargs": _kwargs,
        },
        {"backendId": parse_backend_id},
    ),
    "updateTaskStatus": Shape(
        "provideTasks",
        {"taskId": parse_task_id, "status": parse_status},
        {"errorMessage": _error_message},
    ),
    "probeTaskFunctions": Shape(
        "requestTasks", {"taskFunctionIds": _list_of(TaskFunctionId.parse)}, {"backendId": parse_backend_id}
    ),
    "reportRegisteredTaskFunctions": Shape("provideTasks", {"registeredTaskFunctions": _list_of(_registered)}, {}),
}
"""Every message type. A type that only our nodes know is added here; older nodes drop it."""


def check_body(value: object, where: str = "body") -> Body:
    """A body with a known type and its exact fields. Raises InvalidInput that names the field."""
    if not isinstance(value, dict):
        raise InvalidInput(f"{where}: expected an object, got {shorten(value)}")
    kind = value.get("type")
    shape = SHAPES.get(kind) if isinstance(kind, str) else None
    if shape is None:
        raise InvalidInput(f"{where}.type: expected one of {', '.join(SHAPES)}, got {shorten(kind)}")
    shape.check(value, where)
    return value


def band_of(kind: str) -> str:
    """The band that a message type belongs to. Raises InvalidInput for an unknown type."""
    shape = SHAPES.get(kind)
    if shape is None:
        raise InvalidInput(f"type: expected one of {', '.join(SHAPES)}, got {shorten(kind)}")
    return shape.band


@dataclass(frozen=True, slots=True)
class SignedBody:
    """A message of a right shape. `canonical` is the body's canonical text, which `signature` should cover."""

    body: Body
    from_node_id: NodeId
    signature: str
    canonical: str

    @property
    def kind(self) -> str:
        """Its type."""
        return str(self.body["type"])

    @property
    def text(self) -> str:
        """The message as JSON, as it goes over every wire."""
        return f'{{"body":{self.canonical},"fromNodeId":"{self.from_node_id}","signature":"{self.signature}"}}'

    def verify(self) -> bool:
        """Whether the node that it names signed it."""
        return verify_2021(self.from_node_id, self.canonical, self.signature)


def _canonical(body: Body) -> str:
    text = canonical_2021(body)
    if _PROTO_KEY in text:
        raise InvalidInput("body: the key __proto__ cannot be signed")
    return text


def sign_message(key: PrivateKey, body: Body) -> SignedBody:
    """Sign a body with the node's key. Raises InvalidInput for another shape than its type's, and for what cannot be
    signed exactly (integers beyond 2^53, NaN); TooLarge when it would not fit into a payload."""
    check_signable(body, "body")
    canonical = _canonical(check_body(body))
    message = SignedBody(body, NodeId(key.public_hex), sign_2021(key, canonical), canonical)
    size = payload_size([message])
    if size > MAX_PAYLOAD:
        raise TooLarge(
            f"a message on a band may have {MAX_PAYLOAD} bytes, this {message.kind} has {size}",
            hint="Send it in parts, or put the content into the channel's bucket",
        )
    return message


def parse_message(value: object, where: str = "message") -> SignedBody:
    """A message from elsewhere. Its shape is checked, its signature is not. Raises InvalidInput."""
    fields = parse_fields(value, where, frozenset({"body", "fromNodeId", "signature"}), frozenset())
    body = check_body(fields["body"], f"{where}.body")
    sender = NodeId.parse(fields["fromNodeId"], f"{where}.fromNodeId")
    signature = parse_signature(fields["signature"], f"{where}.signature")
    return SignedBody(body, sender, signature, _canonical(body))


def parse_messages(value: object, where: str = "payload") -> list[SignedBody]:
    """The messages of a decoded payload: a wrapper, or one bare message. Raises InvalidInput; all or none."""
    if isinstance(value, dict) and "messages" in value:
        items = parse_fields(value, where, frozenset({"messages"}), frozenset())["messages"]
        if not isinstance(items, list):
            raise InvalidInput(f"{where}.messages: expected a list, got {shorten(items)}")
        return [parse_message(item, f"{where}.messages[{index}]") for index, item in enumerate(items)]
    return [parse_message(value, where)]


def parse_payload(data: bytes) -> list[SignedBody]:
    """The messages of a payload; signatures are not looked at. Raises TooLarge, InvalidJson, InvalidInput."""
    if len(data) > MAX_PAYLOAD:
        raise TooLarge(f"a payload on a band may have {MAX_PAYLOAD} bytes, this one has {len(data)}")
    return parse_messages(loads_2021(data))


def payload_size(messages: Iterable[SignedBody]) -> int:
    """Bytes of the payload that `encode_payload` makes."""
    sizes = [len(message.text.encode()) for message in messages]
    return len(_PREFIX) + len(_SUFFIX) + sum(sizes) + max(len(sizes) - 1, 0)


def encode_payload(messages: Iterable[SignedBody]) -> bytes:
    """One payload with these messages."""
    return f"{_PREFIX}{','.join(message.text for message in messages)}{_SUFFIX}".encode()


def split_messages(messages: Iterable[SignedBody], limit: int = MAX_PAYLOAD) -> Iterator[list[SignedBody]]:
    """The same messages in order, in groups whose payloads have at most `limit` bytes; a message that does not fit
    alone is a group of its own."""
    group: list[SignedBody] = []
    size = len(_PREFIX) + len(_SUFFIX)
    for message in messages:
        length = len(message.text.encode()) + 1
        if group and size + length - 1 > limit:
            yield group
            group, size = [], len(_PREFIX) + len(_SUFFIX)
        group.append(message)
        size += length
    if group:
        yield group


def split_feed_messages(body: Body, limit: int = MAX_PAYLOAD) -> Iterator[Body]:
    """A `newSubfeedMessages` body in parts that fit into payloads of `limit` bytes, in order. A feed message that does
    not fit alone, and what follows it, is left out: subscribers fetch those from the bucket."""
    room = limit - len(_PREFIX) - len(_SUFFIX) - 320 - len(json.dumps({**body, "messages": []}))
    part: list[Any] = []
    size = 0
    for message in body["messages"]:
        length = len(canonical_2021(message).encode()) + 1
        if length > room:
            break
        if part and size + length > room:
            yield {**body, "messages": part}
            part, size = [], 0
        part.append(message)
        size += length
    if part:
        yield {**body, "messages": part}
