"""A provider of on-demand files for tests: says what the published one says, by a client library that is not ours.

A module that wants the fixtures binds their names: imported under the name of an argument, they would look like
mistakes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.hubs import Hub, sha1_of
from tests.servers import Answer
from tests.zones import Zone

SECONDS = 60.0
WITH_DIRECTORY = "lab.old"
"""A zone whose resource directory is `old` beside the storage; tests make it."""


def address(hub: Hub, token: str) -> str:
    return f"ws://127.0.0.1:{hub.port}/p/{token}"


def refused(hub: Hub, token: str) -> tuple[int, str]:
    """Status and text of an upgrade that is not made."""
    with pytest.raises(InvalidStatus) as found:
        connect(address(hub, token), proxy=None)
    response = found.value.response
    assert set(json.loads(response.body or b"")) == {"message"}
    return response.status_code, str(json.loads(response.body or b"")["message"])


class Line:
    """An open connection of a provider."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    def say(self, **fields: Any) -> None:
        self.socket.send(json.dumps(fields))

    def hear(self) -> dict[str, Any]:
        """The next frame."""
        found = json.loads(self.socket.recv(timeout=SECONDS))
        assert isinstance(found, dict)
        return found

    def initialize(self, zone: str, /, **changes: Any) -> None:
        """As the published one: `proxySecret` is what its person typed."""
        fields = {"resourceName": zone, "zone": zone, "proxySecret": "x", **changes}
        self.say(type="initialize", **{name: value for name, value in fields.items() if value is not None})

    def wanted(self) -> dict[str, Any]:
        """The next file that is asked for."""
        found = self.hear()
        assert found["type"] == "requestFromClient", found
        return found

    def status(self, request: dict[str, Any], state: str, **more: Any) -> None:
        """Answer with how far the file is."""
        self.respond(request, {"type": "fileUpload", "status": {"status": state, **more}})

    def respond(self, request: dict[str, Any], response: Any, **more: Any) -> None:
        self.say(type="responseToClient", requestId=request["requestId"], response=response, **more)

    def end(self) -> tuple[int, str]:
        """Code and reason with which the server ends it."""
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                self.socket.recv(timeout=SECONDS)
        assert closed.value.rcvd is not None
        return closed.value.rcvd.code, closed.value.rcvd.reason


@contextmanager
def opened(hub: Hub, token: str) -> Iterator[Line]:
    """A connection on which nothing was said."""
    with connect(address(hub, token), proxy=None) as socket:
        yield Line(socket)


@contextmanager
def providing(hub: Hub, token: str, zone: str, /, **changes: Any) -> Iterator[Line]:
    """A connection that serves a zone."""
    with opened(hub, token) as line:
        line.initialize(zone, **changes)
        assert line.hear() == {"type": "acknowledge"}
        yield line


def all_gone(hub: Hub) -> None:
    """Waits until the server knows that every provider is gone: until then the name of a zone is taken."""
    until = time.monotonic() + SECONDS
    while hub.node.resource_providers._open:
        assert time.monotonic() < until
        time.sleep(0.01)


class Reader:
    """Asks `/r/{zone}` for files as kachery-cloud does, in threads of its own. Use with `with`."""

    def __init__(self, hub: Hub, zone: str, token: str | None, wait_ms: int = 10_000) -> None:
        self._hub = hub
        self._zone = zone
        self._address = f"/r/{zone}" if token is None else f"/p/{token}/r/{zone}"
        self._wait_ms = wait_ms
        self._threads = ThreadPoolExecutor(16)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_error: object) -> None:
        self._threads.shutdown()

    def ask(self, data: bytes, wait_ms: int | None = None) -> Answer:
        wait = self._wait_ms if wait_ms is None else wait_ms
        file = {"type": "fileUpload", "uri": f"sha1://{sha1_of(data)}", "timeoutMsec": wait}
        named = {"resourceName": self._zone, "zone": self._zone, "request": file, "timeoutMsec": wait + 5000}
        return self._hub.post(self._address, {"type": "requestFromClient", **named})

    def status(self, data: bytes, wait_ms: int | None = None) -> dict[str, Any]:
        """What is answered of the file."""
        answer = self.ask(data, wait_ms)
        assert answer.status == 200, answer.body
        found = answer.json()
        assert set(found) == {"type", "response"}
        assert (found["type"], found["response"]["type"]) == ("responseToClient", "fileUpload")
        return dict(found["response"]["status"])

    def begin(self, data: bytes, wait_ms: int | None = None) -> Future[dict[str, Any]]:
        """`status`, while the test goes on."""
        return self._threads.submit(self.status, data, wait_ms)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("providers")
    (root / "old" / "sha1").mkdir(parents=True)
    with Hub(root, resource_dirs=(f"{WITH_DIRECTORY}={root / 'old'}",)) as running:
        yield running


@pytest.fixture
def zone(hub: Hub) -> Zone:
    return Zone(hub)


@pytest.fixture
def reader(zone: Zone) -> Iterator[Reader]:
    with Reader(zone.hub, zone.name, zone.reader) as asking:
        yield asking


@pytest.fixture
def data() -> bytes:
    """Bytes of a file that only the provider has."""
    return os.urandom(1000)
