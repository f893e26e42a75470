"""S13 for the provider's protocol: a member that floods, and one that does not read; others do not notice."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from websockets.sync.client import connect

from kachery_lab.core import rates
from kachery_lab.services import member_connections
from tests.faults.report import report
from tests.hubs import Hub, LabNode
from tests.members2021 import MESSAGE, Closed, Wire, joined, payload, request_file, token_details

pytestmark = pytest.mark.slow

CHANNEL = "lab"
NAME = f"{CHANNEL}-requestTasks"
FLOOD_SECONDS = 4.0


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path) as running:
        running.make_channel(CHANNEL)
        yield running


def member(hub: Hub) -> LabNode:
    node = LabNode()
    hub.register(node)
    hub.join(node, CHANNEL)
    return node


# -- flood ---------------------------------------------------------------------------------------------------------


def drain(wire: Wire, counts: dict[str, int], name: str) -> threading.Thread:
    """Read all, and count messages."""

    def read() -> None:
        try:
            while True:
                counts[name] += wire.receive(60)["action"] == MESSAGE
        except (Closed, TimeoutError):
            return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


def flood(hub: Hub) -> tuple[int, float, list[float]]:
    """(Messages that a listener got, seconds, round trips of a bystander on another band)."""
    hostile, listener, bystander = member(hub), member(hub), member(hub)
    counts = {"listener": 0, "hostile": 0}
    data = payload(hostile, {"type": "probeTaskFunctions", "taskFunctionIds": []})
    with (
        joined(hub, hostile, CHANNEL, "msgpack") as loud,
        joined(hub, listener, CHANNEL, "msgpack") as hears,
        joined(hub, bystander, CHANNEL, "msgpack") as quiet,
    ):
        hears.attach(NAME)
        drain(hears, counts, "listener")
        drain(loud, counts, "hostile")
        stop = threading.Event()

        def shout() -> None:
            while not stop.is_set():
                try:
                    loud.send_message(NAME, data)
                except Exception:  # the connection was ended under it
                    return

        shouting = threading.Thread(target=shout, daemon=True)
        begun = time.monotonic()
        shouting.start()
        trips = []
        while time.monotonic() - begun < FLOOD_SECONDS:
            sent = time.monotonic()
            quiet.publish(f"{CHANNEL}-requestFiles", request_file(bystander, "0" * 40))
            trips.append(time.monotonic() - sent)
            time.sleep(0.05)
        heard, seconds = counts["listener"], time.monotonic() - begun
        stop.set()
        loud.socket.socket.shutdown(socket.SHUT_RDWR)
        shouting.join(10)
    return heard, seconds, trips


def allowed(seconds: float) -> float:
    return member_connections.PUBLISH_BURST + member_connections.PUBLISH_RATE * seconds


@pytest.fixture
def quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than this process can send to itself, whatever else the machine does."""
    monkeypatch.setattr(member_connections, "PUBLISH_RATE", 100.0)
    monkeypatch.setattr(member_connections, "PUBLISH_BURST", 200.0)


@pytest.mark.usefixtures("quota")
def test_a_flood_is_slowed_down(hub: Hub) -> None:
    heard, seconds, trips = flood(hub)
    median = statistics.median(trips)
    report("S13 ably flood", heard, allowed=int(allowed(seconds)), median_ms=round(median * 1000, 1))
    assert member_connections.PUBLISH_BURST / 2 < heard <= 1.1 * allowed(seconds)
    assert median < 0.25


@pytest.mark.usefixtures("quota")
def test_without_the_quota_it_is_not(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control."""
    monkeypatch.setattr(rates.Allowance, "take", lambda _self, _amount, _now: 0.0)
    heard, seconds, _ = flood(hub)
    report("S13 ably flood control", heard, allowed=int(allowed(seconds)))
    assert heard > 1.5 * allowed(seconds)


# -- a member that does not read -----------------------------------------------------------------------------------


def unread(hub: Hub) -> tuple[int, int, bool]:
    """(Messages that a good reader got, most bytes that waited for the bad one, whether it was cut off)."""
    publisher, reader, deaf = member(hub), member(hub), member(hub)
    data = payload(
        publisher,
        {
            "type": "requestTask",
            "backendId": None,
            "taskId": "t",
            "taskFunctionId": "f.1",
            "taskFunctionType": "query",
            "taskKwargs": {"a": "x" * 60_000},
        },
    )
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", hub.port))
    token = quote(token_details(hub, deaf, CHANNEL)["token"], safe="")
    sent, most, counts = 200, 0, {"reader": 0}
    with (
        connect(f"ws://127.0.0.1/?access_token={token}", sock=sock, compression=None, close_timeout=1) as silent,
        joined(hub, publisher, CHANNEL, "msgpack") as speaks,
        joined(hub, reader, CHANNEL, "msgpack") as hears,
    ):
        silent.recv()
        silent.send(f'{{"action":10,"channel":"{NAME}"}}')
        silent.recv()
        (held,) = [one for one in hub.node.hub_bands.connections if one.node_id == deaf.id]
        hears.attach(NAME)
        reading = drain(hears, counts, "reader")
        for _ in range(sent):
            speaks.publish(NAME, data)
            most = max(most, held.queued_bytes)
        until = time.monotonic() + 10
        while counts["reader"] < sent and time.monotonic() < until:
            time.sleep(0.05)
        cut = held.end is not None and held.end.code == "slow_reader"
        hears.socket.socket.shutdown(socket.SHUT_RDWR)
        reading.join(10)
        sock.close()
    return counts["reader"], most, cut


def test_a_member_that_does_not_read_is_cut_off(hub: Hub) -> None:
    heard, most, cut = unread(hub)
    report("S13 ably reader", 200, heard=heard, most_waiting_bytes=most, cut=cut)
    assert (heard, cut) == (200, True)
    assert most <= member_connections.MAX_QUEUED_BYTES


def test_without_the_bound_it_is_not(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: what it does not read is kept."""
    monkeypatch.setattr(member_connections, "MAX_QUEUED_BYTES", 1 << 40)
    heard, most, cut = unread(hub)
    report("S13 ably reader control", 200, heard=heard, most_waiting_bytes=most, cut=cut)
    assert (heard, cut) == (200, False)
    assert most > 4 << 20
