"""J6: many wait for the next message of a feed at the same time."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kachery_lab.http.descriptors import descriptors_for
from kachery_lab.settings import Settings
from tests.faults.feeds import append, create, follow_until, memory, watch_body
from tests.faults.report import Client, histogram, missing, report, wait_for
from tests.federations import federate
from tests.servers import RunningNode, connections_of

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]
MEMORY_EACH = 128 * 1024
"""Bytes of the server that one who waits may cost."""


def open_files(node: RunningNode) -> int:
    """Descriptors of a server."""
    assert node.process is not None
    return len(list(Path(f"/proc/{node.process.pid}/fd").iterdir()))


def need_open_files(count: int) -> None:
    """This process, and servers that it starts, may have so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        missing(f"needs {count} open files (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@dataclass
class Heard:
    """What a listener was answered: the status (0: the connection ended without one), messages, and when."""

    status: int
    messages: int
    at: float


async def listen(node: RunningNode, request: bytes, sent: Callable[[], None]) -> Heard:
    """One long poll on a socket of its own; `sent` is called when the request is on its way, or was refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
    data = b""
    try:
        writer.write(request)
        await writer.drain()
        sent()
        data = await reader.read()
    except ConnectionError:
        # Refused while it was sent: what is told from the status.
        sent()
    finally:
        writer.close()
    found = re.match(rb"HTTP/1.1 (\d{3}) ", data)
    return Heard(int(found[1]) if found else 0, data.count(b'"n":'), time.monotonic())


def listen_all(
    node: RunningNode, feed: str, position: int, total: int, waiting: int, then: Callable[[], None]
) -> list[Heard]:
    """What so many were told who waited for a message at once. `then` is done when so many of them wait."""
    body = json.dumps(watch_body(feed, position, 600_000)).encode()
    head = (
        f"POST /feed/watchForNewMessages HTTP/1.1\r\nHost: localhost\r\nKACHERY-CLIENT-AUTH-CODE: {node.code}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    wait_for(lambda: connections_of(node.port) == 0, "the connections so far are closed")

    async def run() -> list[Heard]:
        tasks = []
        for start in range(0, total, 100):
            sent = asyncio.Semaphore(0)
            few = min(100, total - start)
            tasks += [asyncio.create_task(listen(node, head.encode() + body, sent.release)) for _ in range(few)]
            for _ in range(few):
                await sent.acquire()
        await asyncio.to_thread(wait_for, lambda: connections_of(node.port) == waiting, f"{waiting} wait", 120)
        await asyncio.to_thread(then)
        return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def many_listeners(make_node: Make, total: int) -> None:
    """All hear of a message, and the server answers others meanwhile."""
    most = total + 50
    need_open_files(descriptors_for(most, 1))
    lab = federate(make_node, "alpha", "beta", KACHERY_LAB_MAX_CONNECTIONS=str(most))
    alpha, beta = lab.members["alpha"], lab.members["beta"]
    feed = create(alpha)
    append(alpha, feed, [{"n": 0}])
    follow_until(beta, feed, 1, 20)
    idle, files, client = memory(beta), open_files(beta), Client(beta)
    begun: list[float] = []
    live: list[float] = []

    def is_alive() -> None:
        asked = time.monotonic()
        assert client.request("GET", "/livez").status == 200
        live.append(time.monotonic() - asked)

    def all_answered() -> bool:
        is_alive()
        return connections_of(beta.port) <= 1

    def tell() -> None:
        is_alive()
        begun.append(time.monotonic())
        assert append(alpha, feed, [{"n": 1}]).status == 200
        wait_for(all_answered, "all have been answered", 120)

    found = listen_all(beta, feed, 1, total, total, tell)
    assert [(heard.status, heard.messages) for heard in found] == [(200, 1)] * total
    last = max(heard.at for heard in found) - begun[0]
    report(
        "J6 listeners",
        total,
        last_delivery_seconds=round(last, 2),
        slowest_livez_ms=round(max(live) * 1000),
        livez_asked=len(live),
        memory_mib=memory(beta) >> 20,
        memory_kib_each=round((memory(beta) - idle) / total / 1024),
    )
    assert last < 10 + total / 100
    # Others are served between those who are told, not behind them all.
    assert max(live) < 1 + last / 5
    assert memory(beta) - idle < total * MEMORY_EACH
    assert append(alpha, feed, [{"n": 2}]).status == 200
    # Nothing is kept for those who were answered.
    wait_for(lambda: open_files(beta) < files + 20, "their connections are closed")


def test_1_000_listeners(make_node: Make) -> None:
    many_listeners(make_node, 1000)


@pytest.mark.timeout(600)
def test_5_000_listeners(make_node: Make) -> None:
    many_listeners(make_node, 5000)


@pytest.mark.timeout(600)
def test_control_5_000_listeners_are_too_many_by_default(make_node: Make) -> None:
    """Without the setting 2,000 hear of it; the others are told at once that there is no room."""
    total, most = 5000, int(Settings.model_fields["max_connections"].default)
    need_open_files(max(total + 100, descriptors_for(most, 1)))
    lab = federate(make_node, "alpha", "beta")
    alpha, beta = lab.members["alpha"], lab.members["beta"]
    feed = create(alpha)
    append(alpha, feed, [{"n": 0}])
    follow_until(beta, feed, 1, 20)

    def tell() -> None:
        assert append(alpha, feed, [{"n": 1}]).status == 200

    found = listen_all(beta, feed, 1, total, most, tell)
    statuses = histogram(heard.status for heard in found)
    report("J6 listeners, control by default", total, status_histogram=statuses)
    assert set(statuses) <= {"0", "200", "503"}
    assert statuses["200"] == most
    assert statuses["503"] > 0
    assert all(heard.messages == (heard.status == 200) for heard in found)
