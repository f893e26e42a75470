"""A member of a channel that is no server of ours and keeps to no rule: it has a key, and says what it likes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from kachery_lab.core.band_messages import sign_message
from tests.federations import CHANNEL, SignedRequests

BANDS = "/api/v1/bands"


class HostileMember:
    """On the bands of the hub, as `who`."""

    def __init__(self, who: SignedRequests) -> None:
        self.who = who
        self.sent = 0
        self.refused: list[dict[str, Any]] = []
        self.heard: list[dict[str, Any]] = []
        self._number = 0
        url = f"ws://127.0.0.1:{who.hub.port}{BANDS}"
        self._connecting = connect(url, additional_headers=who.header("GET", BANDS), compression=None, proxy=None)
        self._socket: ClientConnection

    def __enter__(self) -> HostileMember:
        self._socket = self._connecting.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._connecting.__exit__(*error)

    def subscribe(self, band: str, channel: str = CHANNEL) -> None:
        self._send([{"type": "subscribe", "channel": channel, "band": band}])
        self.listen(0.3)

    def publish(self, bodies: Iterable[dict[str, Any]], band: str, channel: str = CHANNEL) -> None:
        """Send messages with a right shape, as fast as the hub reads them, 20 in a frame."""
        waiting: list[dict[str, Any]] = []
        for body in bodies:
            text = sign_message(self.who.key, body).text
            waiting.append({"type": "publish", "channel": channel, "band": band, "messages": [json.loads(text)]})
            if len(waiting) == 20:
                self._send(waiting)
                waiting = []
                self.listen(0)
        self._send(waiting)

    def publish_as_is(self, message: dict[str, Any], band: str, channel: str = CHANNEL) -> None:
        """Send a message of whatever shape."""
        self._send([{"type": "publish", "channel": channel, "band": band, "messages": [message]}])

    def _send(self, items: list[dict[str, Any]]) -> None:
        for item in items:
            self._number += 1
            item["id"] = self._number
        if items:
            self._socket.send(json.dumps(items))
            self.sent += sum(item["type"] == "publish" for item in items)

    def listen(self, seconds: float) -> list[dict[str, Any]]:
        """Bodies that come in within this time."""
        until = time.monotonic() + seconds
        found: list[dict[str, Any]] = []
        try:
            while True:
                for item in json.loads(self._socket.recv(timeout=max(until - time.monotonic(), 0))):
                    if item["type"] == "message":
                        found.append(item["data"]["body"])
                    elif item["type"] == "error":
                        self.refused.append(item)
        except (TimeoutError, ConnectionClosed):
            pass
        self.heard += found
        return found

    def statuses(self, sha1: str, key: dict[str, Any] | None = None) -> list[str]:
        """What was heard of a file."""
        heard = [body for body in self.heard if body["type"] == "uploadFileStatus"]
        return [body["status"] for body in heard if body["fileKey"]["sha1"] == sha1 and key in (None, body["fileKey"])]
