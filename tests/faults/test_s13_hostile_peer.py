"""S13, bands: a member that storms, sends garbage, or does not read. Nobody else notices, memory stays, and no message
becomes more than one for each listener."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.bands import CHANNEL, TARGET, Member, connected
from tests.faults.report import report, without
from tests.servers import RunningNode

pytestmark = pytest.mark.slow

MIB = 1 << 20


class Hub:
    """A server with one channel."""

    def __init__(self, node: RunningNode) -> None:
        self.node = node
        self.id = (node.storage / "kachery-node-id").read_text()
        self.admin("POST", "/channels", {"name": CHANNEL, "owner": "admin"})

    def admin(self, method: str, path: str, body: Any) -> None:
        headers = {"Content-Type": "application/json"}
        answer = self.node.request(
            method, f"/api/admin/v1{path}", json.dumps(body), headers, auth=self.node.admin_token
        )
        assert answer.status < 300, answer

    def member(self, *roles: str) -> Member:
        found = Member()
        self.admin("POST", "/nodes", {"nodeId": found.id, "label": "rig", "owner": "admin"})
        self.admin("PUT", f"/channels/{CHANNEL}/memberships/{found.id}", {})
        self.grant(found, *roles)
        return found

    def grant(self, member: Member, *roles: str) -> None:
        path = f"/channels/{CHANNEL}/authorizations/node/{member.id}"
        self.admin("PUT", path, {"roles": list(roles) or ["all"]})

    def line(self, member: Member, **how: Any) -> Any:
        return connected(self.node.port, self.id, member, **how)

    def raw(self, member: Member) -> socket.socket:
        """A bare socket behind the upgrade."""
        found = socket.create_connection(("127.0.0.1", self.node.port), timeout=10)
        head = "".join(f"{name}: {value}\r\n" for name, value in member.header(self.id).items())
        found.sendall(
            f"GET {TARGET} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{head}\r\n".encode()
        )
        assert found.recv(12) == b"HTTP/1.1 101"
        return found

    def memory(self, name: str = "VmRSS") -> int:
        assert self.node.process is not None
        children = Path(f"/proc/{self.node.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in children if line.startswith(f"{name}:")) * 1024


def frame(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    """A masked frame with a mask of zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes([opcode | (0x80 if final else 0)]) + length + bytes(4) + payload


class Watcher(threading.Thread):
    """An honest pair: one publishes now and then, the other measures how long that takes."""

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self._hub = hub
        self._members = hub.member(), hub.member()
        self._over = threading.Event()
        self.delays: list[float] = []

    def run(self) -> None:
        speaker, listener = self._members
        with self._hub.line(speaker) as mine, self._hub.line(listener) as theirs:
            theirs.subscribe("provideFeeds")
            while not self._over.is_set():
                began = time.monotonic()
                assert mine.publish("provideFeeds", speaker.signed("provideFeeds")) == "done"
                theirs.next("message", 20)
                self.delays.append(time.monotonic() - began)
                time.sleep(0.02)

    def stop(self) -> float:
        """The worst delay in seconds."""
        self._over.set()
        self.join(60)
        assert not self.is_alive() and self.delays
        return max(self.delays)


STORM = 10_000


def storm(hub: Hub) -> tuple[float, int, int]:
    """(Seconds until the hub had taken STORM messages of one member that sends all it can, what a listener got of
    them, errors)."""
    stormy, listener = hub.member(), hub.member()
    heard = done = errors = 0
    with hub.line(stormy, max_queue=None) as mine, hub.line(listener, max_queue=None) as theirs:
        theirs.subscribe("requestFiles")
        message = json.loads(stormy.signed("requestFiles").text)
        one = {"type": "publish", "channel": CHANNEL, "band": "requestFiles", "messages": [message] * 10}
        frames = [json.dumps([{**one, "id": start + n} for n in range(10)]) for start in range(0, STORM // 10, 10)]
        began = time.monotonic()
        sender = threading.Thread(target=lambda: [mine.socket.send(text) for text in frames])
        sender.start()
        while done + errors < STORM // 10:
            assert mine.read(20)
            done += sum(item["type"] == "done" for item in mine.came)
            errors += sum(item["type"] == "error" for item in mine.came)
            mine.came.clear()
        seconds = time.monotonic() - began
        sender.join(20)
        heard = len(theirs.messages(1))
    return seconds, heard, errors


def test_a_storm_is_slowed_down_and_not_amplified(make_node: Callable[..., RunningNode]) -> None:
    hub = Hub(make_node().start())
    watcher = Watcher(hub)
    watcher.start()
    before = hub.memory()
    seconds, heard, errors = storm(hub)
    worst, grown = watcher.stop(), hub.memory() - before
    report(
        "S13 bands: message storm",
        1,
        sent=STORM,
        heard=heard,
        amplification=round(heard / STORM, 3),
        per_second=round(STORM / seconds),
        others_worst_ms=round(worst * 1000),
        memory_mib=round(grown / MIB, 1),
    )
    assert (heard, errors) == (STORM, 0), "once each: late, not lost"
    assert seconds > (STORM - 2000) / 500 - 0.5
    assert worst < 3
    assert grown < 60 * MIB


def test_control_without_a_quota(make_node: Callable[..., RunningNode]) -> None:
    hub = Hub(make_node(prefix=without("no_publish_quota")).start())
    seconds, heard, _ = storm(hub)
    report("S13 bands control: no quota", 1, sent=STORM, heard=heard, per_second=round(STORM / seconds))
    assert seconds < (STORM - 2000) / 500 - 0.5


def test_garbage(make_node: Callable[..., RunningNode]) -> None:
    """Random bytes, odd frames and odd objects: the connection ends or an error comes; the server has no failure."""
    hub = Hub(make_node().start())
    watcher = Watcher(hub)
    watcher.start()
    member, generator = hub.member(), random.Random(1)
    good = json.dumps([{"type": "subscribe", "id": 1, "channel": CHANNEL, "band": "requestFiles"}])
    ended = 0
    for trial in range(150):
        text = bytearray(good.encode())
        for _ in range(generator.randint(1, 8)):
            text[generator.randrange(len(text))] = generator.randrange(256)
        data = [
            generator.randbytes(200),
            frame(1, bytes(text)),
            frame(2, b"[]"),
            frame(1, b'{"a":' * 5000),
            frame(generator.randrange(16), generator.randbytes(100), final=False),
            frame(8, b"\x03\xe8" + b"\xff" * 20),
        ][trial % 6]
        with hub.raw(member) as raw:
            raw.sendall(data)
            raw.settimeout(0.3)
            with suppress(OSError):
                while raw.recv(65536):
                    pass
                ended += 1
    worst = watcher.stop()
    failures = [line for line in hub.node.log.splitlines() if "Traceback" in line or '"level": "error"' in line]
    report("S13 bands: garbage", 150, ended=ended, failures=len(failures), others_worst_ms=round(worst * 1000))
    assert failures == []
    assert ended > 50
    assert worst < 3
    with hub.line(member) as found:
        found.subscribe("requestFiles")


def unread(hub: Hub, seconds: float) -> tuple[int, bool]:
    """(Bytes that the server holds more, whether the reader was cut off) for a member that listens and never reads."""
    speakers = [hub.member() for _ in range(4)]
    deaf = hub.member()
    raw = hub.raw(deaf)
    raw.sendall(
        frame(1, json.dumps([{"type": "subscribe", "id": 1, "channel": CHANNEL, "band": "requestTasks"}]).encode())
    )
    raw.recv(100)
    before = hub.memory()

    def speak(member: Member) -> None:
        big = json.loads(member.signed("requestTasks", taskFunctionIds=["f" * 390] * 150).text)
        with hub.line(member) as mine:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                assert mine.publish("requestTasks", big) == "done"

    threads = [threading.Thread(target=speak, args=(member,)) for member in speakers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    grown = hub.memory() - before
    cut = "slow_reader" in _rest(raw)
    raw.close()
    return grown, cut


def _rest(raw: socket.socket) -> str:
    found = b""
    raw.settimeout(2)
    with suppress(OSError):
        while piece := raw.recv(1 << 20):
            found = (found + piece)[-1000:]
        return found.decode(errors="replace") + " slow_reader"
    return ""


def test_a_member_that_does_not_read(make_node: Callable[..., RunningNode]) -> None:
    hub = Hub(make_node().start())
    watcher = Watcher(hub)
    watcher.start()
    grown, cut = unread(hub, 6)
    worst = watcher.stop()
    report("S13 bands: never reads", 1, memory_mib=round(grown / MIB, 1), cut=cut, others_worst_ms=round(worst * 1000))
    assert cut
    assert grown < 40 * MIB
    assert worst < 3


def test_control_endless_queues(make_node: Callable[..., RunningNode]) -> None:
    hub = Hub(make_node(prefix=without("endless_queues")).start())
    grown, cut = unread(hub, 6)
    report("S13 bands control: endless queues", 1, memory_mib=round(grown / MIB, 1), cut=cut)
    assert not cut


def flood(hub: Hub) -> tuple[int, int]:
    """(Bytes of pings that were taken, bytes that the server holds more) for a peer that pings and never reads."""
    raw = hub.raw(hub.member())
    before = hub.memory()
    raw.settimeout(2)
    piece, sent = frame(9, b"x" * 125) * 500, 0
    with suppress(OSError):
        while sent < 60 * MIB:
            sent += raw.send(piece)
    grown = hub.memory() - before
    raw.close()
    return sent, grown


def test_pings_without_end(make_node: Callable[..., RunningNode]) -> None:
    hub = Hub(make_node().start())
    sent, grown = flood(hub)
    report("S13 bands: pings", 1, taken_mib=round(sent / MIB, 1), memory_mib=round(grown / MIB, 1))
    assert grown < 20 * MIB
    assert sent < 30 * MIB


def test_control_plain_websockets(make_node: Callable[..., RunningNode]) -> None:
    hub = Hub(make_node(prefix=without("plain_websockets")).start())
    sent, grown = flood(hub)
    report("S13 bands control: uvicorn's own", 1, taken_mib=round(sent / MIB, 1), memory_mib=round(grown / MIB, 1))
    assert grown > 30 * MIB or sent > 50 * MIB
