"""S14: one caller takes what it can get; the others do not notice."""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core import rates
from tests.faults.report import Client, histogram, messages_of, report, wait_for, without
from tests.hubs import Hub, LabNode, path_of, upload_request
from tests.servers import RunningNode, drafts

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]
SUBFEED = "5" * 40


def victim_token(node: RunningNode) -> str:
    """Another caller than the local clients of this address."""
    body = {"user": "victim", "scopes": ["client"]}
    answer = node.post("/api/admin/v1/tokens", body, auth=node.admin_token)
    assert answer.status == 201, answer.body
    return str(answer.json()["token"])


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


class Victim:
    """Does one small thing after the other, and measures."""

    def __init__(self, node: RunningNode, act: Callable[[Client], int]) -> None:
        headers = {"Authorization": f"Bearer {victim_token(node)}"}
        self._client = Client(node, headers)
        self._act = act

    def work(self, count: int = 60) -> tuple[list[int], float]:
        """(Statuses, 99th percentile of the seconds that one took.)"""
        statuses, times = [], []
        for _ in range(count):
            started = time.monotonic()
            statuses.append(self._act(self._client))
            times.append(time.monotonic() - started)
        return statuses, p99(times)


def store_one(client: Client) -> int:
    return client.request("POST", "/store", os.urandom(4096)).status


@contextlib.contextmanager
def opened(node: RunningNode, count: int, length: int) -> Iterator[list[socket.socket]]:
    """So many uploads that have begun and send no more."""
    head = (
        f"POST /store HTTP/1.1\r\nHost: localhost\r\nKACHERY-CLIENT-AUTH-CODE: {node.code}\r\n"
        f"Content-Length: {length}\r\n\r\nbegun"
    )
    sockets = []
    try:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", node.port), 10)
            sockets.append(sock)
            sock.sendall(head.encode())
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def answers(sockets: list[socket.socket], seconds: float = 3.0) -> list[int]:
    """Statuses of those that were answered within so many seconds."""
    found, until = [], time.monotonic() + seconds
    for sock in sockets:
        sock.settimeout(max(0.001, until - time.monotonic()))
        with contextlib.suppress(TimeoutError, ConnectionError):
            line = sock.recv(64)
            found.append(int(line.split()[1]))
    return found


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_a_thousand_uploads_of_one_caller(make_node: Make, guard: bool) -> None:
    most, count = 20, 1000
    prefix = () if guard else without("no_shares")
    node = make_node(env={"KACHERY_LAB_MAX_UPLOADS": str(most)}, prefix=prefix).start()
    victim = Victim(node, store_one)
    _, alone = victim.work()
    with opened(node, count, 50_000) as sockets:
        refused = answers(sockets)
        statuses, beside = victim.work()
    assert set(statuses) == {200}
    # Those that are not refused wait for their bytes.
    assert refused == ([429] * (count - most) if guard else [])
    # What was given up is free again.
    wait_for(lambda: node.store(b"again").status == 200, "an upload of the caller that had too many")
    wait_for(lambda: drafts(node.storage) == [], "no draft is left")
    report(
        "S14",
        count,
        guard=guard,
        what="uploads",
        refused=len(refused),
        victim_p99_ratio=round(beside / alone, 2),
    )


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_more_bytes_than_there_is_room_for(make_node: Make, guard: bool) -> None:
    """Each upload fits, all of one caller together do not."""
    node = make_node(prefix=() if guard else without("no_shares")).start()
    victim = Victim(node, store_one)
    found = os.statvfs(node.storage)
    with opened(node, 4, int(found.f_bavail * found.f_frsize * 0.6)) as sockets:
        refused = answers(sockets, 2.0)
        statuses, _ = victim.work(20)
        small = node.store(b"small").status
    assert (set(statuses), small) == ({200}, 200)
    assert refused == ([507] * 3 if guard else [])
    report("S14", 4, guard=guard, what="bytes", refused=len(refused))


def test_what_comes_without_a_size_leaves_what_is_to_stay_free(make_node: Make, tmp_path: Path) -> None:
    """Control: with less to stay free the same bytes are stored."""
    found = os.statvfs(tmp_path)
    free = found.f_bavail * found.f_frsize
    outcomes = {}
    for name, spare in (("tight", 100 << 20), ("roomy", 2 << 30)):
        node = make_node(name, env={"KACHERY_LAB_MIN_FREE": str(max(free - spare, 1))}).start()
        pieces = (bytes(1 << 20) for _ in range(300))
        with contextlib.suppress(ConnectionError):
            outcomes[name] = node.request("POST", "/store", pieces).status
        assert drafts(node.storage) == []
        node.kill()
    assert outcomes["roomy"] == 200
    assert outcomes.get("tight", 507) == 507
    report("S14", 2, what="bytes without a size", outcomes=outcomes)


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_a_flood_of_appends(make_node: Make, guard: bool) -> None:
    prefix = () if guard else without("no_shares")
    node = make_node(env={"KACHERY_LAB_MAX_APPENDS": "4"}, prefix=prefix).start()
    feeds = [node.post("/feed/createFeed", {"feedName": name}).json()["feedId"] for name in ("flood", "victim")]

    def append(client: Client, feed: str, text: str = "x") -> int:
        body: dict[str, Any] = {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{"text": text}]}
        return client.post("/feed/appendMessages", body).status

    victim = Victim(node, lambda client: append(client, feeds[1]))
    _, alone = victim.work()
    stop = threading.Event()

    def flood(_: int) -> list[int]:
        client, found = Client(node), []
        while not stop.is_set():
            found.append(append(client, feeds[0], "x" * 20_000))
        return found

    with ThreadPoolExecutor(32) as pool:
        running = [pool.submit(flood, number) for number in range(32)]
        time.sleep(0.5)
        statuses, beside = victim.work(150)
        stop.set()
        flooded = [status for one in running for status in one.result()]
    assert set(statuses) == {200}
    assert set(flooded) == ({200, 429} if guard else {200})
    assert len(messages_of(node, feeds[0], SUBFEED)) == flooded.count(200)
    assert len(messages_of(node, feeds[1], SUBFEED)) == 60 + 150
    report(
        "S14",
        len(flooded),
        guard=guard,
        what="appends",
        statuses=histogram(flooded),
        victim_p99_ratio=round(beside / alone, 2),
    )


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_a_flood_of_tickets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guard: bool) -> None:
    """A hundred at once and one per second; another node has its own."""
    if not guard:
        monkeypatch.setattr(rates.Rates, "wait", lambda *_: 0.0)
    with Hub(tmp_path, tickets_per_second=1) as hub:
        hub.make_channel("lab")
        greedy, other = LabNode(), LabNode("b@example.org")
        for node in (greedy, other):
            hub.register(node)
            hub.join(node, "lab")
        certificate, key = hub.certificate(greedy, "lab")
        resource_id = hub.node.data.channel("lab").resource_id
        found, waits = [], []
        for start in range(0, 300, 10):
            paths = [f"lab/{path_of(str(number).encode())}" for number in range(start, start + 10)]
            answer = hub.post("/api/resource", upload_request(certificate, key, resource_id, paths, [3] * 10))
            found.append(answer.status)
            waits.append(answer.headers.get("retry-after"))
        assert hub.put(hub.upload_urls(other, "lab", [path_of(b"other")], [5])[0], b"other").status == 200
    if guard:
        assert found[:10] == [200] * 10 and set(found[12:]) == {429}
        assert all(wait is not None and wait.isdigit() for wait in waits[12:])
    else:
        assert set(found) == {200}
    report("S14", len(found), guard=guard, what="tickets", statuses=histogram(found))


@pytest.mark.parametrize("limited", [True, False], ids=["guard", "control"])
def test_a_channel_that_is_filled(tmp_path: Path, limited: bool) -> None:
    """The channel's limit stops its own uploads only. Control: without one everything goes in."""
    with Hub(tmp_path) as hub:
        hub.make_channel("full", **({"max_bytes": 10_000} if limited else {}))
        hub.make_channel("other")
        node = LabNode()
        hub.register(node)
        for channel in ("full", "other"):
            hub.join(node, channel)
        contents = [os.urandom(1000) for _ in range(30)]
        urls = hub.upload_urls(node, "full", [path_of(one) for one in contents], [1000] * 30)
        found = [hub.put(url, data).status for url, data in zip(urls, contents, strict=True)]
        assert found == ([200] * 10 + [507] * 20 if limited else [200] * 30)
        assert hub.call(hub.node.buckets.used("full")) == 1000 * found.count(200)
        hub.upload(node, "other", contents[-1])
    report("S14", 30, guard=limited, what="a full channel", statuses=histogram(found))
