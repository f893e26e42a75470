"""J1, J2: what is no I-JSON, on every route that reads JSON."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

from tests.faults.report import histogram, report, with_every_right, without
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
    client = with_every_right(node)
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
    client = with_every_right(node)
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
    client = with_every_right(node)
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
    client = with_every_right(node)
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


def test_control_the_standard_decoder_lets_it_all_through(make_node: Make) -> None:
    client = with_every_right(make_node(prefix=without("lenient_json")).start())
    wrong = sum(client.post("/mutable/set", b'{"key":"k","value":%s}' % value).status != 400 for value in HOSTILE)
    report("J1 J2 control lenient_json", len(HOSTILE), not_refused=wrong)
    assert wrong >= 8
