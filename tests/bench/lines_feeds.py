"""Feeds: appends one by one, appends of many messages, reading many."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

from tests.bench import load, reference_sqlite
from tests.bench.place import MIB, Memory, Place, best, head
from tests.bench.table import Row, ratio
from tests.servers import RunningNode

JSON = "application/json"
SUBFEED = "5" * 40


def append_single(place: Place) -> Iterator[Row]:
    """One message per request, against single-row commits. Of several clients each has a subfeed of its own."""
    each = place.count(1000)
    with place.node() as node:
        feed_id = _create_feed(node)
        database = place.work / "reference.db"

        def ours(clients: int) -> float:
            body = json.dumps(
                {"feedId": feed_id, "subfeedHash": "%CLIENT%", "messages": [{"text": "%UNIQUE%", "type": "bench"}]}
            )
            # The length of what the template becomes: %CLIENT% has 40 characters then, %UNIQUE% 32.
            size = len(body) + 40 - len("%CLIENT%") + 32 - len("%UNIQUE%")
            template = head(node, "POST", "/feed/appendMessages", size, JSON) + body
            share = each if clients == 1 else max(each * 4 // clients, 20)
            found = load.run(
                "requests", port=node.port, clients=clients, each=share, warm=10, template=template, values=[]
            )
            return float(found["per_second"])

        base, one, sixteen = best(
            place.rounds, lambda: reference_sqlite.measure(database, each * 4), lambda: ours(1), lambda: ours(16)
        )
    yield ratio("one message per append, 1 client : SQLite commits of one row", one, base, 0.08, "/s")
    yield ratio("one message per append, 16 clients : SQLite commits of one row", sixteen, base, 0.2, "/s")


def append_many(place: Place) -> Iterator[Row]:
    """10,000 messages in one append; then 100,000 of them in one watch, by the memory that it takes."""
    with place.node() as node:
        feed_id = _create_feed(node)
        found = []
        for number in range(10):
            body = json.dumps({"feedId": feed_id, "subfeedHash": SUBFEED, "messages": _messages(number * 10_000)})
            begun = time.perf_counter()
            answer = node.request("POST", "/feed/appendMessages", body, {"Content-Type": JSON})
            found.append(10_000 / (time.perf_counter() - begun))
            if answer.status != 200 or answer.json() != {"success": True, "position": number * 10_000}:
                raise RuntimeError(f"a wrong answer: {answer}")
        rate = max(found[: place.rounds])
        yield Row("10,000 messages in one append", f"{rate:,.0f} /s", "", rate, 5000, "/s")
        peaks, seconds = zip(*(_watch(node, feed_id) for _ in range(2)), strict=True)
        peak = max(peaks) / MIB
        text = f"{100_000 / min(seconds):,.0f} /s"
        yield Row("memory for 100,000 messages in one watch", text, "", peak, 64, "MiB", at_most=True)


def _watch(node: RunningNode, feed_id: str) -> tuple[int, float]:
    """(Bytes of memory more than before, seconds)."""
    assert node.process is not None
    watches = {"w": {"feedId": feed_id, "subfeedHash": SUBFEED, "position": 0, "channelName": "*local*"}}
    body = json.dumps({"subfeedWatches": watches, "waitMsec": 0})
    memory = Memory(node.process.pid)
    begun = time.perf_counter()
    answer = node.request("POST", "/feed/watchForNewMessages", body, {"Content-Type": JSON})
    seconds = time.perf_counter() - begun
    added = memory.added()
    if answer.status != 200 or len(answer.json()["messages"]["w"]) != 100_000:
        raise RuntimeError(f"a wrong answer: {answer.body[:500]!r}")
    return added, seconds


def _messages(first: int) -> list[dict[str, object]]:
    return [{"type": "bench", "number": number, "text": "m" * 60} for number in range(first, first + 10_000)]


def _create_feed(node: RunningNode) -> str:
    return str(node.post("/feed/createFeed", {}).json()["feedId"])
