"""A member of channels for tests: signs, connects, publishes and listens, with a WebSocket client that is not ours."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from websockets.sync.client import ClientConnection, connect

from kachery_lab.core.band_messages import SignedBody, sign_message
from kachery_lab.core.signables import request_bytes
from tests.hubs import LabNode

CHANNEL = "testchan"
TARGET = "/api/v1/bands"
SHA1 = "943a702d06f34599aee1f8da8ef9f7296031d699"
BODIES: dict[str, dict[str, Any]] = {
    "requestFiles": {"type": "requestFile", "fileKey": {"sha1": SHA1}},
    "provideFiles": {"type": "uploadFileStatus", "fileKey": {"sha1": SHA1}, "status": "started"},
    "requestFeeds": {"type": "subscribeToSubfeed", "feedId": "ab" * 32, "subfeedHash": SHA1, "position": 0},
    "provideFeeds": {
        "type": "numSubfeedMessagesUploaded",
        "feedId": "ab" * 32,
        "subfeedHash": SHA1,
        "numMessages": 1,
    },
    "requestTasks": {"type": "probeTaskFunctions", "taskFunctionIds": []},
    "provideTasks": {"type": "updateTaskStatus", "taskId": "t", "status": "running"},
}
"""A message of each band."""


class Member(LabNode):
    """A node that speaks on bands."""

    def header(self, hub_id: str, **changes: Any) -> dict[str, str]:
        """The header of a signed upgrade request; `changes` make it a wrong one."""
        given = {
            "method": "GET",
            "target": TARGET,
            "at": int(time.time()),
            "nonce": secrets.token_hex(8),
            "hub_id": hub_id,
            "node_id": self.id,
            **changes,
        }
        empty = hashlib.sha256(b"").hexdigest()
        data = request_bytes(
            given["method"], given["target"], empty, given["at"], given["nonce"], given["node_id"], given["hub_id"]
        )
        text = f"v1 {given['node_id']} {given['at']} {given['nonce']} {self.key.sign(data).hex()}"
        return {"Kachery-Node": text}

    def signed(self, band: str, **fields: Any) -> SignedBody:
        return sign_message(self.key, {**BODIES[band], **fields})


class Line:
    """A connection, and what came over it."""

    def __init__(self, socket: ClientConnection, member: Member) -> None:
        self.socket = socket
        self.member = member
        self.came: list[dict[str, Any]] = []
        self._number = 0

    def send(self, *items: Any) -> None:
        self.socket.send(json.dumps(list(items)))

    def read(self, seconds: float = 5.0) -> bool:
        """One more frame, kept; False when none came."""
        try:
            frame = json.loads(self.socket.recv(timeout=seconds))
        except TimeoutError:
            return False
        assert isinstance(frame, list) and frame
        self.came += frame
        return True

    def next(self, kind: str, seconds: float = 60.0) -> dict[str, Any]:
        """The next object of a type, taken out."""
        until = time.monotonic() + seconds
        while True:
            for item in self.came:
                if item["type"] == kind:
                    self.came.remove(item)
                    return item
            assert self.read(max(0.01, until - time.monotonic())), (kind, self.came)

    def ask(self, kind: str, **fields: Any) -> str:
        """`done`, or the code of the error."""
        self._number += 1
        self.send({"type": kind, "id": self._number, **fields})
        while True:
            for item in self.came:
                if item["type"] in ("done", "error") and item["id"] == self._number:
                    self.came.remove(item)
                    return str(item.get("code", "done"))
            assert self.read(60.0)

    def subscribe(self, *bands: str, channel: str = CHANNEL) -> None:
        for band in bands:
            assert self.ask("subscribe", channel=channel, band=band) == "done"

    def publish(self, band: str, *messages: Any, channel: str = CHANNEL) -> str:
        found = [json.loads(one.text) if isinstance(one, SignedBody) else one for one in messages]
        return self.ask("publish", channel=channel, band=band, messages=found)

    def messages(self, seconds: float = 0.3) -> list[dict[str, Any]]:
        """Messages that came, and that come within a moment."""
        while self.read(seconds):
            pass
        found = [item for item in self.came if item["type"] == "message"]
        self.came = [item for item in self.came if item["type"] != "message"]
        return found


@contextmanager
def connected(port: int, hub_id: str, member: Member, **how: Any) -> Iterator[Line]:
    """A connection that the hub has greeted."""
    headers = {**member.header(hub_id), **how.pop("headers", {})}
    with connect(f"ws://127.0.0.1:{port}{TARGET}", additional_headers=headers, proxy=None, **how) as websocket:
        found = Line(websocket, member)
        assert found.next("hello")["hubId"] == hub_id
        yield found
