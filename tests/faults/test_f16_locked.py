"""F16: another process holds the database for longer than the busy timeout."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha1

from tests.faults.report import histogram, messages_of, report, without
from tests.servers import Answer, RunningNode

Make = Callable[..., RunningNode]
SUBFEED = "3" * 40
HOLDER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN EXCLUSIVE")
print("held", flush=True)
sys.stdin.read()
database.execute("ROLLBACK")
database.close()
"""


@contextmanager
def locked(node: RunningNode) -> Iterator[None]:
    """Another process is inside BEGIN EXCLUSIVE."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(node.metadata / "kachery-lab.db")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        yield
    finally:
        holder.stdin.close()
        assert holder.wait(30) == 0
        holder.stdout.close()


def append(node: RunningNode, feed: str, text: str) -> int:
    body = {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{"text": text}]}
    return node.post("/feed/appendMessages", body, auth=node.admin_token).status


def texts(node: RunningNode, feed: str) -> list[str]:
    return [message["text"] for message in messages_of(node, feed, SUBFEED)]


def test_reads_go_on_writes_are_503_and_nothing_is_lost_or_doubled(make_node: Make) -> None:
    node = make_node().start()
    token = node.admin_token
    data, late = os.urandom(4000), os.urandom(4000)
    name, late_name = sha1(data).hexdigest(), sha1(late).hexdigest()
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    assert node.store(data).status == 200
    assert append(node, feed, "before") == 200
    assert node.post("/mutable/set", {"key": "k", "value": "before"}).status == 200
    writes = {
        "PUT": lambda: node.request("PUT", f"/api/v1/blobs/{late_name}", late),
        "append": lambda: node.post(
            "/feed/appendMessages", {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{"text": "refused"}]}
        ),
        "set": lambda: node.post("/mutable/set", {"key": "k", "value": "refused"}),
        "feed": lambda: node.post("/feed/createFeed", {"feedName": "refused"}),
        "token": lambda: node.request(
            "POST",
            "/api/admin/v1/tokens",
            b'{"user":"refused","scopes":["read"]}',
            {"Content-Type": "application/json"},
            auth=token,
        ),
    }

    def timed(what: str) -> tuple[str, Answer, float]:
        begun = time.monotonic()
        return what, writes[what](), time.monotonic() - begun

    longest_read = 0.0
    with locked(node), ThreadPoolExecutor(len(writes)) as pool:
        waiting = [pool.submit(timed, what) for what in writes]
        while not all(future.done() for future in waiting):
            begun = time.monotonic()
            assert node.request("GET", f"/api/v1/blobs/{name}").body == data
            assert texts(node, feed) == ["before"]
            assert node.post("/mutable/get", {"key": "k"}).json()["value"] == "before"
            assert node.request("GET", "/livez", auth=False).status == 200
            assert node.request("GET", "/readyz", auth=False).status == 200
            longest_read = max(longest_read, time.monotonic() - begun)
        results = [future.result() for future in waiting]
    statuses = [answer.status for _, answer, _ in results]
    longest = max(seconds for _, _, seconds in results)
    for what, answer, _ in results:
        assert answer.status == 503, (what, answer.body)
        assert int(answer.headers["retry-after"]) > 0
        assert b"locked by another process" in answer.body
    # Reads that waited for the lock would take as long as a write, which is refused after five seconds.
    assert longest_read < 4.5
    assert longest < 30

    assert node.request("PUT", f"/api/v1/blobs/{late_name}", late).status in (200, 201)
    assert append(node, feed, "after") == 200
    assert node.post("/mutable/get", {"key": "k"}).json()["value"] == "before"
    assert node.post("/mutable/set", {"key": "k", "value": "after"}).status == 200
    assert texts(node, feed) == ["before", "after"]
    for restart in (node.kill, node.terminate):
        restart()
        node.start()
        assert texts(node, feed) == ["before", "after"]
        assert node.post("/mutable/get", {"key": "k"}, auth=token).json()["value"] == "after"
        assert node.post("/feed/getFeedId", {"feedName": "refused"}, auth=token).json()["feedId"] is None
        assert node.request("GET", f"/api/v1/blobs/{late_name}", auth=token).body == late
    log = b"".join(path.read_bytes() for path in sorted((node.storage / "feeds-log").iterdir()))
    assert log.count(b'"type":"void"') == 1 and b"refused" in log
    report(
        "F16",
        len(writes),
        acked=8,
        lost=0,
        wrong=0,
        status_histogram=histogram(statuses),
        longest_write_s=round(longest, 2),
        longest_read_round_ms=round(longest_read * 1000),
    )


def refused_then_killed(node: RunningNode) -> tuple[list[str], int]:
    """Messages after an append that was refused because of a lock, a kill and a start; and the append's status."""
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    assert append(node, feed, "before") == 200
    with locked(node):
        status = append(node, feed, "refused")
    node.kill()
    node.start()
    return texts(node, feed), status


def test_what_was_refused_does_not_come_back_after_a_kill(make_node: Make) -> None:
    found, status = refused_then_killed(make_node().start())
    assert (found, status) == (["before"], 503)
    report("F16 refused", 1, resurrected=0)


def test_control_without_the_void_record_it_comes_back(make_node: Make) -> None:
    found, status = refused_then_killed(make_node(prefix=without("no_void")).start())
    assert (found, status) == (["before", "refused"], 503)
    report("F16 control no_void", 1, resurrected=1)
