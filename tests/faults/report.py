"""What the fault tests share: one line of figures per row, prerequisites that CI must have, servers without a guard."""

from __future__ import annotations

import http.client
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.servers import Answer, RunningNode

UNGUARDED = Path(__file__).with_name("unguarded.py")


def report(row: str, trials: int, **figures: object) -> None:
    """Print a row's figures as one JSON line; also append it to the file that KACHERY_LAB_FAULT_REPORT names."""
    line = json.dumps({"row": row, "trials": trials, **figures}, default=str)
    print(line)
    path = os.environ.get("KACHERY_LAB_FAULT_REPORT")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def missing(what: str) -> NoReturn:
    """A prerequisite is absent: a skip for people, a failure in CI, where a skip would hide a row."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def need_root() -> None:
    """Mounting and changing users need it."""
    if os.geteuid() != 0:
        missing("needs root")


def without(guard: str) -> list[str]:
    """A command prefix that runs the server with one guard switched off, for positive controls."""
    return [sys.executable, str(UNGUARDED), guard]


def histogram(statuses: Iterable[int]) -> dict[str, int]:
    """How often each status came."""
    return {str(status): count for status, count in sorted(Counter(statuses).items())}


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Poll until `condition()`; fails naming `what`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.02)


class Client:
    """Many requests on one connection, which is opened anew when the server closes it."""

    def __init__(self, node: RunningNode, headers: Mapping[str, str] | None = None, timeout: float = 60) -> None:
        self._port = node.port
        self._headers = {"KACHERY-CLIENT-AUTH-CODE": node.code} if headers is None else dict(headers)
        self._timeout = timeout
        self._connection: http.client.HTTPConnection | None = None

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request. A connection that the server closed while it was idle is tried once more."""
        for attempt in (0, 1):
            if self._connection is None:
                self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=self._timeout)
                attempt = 1
            try:
                self._connection.request(method, path, body, {**self._headers, **(headers or {})})
                response = self._connection.getresponse()
                data = response.read()
            except (OSError, http.client.HTTPException):
                self.close()
                if attempt:
                    raise
                continue
            answer = Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, data)
            if response.will_close:
                self.close()
            return answer
        raise AssertionError("unreachable")

    def post(self, path: str, body: object) -> Answer:
        """A JSON request; bytes go as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, {"Content-Type": "application/json"})

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        self.close()


def with_every_right(node: RunningNode) -> Client:
    """A client whose refusals are never about rights."""
    return Client(node, {"Authorization": f"Bearer {node.admin_token}"})


def messages_of(node: RunningNode, feed_id: str, subfeed: str, *, signed: bool = False, position: int = 0) -> list[Any]:
    """Every message of a subfeed from `position`."""
    answer = node.post(
        "/feed/watchForNewMessages",
        {
            "subfeedWatches": {
                "w": {"feedId": feed_id, "subfeedHash": subfeed, "position": position, "channelName": "chan"}
            },
            "waitMsec": 0,
            "signed": signed,
        },
        auth=node.admin_token,
    )
    assert answer.status == 200, answer.body
    found = answer.json()["messages"].get("w", [])
    assert isinstance(found, list)
    return found
