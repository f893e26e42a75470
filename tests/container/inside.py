"""Servers of a compose file whose network is cut: asked from inside, unplugged, paused."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.container.engine import docker
from tests.container.federation import Federation, Server
from tests.servers import Answer, RunningNode

PORT = 20431
"""Where a server listens inside its container."""
CLONE_NEWNET = 0x40000000


def enter_network(pid: int) -> None:
    """From now on this thread's new connections are made inside the network of a process."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{pid}/ns/net").open() as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")


class Inside(RunningNode):
    """A server in a container, asked from inside its network: that works whatever is cut outside."""

    def __init__(self, server: Server) -> None:
        super().__init__(server.storage, server.metadata, port=PORT)
        self.server = server
        self.pid = int(server.container.inspect()["State"]["Pid"])
        self._pool = ThreadPoolExecutor(64, initializer=enter_network, initargs=(self.pid,))

    def request(self, *arguments: Any, **more: Any) -> Answer:
        return self._pool.submit(super().request, *arguments, **more).result()

    def close(self) -> None:
        self._pool.shutdown()

    def try_post(self, path: str, body: Any) -> Answer | None:
        """The answer, or None when there is none or only that it cannot be done at the moment."""
        try:
            answer = self.post(path, body, timeout=150)
        except (OSError, http.client.HTTPException):
            return None
        assert answer.status in (200, 503), (path, answer.status, answer.body)
        return answer if answer.status == 200 else None


@contextlib.contextmanager
def unplugged(lab: Federation, name: str) -> Iterator[None]:
    """A server whose cable is pulled, and put in again at the end."""
    container = lab.servers[name].container.name
    docker("network", "disconnect", lab.network, container)
    try:
        yield
    finally:
        address = ("--ip", lab.hub_address) if name == "hub" else ()
        docker("network", "connect", *address, lab.network, container)


@contextlib.contextmanager
def paused(lab: Federation, name: str) -> Iterator[None]:
    """A server that takes what is sent to it and says nothing."""
    container = lab.servers[name].container.name
    docker("pause", container)
    try:
        yield
    finally:
        docker("unpause", container)
