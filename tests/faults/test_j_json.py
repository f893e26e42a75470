"""J1, J2, J3: hostile JSON on every route that reads JSON."""

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

from tests.faults.report import Client, histogram, report, without
from tests.servers import Answer, RunningNode
from tests.third_party import shared_vectors

Make = Callable[..., RunningNode]
HEX40, HEX64 = "0" * 40, "a" * 64
ROUTES = [
    "/probe",
    "/storeFile",
    "/linkFile",
    "/loadFile",
    "/downloadFileData",
    "/feed/createFeed",
    "/feed/deleteFeed",
    "/feed/getFeedId",
    "/feed/getFeedInfo",
    "/feed/appendMessages",
    "/feed/getNumLocalMessages",
    "/feed/watchForNewMessages",
    "/mutable/get",
    "/mutable/set",
    "/mutable/delete",
    "/api/admin/v1/tokens",
    "/api/admin/v1/users",
    "/api/admin/v1/nodes",
    "/api/admin/v1/channels",
    "/uploadFile",
    "/createSignedFileUploadUrl",
    "/task/requestTask",
    "/task/waitForTaskResult",
    "/task/updateTaskStatus",
    "/task/registerTaskFunctions",
    "/task/createSignedTaskResultUploadUrl",
    "/api/admin/v1/clients",
    "/api/admin/v1/enrolment-codes",
]
POLICY = {"y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"}
"""Valid JSON that is refused all the same: nobody can say which of two equal keys was meant."""


def everything(node: RunningNode) -> Client:
    """Holds every right, so that no refusal is about rights."""
    return Client(node, {"Authorization": f"Bearer {node.admin_token}"})


def memory(node: RunningNode, field: str) -> int:
    """Resident bytes of the server: VmRSS now, VmHWM at most so far."""
    assert node.process is not None
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def refused_in_band(answer: Answer) -> bool:
    """`/loadFile` tells what is wrong with well-formed JSON inside a 200, as its client expects."""
    return answer.status == 200 and b'"type":"error"' in answer.body


def test_every_json_route_is_in_the_list() -> None:
    """A new route that takes POST joins this test or says here why not."""
    from kachery_lab.http import admin, v1
    from kachery_lab.http.protocols import daemon2021

    routes = [*daemon2021.routes(), *v1.routes(), *admin.routes()]
    posts = {route.path for route in routes if "POST" in (getattr(route, "methods", None) or ())}  # type: ignore[attr-defined]
    # Requests that a node signs are refused before their body is read as JSON; with a parameter in the path the object
    # has to exist first. What reads their bodies is the same.
    signed = {"/api/v1/nodes/report", "/api/v1/nodes/leases", "/api/v1/channels/{channel}/uploads"}
    inner = {path for path in posts if "{" in path}
    assert posts - inner == {*ROUTES, *signed - inner, "/store", "/api/admin/v1/reindex"}, "bytes; no body"


def test_the_parsing_suite_on_every_route(node: RunningNode) -> None:
    files = sorted(shared_vectors("json").glob("*.json"))
    assert len(files) == 318
    client = everything(node)
    begun = time.monotonic()
    statuses = []
    for path in files:
        data = path.read_bytes()
        for route in ROUTES:
            answer = client.post(route, data)
            statuses.append(answer.status)
            assert answer.status < 500, (path.name, route, answer.body)
            # An empty body is an empty object to the older daemon's clients, whatever its content type.
            if path.name.startswith("n_") and data:
                assert answer.status == 400, (path.name, route, answer.status, answer.body)
    assert client.post("/mutable/set", {"key": "k", "value": 1}).status == 200
    report(
        "J1 J2 raw",
        len(statuses),
        server_errors=0,
        status_histogram=histogram(statuses),
        seconds=round(time.monotonic() - begun, 1),
    )
    assert "Traceback" not in node.log


def test_the_parsing_suite_inside_a_value(node: RunningNode) -> None:
    """Each case as a mutable's value: what is accepted comes back as it was."""
    client = everything(node)
    accepted, refused = 0, 0
    for path in sorted(shared_vectors("json").glob("*.json")):
        data = path.read_bytes()
        answer = client.post("/mutable/set", b'{"key":"case","value":' + data + b"}")
        assert answer.status in (200, 400), (path.name, answer.status, answer.body)
        if path.name.startswith("n_"):
            assert answer.status == 400, path.name
        if path.name.startswith("y_"):
            wanted = 400 if path.name in POLICY or data.strip() == b"null" else 200
            assert answer.status == wanted, (path.name, answer.body)
        if answer.status == 200:
            accepted += 1
            found = client.post("/mutable/get", {"key": "case"}).json()
            assert found["value"] == json.loads(data), path.name
        else:
            refused += 1
    report("J1 J2 value", accepted + refused, accepted=accepted, refused=refused, server_errors=0)


HOSTILE = [
    b"NaN",
    b"-NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"-1e999",
    b"1" * 5000,
    b"-" + b"1" * 400,
    b"1" + b"0" * 400 + b".0",
    b"0e" + b"9" * 5000 + b"x",
    b'"\\ud800"',
    b'"\\udfff x"',
    b'"\\ud800\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\xed\xa0\x80"',
    b'"\xc0\x80"',
    b'"\xff"',
    b'"\x00"',
    b'"\x1f"',
    b'"\n"',
    b'"\\x00"',
    b'"\\u00"',
    b'{"a":1,"a":1}',
    b'{"a":1,"\\u0061":2}',
    b'[{"":1,"":2}]',
    b"'a'",
    b"[1,]",
    b"{1:2}",
    b"01",
    b"1.",
    b"+1",
    b"0x10",
    b"True",
    b"undefined",
    b"1//",
    b"1/**/",
]
SHAPES: dict[str, list[bytes]] = {
    "/mutable/set": [b'{"key":"k","value":%s}', b'{"key":%s,"value":1}', b'{"key":"k","value":{"deep":[%s]}}'],
    "/mutable/get": [b'{"key":%s}'],
    "/mutable/delete": [b'{"key":[%s]}'],
    "/feed/appendMessages": [
        b'{"feedId":"%b","subfeedHash":"%b","messages":[{"x":%%s}]}' % (HEX64.encode(), HEX40.encode()),
        b'{"feedId":"%b","subfeedHash":"%b","messages":[],"expectedPosition":%%s}' % (HEX64.encode(), HEX40.encode()),
        b'{"feedId":"%b","subfeedHash":"%b","messages":[],"requestId":%%s}' % (HEX64.encode(), HEX40.encode()),
    ],
    "/feed/createFeed": [b'{"feedName":%s}'],
    "/linkFile": [b'{"localFilePath":"/x","size":%s,"mtime":1}', b'{"localFilePath":"/x","size":1,"mtime":%s}'],
    "/storeFile": [b'{"localFilePath":%s}'],
    "/downloadFileData": [b'{"fileKey":{"sha1":%s}}', b'{"fileKey":%s}'],
    "/loadFile": [b'{"fileKey":{"sha1":%s}}'],
    "/api/admin/v1/tokens": [b'{"user":%s,"scopes":["read"]}', b'{"user":"u","scopes":["read"],"expiresAt":%s}'],
}


def test_what_is_no_i_json_is_400_wherever_it_stands(node: RunningNode) -> None:
    client = everything(node)
    statuses = []
    for route, shapes in SHAPES.items():
        for shape in shapes:
            for value in HOSTILE:
                answer = client.post(route, shape % value)
                statuses.append(answer.status)
                assert answer.status == 400, (route, shape, value[:40], answer.status, answer.body)
        for data in (
            b"\xef\xbb\xbf{}",
            '{"key":"k"}'.encode("utf-16"),
            '{"key":"k"}'.encode("utf-32-be"),
            b"\x00",
            b"{}\x00",
        ):
            answer = client.post(route, data)
            statuses.append(answer.status)
            assert answer.status == 400, (route, data)
    # The paired success, with what is odd and allowed.
    for value in (
        b"1e2",
        b"-0",
        b"1" * 309,
        b'"\\u0000"',
        b'"\\ud83d\\ude00"',
        b'{"__proto__":1}',
        b"9007199254740993",
    ):
        answer = client.post("/mutable/set", b'{"key":"k","value":%s}' % value)
        assert (answer.status, answer.json()) == (200, {"success": True}), value
        assert client.post("/mutable/get", {"key": "k"}).json()["value"] == json.loads(value)
    report("J2", len(statuses), server_errors=0, status_histogram=histogram(statuses))


EXTREME_NUMBERS = [
    *(b"1" * 309, b"9" * 309, b"-" + b"9" * 309, b"9" * 308),
    *(b"1e308", b"-1e308", b"1e-400", b"18446744073709551616", b"-1", b"0.5"),
]


def test_numbers_at_the_edge_of_a_double_never_fail_the_server(make_node: Make) -> None:
    """Well-formed numbers in every numeric field: refused or used, never a failure of the server."""
    node = make_node().start()
    client = everything(node)
    linked = node.metadata.parent / "linked"
    linked.write_bytes(b"x")
    path = json.dumps(str(linked)).encode()
    feed = client.post("/feed/createFeed", {}).json()["feedId"].encode()
    watch = (
        b'{"subfeedWatches":{"w":{"feedId":"%b","subfeedHash":"%b","position":%%s,"channelName":"chan"}},"waitMsec":0}'
    )
    shapes = [
        ("/linkFile", b'{"localFilePath":%b,"size":1,"mtime":%%s}' % path),
        ("/linkFile", b'{"localFilePath":%b,"size":%%s,"mtime":1}' % path),
        ("/downloadFileData", b'{"fileKey":{"sha1":"%b"},"startByte":%%s,"endByte":%%s}' % HEX40.encode()),
        (
            "/downloadFileData",
            b'{"fileKey":{"sha1":"%b","chunkOf":{"fileKey":{"sha1":"%b"},"startByte":0,"endByte":%%s}}}'
            % (HEX40.encode(), HEX40.encode()),
        ),
        ("/feed/watchForNewMessages", watch % (feed, HEX40.encode())),
        ("/feed/watchForNewMessages", b'{"subfeedWatches":{},"waitMsec":0,"maxNumMessages":%s}'),
        (
            "/feed/appendMessages",
            b'{"feedId":"%b","subfeedHash":"%b","messages":[],"expectedPosition":%%s}' % (feed, HEX40.encode()),
        ),
        ("/feed/appendMessages", b'{"feedId":"%b","subfeedHash":"%b","messages":[{"n":%%s}]}' % (feed, HEX40.encode())),
        ("/mutable/set", b'{"key":%s,"value":1}'),
        ("/mutable/set", b'{"key":"k","value":[%s]}'),
        ("/api/admin/v1/tokens", b'{"user":"u","scopes":["read"],"expiresAt":%s}'),
    ]
    statuses = []
    for route, shape in shapes:
        for number in EXTREME_NUMBERS:
            answer = client.post(route, shape.replace(b"%s", number))
            statuses.append(answer.status)
            assert answer.status < 500, (route, shape, number, answer.body)
    # A watch that waits may wait for a bounded time only; the number alone must not fail it.
    for number in EXTREME_NUMBERS:
        with socket.create_connection(("127.0.0.1", node.port), timeout=10) as raw:
            body = (watch % (feed, b"7" * 40) % b"0").replace(b'"waitMsec":0', b'"waitMsec":' + number)
            raw.sendall(
                b"POST /feed/watchForNewMessages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer %b\r\nContent-Length: %d\r\n\r\n"
                % (node.admin_token.encode(), len(body))
                + body
            )
            raw.settimeout(0.3)
            try:
                answered = raw.recv(100)
                assert answered.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400")), (number, answered)
            except TimeoutError:
                pass
    assert node.run_cli("token", "list").returncode == 0
    node.terminate()
    node.start()
    assert "Traceback" not in node.log
    report("J1 numbers", len(statuses), server_errors=0, status_histogram=histogram(statuses))


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def test_depth_is_capped_before_parsing(node: RunningNode) -> None:
    client = everything(node)
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
    client = everything(node)
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
    client = everything(node)
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


def test_control_the_standard_decoder_lets_it_all_through(make_node: Make) -> None:
    node = make_node(prefix=without("lenient_json")).start()
    client = everything(node)
    wrong = sum(client.post("/mutable/set", b'{"key":"k","value":%s}' % value).status != 400 for value in HOSTILE)
    deep = client.post("/mutable/set", b'{"key":"k","value":%s}' % nested(100_000)).status
    assert wrong >= 8 and deep == 500, (wrong, deep)
    report("J control lenient_json", len(HOSTILE) + 1, not_refused=wrong, deep_status=deep)


@pytest.mark.slow
def test_64_mb_of_json_from_four_clients_at_once(node: RunningNode) -> None:
    """The budget of all bodies together holds: the rest wait, and everybody is answered."""
    client = everything(node)
    client.post("/mutable/set", {"key": "k", "value": 1})
    before = memory(node, "VmRSS")
    body = b'{"key":"k","junk":"' + os.urandom(1).hex().encode() * 32_000_000 + b'"}'
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(everything(node).post("/mutable/get", body).status))
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
