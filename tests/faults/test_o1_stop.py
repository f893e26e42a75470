"""O1: SIGTERM under load. Requests that run are finished, the exit code is 0, nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from tests.faults.report import Client, report
from tests.faults.tools import SUBFEED, Ledger, append, create_feed, leftovers, restart, sha1_of, without
from tests.servers import RunningNode

WRITERS = 6
SLOW_UPLOADS = 4


@dataclass
class Load:
    """Writers that go on until they are refused, and uploads that are half sent when the signal comes."""

    node: RunningNode
    ledger: Ledger = field(default_factory=Ledger)
    broken: list[str] = field(default_factory=list)
    stopping: bool = False

    def write(self, number: int, feed_id: str) -> None:
        with contextlib.closing(Client(self.node, timeout=30)) as client:
            for count in range(100_000):
                data = os.urandom(3000)
                message = {"writer": number, "n": count}
                with self.ledger.lock:
                    self.ledger.unknown_messages.append(message)
                body = {"feedId": feed_id, "subfeedHash": SUBFEED, "messages": [message]}
                try:
                    stored = client.request("POST", "/store", data)
                    if stored.status != 200:
                        return
                    self.ledger.store(sha1_of(data), len(data))
                    appended = client.post("/feed/appendMessages", body)
                    if appended.status != 200:
                        return
                    self.ledger.append(feed_id, SUBFEED, appended.json()["position"], [message])
                except (OSError, http.client.HTTPException) as error:
                    # A new request may be refused once the server stops; before, nothing may break.
                    if not self.stopping:
                        self.broken.append(repr(error))
                    return

    def upload(self, began: threading.Barrier, go_on: threading.Event) -> None:
        """Half of the bytes before the signal, half after it."""
        data = os.urandom(2_000_000)
        try:
            with socket.create_connection(("127.0.0.1", self.node.port), timeout=30) as connection:
                head = f"POST /store HTTP/1.1\r\nHost: localhost\r\nKACHERY-CLIENT-AUTH-CODE: {self.node.code}\r\n"
                connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[:1_500_000])
                began.wait(20)
                go_on.wait(20)
                connection.sendall(data[1_500_000:])
                response = http.client.HTTPResponse(connection)
                response.begin()
                body = response.read()
                assert response.status == 200, body
                self.ledger.store(sha1_of(data), len(data))
        except (OSError, AssertionError, http.client.HTTPException) as error:
            self.broken.append(repr(error))


def stop_under_load(node: RunningNode) -> tuple[Load, int, float]:
    """(What happened, the exit code, seconds from the signal to the end)."""
    load = Load(node)
    feed_id = create_feed(node)
    assert append(node, feed_id, [{"n": "first"}]).status == 200
    load.ledger.append(feed_id, SUBFEED, 0, [{"n": "first"}])
    began, go_on = threading.Barrier(SLOW_UPLOADS + 1), threading.Event()
    threads = [threading.Thread(target=load.write, args=(number, feed_id)) for number in range(WRITERS)]
    threads += [threading.Thread(target=load.upload, args=(began, go_on)) for _ in range(SLOW_UPLOADS)]
    for thread in threads:
        thread.start()
    began.wait(20)
    time.sleep(0.3)
    load.stopping = True
    assert node.process is not None
    at = time.monotonic()
    node.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    go_on.set()
    code = node.process.wait(60)
    seconds = time.monotonic() - at
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return load, code, seconds


def test_sigterm_under_load(node: RunningNode) -> None:
    load, code, seconds = stop_under_load(node)
    assert load.broken == []
    assert code == 0
    assert seconds < 30
    assert load.ledger.acked > SLOW_UPLOADS + WRITERS
    assert leftovers(node.storage) == []
    restart(node)
    found = load.ledger.check(node)
    assert not found, found
    report(
        "O1 SIGTERM under load",
        1,
        acked=load.ledger.acked,
        lost=0,
        wrong=0,
        failed_requests=len(load.broken),
        stop_ms=round(seconds * 1000),
    )


def test_control_stop_at_once(make_node: Any) -> None:
    """A server that ends at the signal breaks running uploads and has another exit code: the row can fail."""
    load, code, _ = stop_under_load(make_node(prefix=without("stop_at_once")).start())
    report("O1 control: stop at once", 1, failed_requests=len(load.broken), exit_code=code)
    assert len(load.broken) == SLOW_UPLOADS
    assert code != 0
