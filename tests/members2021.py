"""Members of a channel's bands that speak the provider's protocol: tokens, signed payloads, and a raw connection."""

from __future__ import annotations

import base64
import json
import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from urllib.parse import quote

import msgpack
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from kachery_lab.core.band_messages import encode_payload, sign_message
from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.signatures import sign_2021
from tests.hubs import Hub, LabNode
from tests.servers import Answer

HEARTBEAT, ACK, NACK, CONNECTED, DISCONNECT, DISCONNECTED, CLOSE, CLOSED, ERROR = 0, 1, 2, 4, 5, 6, 7, 8, 9
ATTACH, ATTACHED, DETACH, DETACHED, PRESENCE, MESSAGE, SYNC, AUTH = 10, 11, 12, 13, 14, 15, 16, 17
PUBLISH_MODE, SUBSCRIBE_MODE = 1 << 17, 1 << 18
FORMATS = ("json", "msgpack")


def ask_token(
    hub: Hub, certificate: dict[str, Any], key: str, resource_id: str, capability: Any = None, **changes: Any
) -> Answer:
    """getAblyTokenRequest as the daemon sends it; the capability is the certificate's unless another is given."""
    allowed = certificate["payload"]["attributes"]["ablyCapability"]
    payload = {
        "type": "getAblyTokenRequest",
        "expires": int(time.time() * 1000) + 60_000,
        "resourceId": resource_id,
        "capability": allowed if capability is None else capability,
        **changes,
    }
    signer = PrivateKey.from_seed(key)
    auth = {
        "signerId": signer.public_hex,
        "signature": sign_2021(signer, canonical_2021(payload)),
        "delegationCertificate": certificate,
    }
    return hub.post("/api/resource", {"type": "getAblyTokenRequest", "payload": payload, "auth": auth})


def token_details(hub: Hub, node: LabNode, channel: str, capability: Any = None) -> dict[str, Any]:
    """What the provider's library is given: certificate first, then the token."""
    certificate, key = hub.certificate(node, channel)
    answer = ask_token(hub, certificate, key, hub.node.data.channel(channel).resource_id, capability)
    assert answer.status == 200, answer.body
    assert answer.json()["type"] == "getAblyTokenRequest"
    found: dict[str, Any] = answer.json()["ablyTokenRequest"]
    return found


def payload(node: LabNode, body: dict[str, Any]) -> bytes:
    """A signed message in a payload."""
    return encode_payload([sign_message(node.key, body)])


def request_file(node: LabNode, sha1: str) -> bytes:
    """The payload that asks for a file."""
    return payload(node, {"type": "requestFile", "fileKey": {"sha1": sha1}})


class Closed(Exception):
    """The server closed the connection."""


class Wire:
    """A connection of the provider's protocol, without the provider's library. Use with `with`."""

    def __init__(self, port: int, token: str | None, wire: str = "json", **query: str) -> None:
        given = {"access_token": token, "format": wire, "heartbeats": "false", "v": "2", **query}
        text = "&".join(f"{name}={quote(value, safe='')}" for name, value in given.items() if value is not None)
        self.wire = wire
        opened = connect(
            f"ws://127.0.0.1:{port}/?{text}", compression=None, max_size=None, open_timeout=30, close_timeout=2
        )
        self._stack = ExitStack()
        self.socket: ClientConnection = self._stack.enter_context(opened)
        self._serial = 0

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._stack.close()

    def send_raw(self, frame: str | bytes) -> None:
        self.socket.send(frame)

    def send(self, action: int, **fields: Any) -> None:
        message = {"action": action, **fields}
        self.socket.send(msgpack.packb(message) if self.wire == "msgpack" else json.dumps(message))

    def receive(self, seconds: float = 60.0) -> dict[str, Any]:
        """The next protocol message, heartbeats left out. Raises Closed, TimeoutError."""
        until = time.monotonic() + seconds
        while True:
            try:
                frame = self.socket.recv(timeout=max(0.0, until - time.monotonic()))
            except ConnectionClosed as error:
                raise Closed from error
            assert isinstance(frame, bytes) == (self.wire == "msgpack"), "a frame of the other format"
            found: dict[str, Any] = msgpack.unpackb(frame) if isinstance(frame, bytes) else json.loads(frame)
            if found["action"] != HEARTBEAT:
                return found

    def expect(self, action: int, seconds: float = 60.0) -> dict[str, Any]:
        """The next protocol message, which is of this kind."""
        found = self.receive(seconds)
        assert found["action"] == action, found
        return found

    def silent(self, seconds: float = 0.3) -> bool:
        """Whether nothing comes within this time."""
        try:
            self.receive(seconds)
        except TimeoutError:
            return True
        return False

    def ended(self, seconds: float = 60.0) -> list[dict[str, Any]]:
        """What still comes until the server closes, which it does."""
        found = []
        try:
            while True:
                found.append(self.receive(seconds))
        except Closed:
            return found

    def attach(self, name: str, **fields: Any) -> dict[str, Any]:
        """Attach, and the answer to it."""
        self.send(ATTACH, channel=name, **fields)
        return self.receive()

    def send_message(self, name: str, *data: bytes) -> int:
        """Publish without waiting; the serial."""
        serial, self._serial = self._serial, self._serial + 1
        messages = [
            {"data": one} if self.wire == "msgpack" else {"data": base64.b64encode(one).decode(), "encoding": "base64"}
            for one in data
        ]
        self.send(MESSAGE, channel=name, msgSerial=serial, messages=messages)
        return serial

    def publish(self, name: str, *data: bytes) -> dict[str, Any]:
        """Publish; the acknowledgement or its refusal."""
        serial = self.send_message(name, *data)
        while True:
            found = self.receive()
            if found["action"] in (ACK, NACK):
                assert (found["msgSerial"], found["count"]) == (serial, 1)
                return found

    def payloads(self, message: dict[str, Any]) -> list[bytes]:
        """The payloads of a MESSAGE."""
        assert message["action"] == MESSAGE, message
        if self.wire == "msgpack":
            assert all("encoding" not in one for one in message["messages"])
            return [one["data"] for one in message["messages"]]
        assert all(one["encoding"] == "base64" for one in message["messages"])
        return [base64.b64decode(one["data"], validate=True) for one in message["messages"]]


def joined(hub: Hub, node: LabNode, channel: str, wire: str = "json", **query: str) -> Wire:
    """A connection that was accepted."""
    found = Wire(hub.port, token_details(hub, node, channel)["token"], wire, **query)
    found.expect(CONNECTED)
    return found
