"""Members of channels for the bench: one process that holds many WebSockets, publishes at a steady rate and counts what
comes. Messages are signed before; frames are written and read by hand, so that the hub is what is measured.

`python -m tests.bench.load_bands` reads a job as JSON from standard input and writes what it found to standard output.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import secrets
import statistics
import struct
import subprocess
import sys
import time
from typing import Any

import uvloop

from kachery_lab.core.band_messages import sign_message
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.signables import request_bytes

TARGET = "/api/v1/bands"
BAND = "requestFiles"
TIMEOUT = 300
SETTLE_SECONDS = 3.0
_NAME = re.compile(r'"sha1":"([0-9a-f]{40})"')


def run(**job: Any) -> Any:
    """Do a job in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(job).encode(), stdout=subprocess.PIPE, timeout=TIMEOUT
    )
    if done.returncode:
        raise RuntimeError(f"the load generator ended with {done.returncode}")
    return json.loads(done.stdout)


def _frame(text: str) -> bytes:
    """A masked text frame; the mask is zero, which changes nothing."""
    data = text.encode()
    if len(data) < 126:
        return bytes([0x81, 0x80 | len(data)]) + bytes(4) + data
    assert len(data) < 65536
    return b"\x81\xfe" + struct.pack(">H", len(data)) + bytes(4) + data


class Load:
    """What all members send and hear. Times in seconds."""

    def __init__(self, members: int, each: int) -> None:
        self.sent = [[0.0] * each for _ in range(members)]
        self.heard = [[0] * each for _ in range(members)]
        self.delays: list[float] = []
        self.refused: list[str] = []
        self.numbers: dict[str, tuple[int, int]] = {}


class Member(asyncio.Protocol):
    """One node's connection."""

    def __init__(self, load: Load, number: int, seed: str, channel: str, job: dict[str, Any]) -> None:
        self._load = load
        self._number = number
        self._key = PrivateKey.from_seed(seed)
        self._channel = channel
        self._job = job
        self._data = bytearray()
        self._upgraded = False
        self.ready = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport
        self.frames = [self._publication(each) for each in range(job["each"])]

    def _publication(self, each: int) -> bytes:
        name = hashlib.sha1(f"{self._number} {each}".encode()).hexdigest()
        self._load.numbers[name] = (self._number, each)
        message = sign_message(self._key, {"type": "requestFile", "fileKey": {"sha1": name}})
        head = {"type": "publish", "id": each, "channel": self._channel, "band": BAND}
        return _frame(f'[{json.dumps(head)[:-1]},"messages":[{message.text}]}}]')

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        at, nonce, node_id = int(time.time()), secrets.token_hex(8), self._key.public_hex
        signed = request_bytes("GET", TARGET, hashlib.sha256(b"").hexdigest(), at, nonce, node_id, self._job["hub_id"])
        lines = [
            f"GET {TARGET} HTTP/1.1",
            f"Host: 127.0.0.1:{self._job['port']}",
            *("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"),
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
            f"Kachery-Node: v1 {node_id} {at} {nonce} {self._key.sign(signed).hex()}",
        ]
        self.transport.write(("\r\n".join(lines) + "\r\n\r\n").encode())

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._data += data
        if not self._upgraded:
            head, mark, rest = bytes(self._data).partition(b"\r\n\r\n")
            if not mark:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.ready.set_exception(RuntimeError(f"{head[:200]!r} {rest[:500]!r}"))
                return
            self._upgraded, self._data = True, bytearray(rest)
            asked = {"type": "subscribe", "id": 0, "channel": self._channel, "band": BAND}
            self.transport.write(_frame(json.dumps([asked])))
        while (frame := self._next()) is not None:
            self._take(frame, now)

    def _next(self) -> str | None:
        data = self._data
        if len(data) < 2:
            return None
        size, begin = data[1], 2
        if size == 126:
            size, begin = int.from_bytes(data[2:4], "big"), 4
        elif size == 127:
            size, begin = int.from_bytes(data[2:10], "big"), 10
        if len(data) < begin + size or (begin > 2 and len(data) < begin):
            return None
        kind, payload = data[0] & 15, bytes(data[begin : begin + size])
        del data[: begin + size]
        if kind == 9:
            self.transport.write(b"\x8a" + bytes([0x80 | size]) + bytes(4) + payload)
            return ""
        if kind == 8:
            self._load.refused.append(f"closed: {payload[2:]!r}")
            return ""
        return payload.decode()

    def _take(self, frame: str, now: float) -> None:
        if '"type":"error"' in frame:
            self._load.refused.append(frame[:500])
        if not self.ready.done() and '{"type":"done","id":0}' in frame:
            self.ready.set_result(None)
        for found in _NAME.findall(frame):
            number, each = self._load.numbers[found]
            self._load.heard[number][each] += 1
            self._load.delays.append(now - self._load.sent[number][each])

    def send(self, each: int) -> None:
        self._load.sent[self._number][each] = time.monotonic()
        self.transport.write(self.frames[each])

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(RuntimeError(f"the connection ended: {error}"))


async def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Members in channels of equal size, each sending `each` messages at `rate` per second, spread evenly."""
    loop = asyncio.get_running_loop()
    seeds, channels, each, rate = job["seeds"], job["channels"], job["each"], job["rate"]
    size = len(seeds) // len(channels)
    load = Load(len(seeds), each)
    members = [Member(load, number, seed, channels[number // size], job) for number, seed in enumerate(seeds)]
    for member in members:
        await loop.create_connection(lambda one=member: one, "127.0.0.1", job["port"])  # type: ignore[misc]
        await member.ready
    begun = time.monotonic() + 0.5
    gap = 1 / rate / len(members)
    late = 0.0
    for turn in range(each * len(members)):
        at = begun + turn * gap
        if (wait := at - time.monotonic()) > 0.001:
            await asyncio.sleep(wait)
        late = max(late, -wait)
        members[turn % len(members)].send(turn // len(members))
        if wait < -0.002 and turn % 20 == 0:
            # Behind its times: what has come is read all the same.
            await asyncio.sleep(0)
    seconds = time.monotonic() - begun
    expected = each * len(members) * size
    until = time.monotonic() + SETTLE_SECONDS
    while len(load.delays) < expected and time.monotonic() < until:
        await asyncio.sleep(0.05)
    for member in members:
        member.transport.abort()
    wrong = sum(abs(count - size) for row in load.heard for count in row)
    delays = sorted(load.delays) or [float("inf")]
    return {
        "expected": expected,
        "wrong": wrong,
        "seconds": seconds,
        "late": late,
        "refused": load.refused[:3],
        "median": statistics.median(delays),
        "p99": delays[int(len(delays) * 0.99)],
    }


if __name__ == "__main__":
    given = json.loads(sys.stdin.buffer.read())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(measure(given))
    sys.stdout.write(json.dumps(found))
