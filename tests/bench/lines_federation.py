"""Three servers on one machine: a hub and two nodes that joined it."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.place import Place
from tests.bench.table import Row
from tests.clients.backends import Backend, answers, asking
from tests.faults.report import Client
from tests.servers import RunningNode

CHANNEL = "bench"
SUBFEED = "5" * 40


@dataclass(frozen=True, slots=True)
class Federation:
    """A hub with a private channel, in which its own node and two joined ones have every role."""

    hub: RunningNode
    one: RunningNode
    two: RunningNode

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        """A request of an admin at the hub."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body)
        answer = self.hub.request(method, f"/api/admin/v1{path}", data, headers, auth=self.hub.admin_token)
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {answer.body!r}")
        return answer.json() if answer.body else None


@contextmanager
def federation(place: Place) -> Iterator[Federation]:
    """Three running servers, whose bands are connected."""
    with place.node() as hub:
        env = {"KACHERY_LAB_HUB_URL": f"http://127.0.0.1:{hub.port}"}
        with place.node(**env) as one, place.node(**env) as two:
            found = Federation(hub, one, two)
            found.admin("POST", "/channels", {"name": CHANNEL})
            for node in (hub, one, two):
                _let_in(found, node)
            _wait(lambda: all("the hub's bands are connected" in node.log for node in (one, two)))
            time.sleep(0.5)
            yield found


def _let_in(place: Federation, node: RunningNode) -> None:
    node_id = (node.storage / "kachery-node-id").read_text()
    _wait(lambda: any(row["nodeId"] == node_id for row in place.admin("GET", "/nodes")["nodes"]))
    if node is not place.hub:
        place.admin("PATCH", f"/nodes/{node_id}", {"approved": True})
    place.admin("PUT", f"/channels/{CHANNEL}/memberships/{node_id}", {})
    place.admin("PUT", f"/channels/{CHANNEL}/authorizations/node/{node_id}", {"roles": ["all"]})


def _wait(condition: Any) -> None:
    until = time.monotonic() + 20
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError("the nodes did not come together")
        time.sleep(0.1)


def file_on_demand(place: Place) -> Iterator[Row]:
    """From asking one node for a file of 10 KB that only another has until it lies on the first one's disk, one file
    after another."""
    count = place.count(100)
    with federation(place) as servers:
        client = Client(servers.two)
        took = []
        for number in range(-10, count):
            sha1 = str(servers.one.store(os.urandom(10_000)).json()["sha1"])
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
    with federation(place) as servers:
        feed = str(servers.one.post("/feed/createFeed", {}).json()["feedId"])
        arrived: list[float] = []
        ready = threading.Semaphore(0)

        def follow() -> None:
            client = Client(servers.two)
            while len(arrived) <= count:
                watch = {"feedId": feed, "subfeedHash": SUBFEED, "position": len(arrived), "channelName": CHANNEL}
                answer = client.post("/feed/watchForNewMessages", {"subfeedWatches": {"w": watch}, "waitMsec": 5000})
                for _ in answer.json()["messages"].get("w", []):
                    arrived.append(time.perf_counter())
                    ready.release()

        watcher = threading.Thread(target=follow)
        watcher.start()
        writer, sent = Client(servers.one), []
        for number in range(count + 1):
            # The next watch has to be there; the first message also waits for the subscription.
            time.sleep(0.02)
            sent.append(time.perf_counter())
            body = {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{"type": "bench", "number": number}]}
            if writer.post("/feed/appendMessages", body).status != 200 or not ready.acquire(timeout=30):
                raise RuntimeError(f"message {number} did not arrive: {servers.two.log[-2000:]}")
        watcher.join()
    found = [(end - begin) * 1000 for begin, end in zip(sent, arrived, strict=True)][1:]
    median, late = statistics.median(found), statistics.quantiles(found, n=20)[-1]
    yield Row("append on one node to delivery on another", f"p95 {late:.0f} ms", "", median, 50, "ms", at_most=True)


def trivial_task(place: Place) -> Iterator[Row]:
    """From `request_task` at one node to the result in the client's hands, of a function that does nothing, by
    kachery-client's own backend at another node; one task after another, with pauses of no fixed length between."""
    count = place.count(60)
    with federation(place) as servers, tempfile.TemporaryDirectory() as directory:
        backend = Backend(servers.one, CHANNEL, Path(directory) / "runs", "bench")
        try:
            _wait(lambda: "Registering task" in backend.log.read_text())
            time.sleep(2)
            tasks = [{"n": number} for number in range(-5, count)]
            found = answers(asking(servers.two, CHANNEL, "double.1", "pure-calculation", tasks, 30, pause=0.3), 600)
        finally:
            backend.kill()
    if any(one.get("status") != "finished" for one in found):
        raise RuntimeError(f"a task did not finish: {found}")
    took = [one["seconds"] * 1000 for one in found][5:]
    median, late = statistics.median(took), statistics.quantiles(took, n=20)[-1]
    yield Row("trivial task, request to result", f"p95 {late:.0f} ms", "", median, 150, "ms", at_most=True)
