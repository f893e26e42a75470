"""Three servers on one machine: a hub and two nodes that joined it."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.bench.place import Place
from tests.bench.table import Row
from tests.clients.backends import Backend, answers, asking
from tests.faults.report import Client, wait_for
from tests.federations import CHANNEL, federate
from tests.nodes import making_nodes
from tests.servers import RunningNode

SUBFEED = "5" * 40


@contextmanager
def three_servers(place: Place) -> Iterator[tuple[RunningNode, RunningNode]]:
    """A hub and two nodes that joined its channel: those two, when they hear each other."""
    with making_nodes(place.directory()) as make_node:
        found = federate(partial(make_node, fresh=True), "one", "two")
        yield found.members["one"], found.members["two"]


def file_on_demand(place: Place) -> Iterator[Row]:
    """From asking one node for a file of 10 KB that only another has until it lies on the first one's disk, one file
    after another."""
    count = place.count(100)
    with three_servers(place) as (one, two):
        client = Client(two)
        took = []
        for number in range(-10, count):
            sha1 = str(one.store(os.urandom(10_000)).json()["sha1"])
            begun = time.perf_counter()
            answer = client.post("/loadFile", {"fileKey": {"sha1": sha1}, "channelName": CHANNEL})
            seconds = time.perf_counter() - begun
            if b'"finished"' not in answer.body:
                raise RuntimeError(f"loadFile: {answer.status} {answer.body!r}")
            if number >= 0:
                took.append(seconds * 1000)
    median, late = statistics.median(took), sorted(took)[int(len(took) * 0.95)]
    text = f"p95 {late:.0f} ms"
    yield Row("a file of 10 KB that another node must first provide", text, "", median, 250, "ms", at_most=True)


def append_to_delivery(place: Place) -> Iterator[Row]:
    """From sending an append to one node to having the message at a watch on another, one message after another."""
    count = place.count(200)
    with three_servers(place) as (one, two):
        feed = str(one.post("/feed/createFeed", {}).json()["feedId"])
        arrived: list[float] = []
        ready = threading.Semaphore(0)

        def follow() -> None:
            client = Client(two)
            while len(arrived) <= count:
                watch = {"feedId": feed, "subfeedHash": SUBFEED, "position": len(arrived), "channelName": CHANNEL}
                answer = client.post("/feed/watchForNewMessages", {"subfeedWatches": {"w": watch}, "waitMsec": 5000})
                for _ in answer.json()["messages"].get("w", []):
                    arrived.append(time.perf_counter())
                    ready.release()

        watcher = threading.Thread(target=follow)
        watcher.start()
        writer, sent = Client(one), []
        for number in range(count + 1):
            # The next watch has to be there; the first message also waits for the subscription.
            time.sleep(0.02)
            sent.append(time.perf_counter())
            body = {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{"type": "bench", "number": number}]}
            if writer.post("/feed/appendMessages", body).status != 200 or not ready.acquire(timeout=30):
                raise RuntimeError(f"message {number} did not arrive: {two.log[-2000:]}")
        watcher.join()
    found = [(end - begin) * 1000 for begin, end in zip(sent, arrived, strict=True)][1:]
    median, late = statistics.median(found), statistics.quantiles(found, n=20)[-1]
    yield Row("append on one node to delivery on another", f"p95 {late:.0f} ms", "", median, 50, "ms", at_most=True)


def trivial_task(place: Place) -> Iterator[Row]:
    """From `request_task` at one node to the result in the client's hands, of a function that does nothing, by
    kachery-client's own backend at another node; one task after another, with pauses of no fixed length between."""
    count = place.count(60)
    with three_servers(place) as (one, two), tempfile.TemporaryDirectory() as directory:
        backend = Backend(one, CHANNEL, Path(directory) / "runs", "bench")
        try:
            wait_for(lambda: "Registering task" in backend.log.read_text(), "the backend is there")
            time.sleep(2)
            tasks = [{"n": number} for number in range(-5, count)]
            found = answers(asking(two, CHANNEL, "double.1", "pure-calculation", tasks, 30, pause=0.3), 600)
        finally:
            backend.kill()
    if any(one.get("status") != "finished" for one in found):
        raise RuntimeError(f"a task did not finish: {found}")
    took = [one["seconds"] * 1000 for one in found][5:]
    median, late = statistics.median(took), statistics.quantiles(took, n=20)[-1]
    yield Row("trivial task, request to result", f"p95 {late:.0f} ms", "", median, 150, "ms", at_most=True)
