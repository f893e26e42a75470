"""J3: depth, size and number of keys of JSON, which cost bounded time and memory."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.report import Client, histogram, report, with_every_right, without
from tests.servers import Answer, RunningNode

Make = Callable[..., RunningNode]


def memory(node: RunningNode, field: str) -> int:
    """Resident bytes of the server: VmRSS now, VmHWM at most so far."""
    assert node.process is not None
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def test_depth_is_capped_before_parsing(node: RunningNode) -> None:
    client = with_every_right(node)
    envelope = b'{"key":"k","value":%s}'
    assert client.post("/mutable/set", envelope % nested(63)).status == 200
    assert client.post("/mutable/set", envelope % nested(64)).status == 400
    slowest, trials = 0.0, 0
    for depth in (10, 64, 65, 100, 1000, 100_000, 1_000_000):
        for data in (nested(depth), b'{"a":' * depth + b"1" + b"}" * depth, b"[" * depth, b'[{"a":' * (depth // 2)):
            for route in ("/mutable/set", "/feed/appendMessages", "/api/admin/v1/tokens"):
                begun = time.monotonic()
                answer = client.post(route, envelope % data if len(data) > 200 else data)
                slowest = max(slowest, time.monotonic() - begun)
                trials += 1
                assert answer.status in (400, 413), (route, depth, answer.body)
    assert slowest < 20
    report("J3 depth", trials, slowest_ms=round(slowest * 1000), server_errors=0)


def cpu_seconds(node: RunningNode) -> float:
    """What the server has used so far."""
    assert node.process is not None
    fields = Path(f"/proc/{node.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def same_hash_keys(count: int) -> bytes:
    """Keys that a table without a secret would put into one place: their polynomial hash is one number."""
    pairs = (b"Aa", b"BB")
    keys = [b"".join(pairs[number >> bit & 1] for bit in range(20)) for number in range(count)]
    return b"{" + b",".join(b'"%b":1' % key for key in keys) + b"}"


def test_many_keys_and_large_bodies_take_bounded_time_and_memory(node: RunningNode) -> None:
    client = with_every_right(node)
    client.post("/mutable/set", {"key": "k", "value": 1})
    before = memory(node, "VmRSS")
    figures: dict[str, float] = {}
    cases = {
        "1e6 keys": b"{" + b",".join(b'"%d":%d' % (number, number) for number in range(1_000_000)) + b"}",
        "450,000 keys": b"{" + b",".join(b'"%d":%d' % (number, number) for number in range(450_000)) + b"}",
        "colliding keys": same_hash_keys(200_000),
        "1e6 numbers": b"[" + b",".join([b"0"] * 1_000_000) + b"]",
        "1e6 duplicate keys": b"{" + b",".join([b'"a":1'] * 1_000_000) + b"}",
        "20 MB of backslashes": b'"' + b"\\\\" * 10_000_000 + b'"',
        "20 MB of brackets in a string": b'"' + b"[{" * 10_000_000 + b'"',
        "20 MB of digits": b"1" * 20_000_000,
        "20 MB of spaces": b" " * 20_000_000 + b"1",
    }
    slowest_live = blocked = 0.0
    for name, value in cases.items():
        answers: list[Answer] = []
        begun = time.monotonic()
        sender = threading.Thread(
            target=lambda value=value, answers=answers: answers.append(
                client.post("/mutable/get", b'{"key":"k","junk":' + value + b"}")
            )
        )
        sender.start()
        while sender.is_alive():
            asked, used = time.monotonic(), cpu_seconds(node)
            assert node.request("GET", "/livez", auth=False).status == 200
            waited = time.monotonic() - asked
            slowest_live = max(slowest_live, waited)
            # Of a machine that others use as well, what the server itself did meanwhile is its part of the wait.
            blocked = max(blocked, min(waited, cpu_seconds(node) - used))
            sender.join(0.02)
        figures[name] = round(time.monotonic() - begun, 2)
        assert answers[0].status in (400, 413), (name, answers[0].body)
    growth = memory(node, "VmHWM") - before
    report(
        "J3 size",
        len(cases),
        seconds=figures,
        peak_growth_mb=growth >> 20,
        livez_ms=round(slowest_live * 1000),
        livez_own_ms=round(blocked * 1000),
    )
    assert max(figures.values()) < 60
    # A quarter of a second on an idle machine: the decoder does not let go of the interpreter within one object.
    assert blocked < 1
    # A decoded million of keys is about ten times its text; the text and one copy of it come on top.
    assert growth < 600 << 20


def test_a_value_of_20_mb_goes_in_and_out(node: RunningNode) -> None:
    client = with_every_right(node)
    value = {"text": "\u20ac" * 3_000_000, "list": list(range(1_500_000))}
    text = json.dumps({"key": "large", "value": value}, ensure_ascii=False).encode()
    assert len(text) > 20_000_000
    begun = time.monotonic()
    assert client.post("/mutable/set", text).json() == {"success": True}
    assert client.post("/mutable/get", {"key": "large"}).json()["value"] == value
    report("J3 20 MB", 1, bytes=len(text), seconds=round(time.monotonic() - begun, 2))


def declared(node: RunningNode, length: int, credential: bytes, *, path: bytes = b"/mutable/set") -> tuple[int, bytes]:
    """The answer to a request that declares a length and sends nothing of it."""
    with socket.create_connection(("127.0.0.1", node.port), timeout=10) as raw:
        raw.sendall(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
            % (path, credential, length)
        )
        answer = b""
        while (b"\r\n\r\n" not in answer or answer.endswith(b"\r\n\r\n")) and (piece := raw.recv(65536)):
            answer += piece
        return int(answer[9:12]), answer


def test_the_cap_comes_after_the_credential_and_before_the_body(make_node: Make) -> None:
    node = make_node(env={"KACHERY_LAB_MAX_JSON": "1000000"}).start()
    right = b"KACHERY-CLIENT-AUTH-CODE: %b\r\n" % node.code.encode()
    for path in (b"/mutable/set", b"/feed/appendMessages", b"/storeFile", b"/loadFile"):
        assert declared(node, 1_000_001, b"", path=path)[0] == 403
        assert declared(node, 1_000_001, b"KACHERY-CLIENT-AUTH-CODE: wrong\r\n", path=path)[0] == 403
        status, text = declared(node, 1_000_001, right, path=path)
        assert (status, b"KACHERY_LAB_MAX_JSON" in text) == (413, True)
    client = Client(node)
    body = b'{"key":"k","value":"' + b"x" * (1_000_000 - 22) + b'"}'
    assert len(body) == 1_000_000
    assert client.post("/mutable/set", body).status == 200
    assert client.post("/mutable/set", body.replace(b"xx", b"xxx", 1)).status == 413
    # Without a declared length the bytes are counted while they come.
    headers = {"Content-Type": "application/json"}
    pieces = [body[:400_000], body[400_000:], b" "]
    assert node.request("POST", "/mutable/set", iter(pieces[:2]), headers).status == 200
    assert node.request("POST", "/mutable/set", iter(pieces), headers).status == 413
    report("J3 cap", 12, server_errors=0)


def test_control_without_the_cap_depth_fails_the_server(make_node: Make) -> None:
    client = with_every_right(make_node(prefix=without("lenient_json")).start())
    status = client.post("/mutable/set", b'{"key":"k","value":%s}' % nested(100_000)).status
    report("J3 control lenient_json", 1, deep_status=status)
    assert status == 500


@pytest.mark.slow
def test_64_mb_of_json_from_four_clients_at_once(node: RunningNode) -> None:
    """The budget of all bodies together holds: the rest wait, and everybody is answered."""
    client = with_every_right(node)
    client.post("/mutable/set", {"key": "k", "value": 1})
    before = memory(node, "VmRSS")
    body = b'{"key":"k","junk":"' + os.urandom(1).hex().encode() * 32_000_000 + b'"}'
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(with_every_right(node).post("/mutable/get", body).status))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        begun = time.monotonic()
        assert node.request("GET", "/livez", auth=False).status == 200
        assert time.monotonic() - begun < 1
        time.sleep(0.05)
    growth = memory(node, "VmHWM") - before
    assert statuses == [400] * 4
    assert growth < 900 << 20
    report("J3 64 MB", 4, peak_growth_mb=growth >> 20, status_histogram=histogram(statuses))
