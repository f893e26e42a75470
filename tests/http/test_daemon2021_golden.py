"""What the older daemon answered, replayed against a real server: the same, or a deviation that is listed here.

`http_exchanges.json` was recorded with the daemon driven directly, `client_http_exchanges.json` with kachery-client.
A recorded result must be the same result. A recorded failure must be a failure of the caller's (4xx): the client only
distinguishes 200 from everything else, and 5xx is for this server's own failures. Every exchange is compared, deviates
on purpose (DEVIATIONS), or belongs to parts that are not here (ELSEWHERE); a test counts them.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.feeds import accept_chain, parse_signed_message
from kachery_lab.core.ids import FeedId
from tests.servers import Answer, RunningNode

VECTORS = Path(__file__).parents[1] / "vectors"
DIRECT = json.loads((VECTORS / "http_exchanges.json").read_text("utf-8"))["exchanges"]
BY_CLIENT = json.loads((VECTORS / "client_http_exchanges.json").read_text("utf-8"))["exchanges"]
RECORDED_NODE = "4990ef7f04f99a71a5b7d416da4c210a0f2da327c4fec2a5320768340ddd90d7"
ERROR = "<error text>"
SUBFEED = "48ba2d64d76ed2b86aec79263f599aa3484c4789"

FILES = {
    "hello.txt": (b"Hello, world!", 1795343856.8023307),
    "empty.bin": (b"", None),
    "link.txt": (b"linked content 1\n", 1795343865.1474805),
    # The recording does not say what was in it.
    "lk5.txt": (b"client linked\n", 1795344830.0658069),
}


@dataclass(frozen=True)
class Deviation:
    """What this server answers instead, and why. `body`: bytes, JSON, a check, or None for a refusal."""

    reason: str
    status: int
    body: Any = None


def frames_of(body: bytes) -> list[Any]:
    """The messages of json-socket framing; whatever is left over or cut short fails."""
    found = []
    while body:
        length, sign, rest = body.partition(b"#")
        assert sign and length.isdigit(), body[:40]
        assert len(rest) >= int(length)
        found.append(json.loads(rest[: int(length)]))
        body = rest[int(length) :]
    return found


def one_error_frame(body: bytes) -> None:
    (message,) = frames_of(body)
    assert set(message) == {"type", "error"}
    assert message["type"] == "error"
    assert message["error"]


def a_self_contained_page(body: bytes) -> None:
    assert b"totalBytesSent" in body
    assert b"<script" not in body
    assert b"http" not in body


def a_task(answer: bytes, task_id: str, task_hash: str | None = None) -> None:
    """A task that waits. Ids are random where the recorded ones are; the result lies in this server's own bucket."""
    found = json.loads(answer)
    assert list(found) == ["success", "taskId", "status"] + (["taskResultUrl"] if task_hash else [])
    assert (found["success"], found["status"]) == (True, "waiting")
    assert re.fullmatch(task_id, found["taskId"])
    if task_hash is not None:
        shard = f"{task_hash[:2]}/{task_hash[2:4]}/{task_hash[4:6]}"
        path = rf"http://127\.0\.0\.1:\d+/bucket/~[^/]+/testchan/task_results/{shard}/{task_hash}"
        assert re.fullmatch(path, found["taskResultUrl"])


def a_result_upload(answer: bytes) -> None:
    found = json.loads(answer)
    assert list(found) == ["success", "signedUrl"]
    assert found["success"] is True
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/bucket/upload/[^/]+", found["signedUrl"])


def stored(sha1: str) -> dict[str, Any]:
    return {"success": True, "error": None, "sha1": sha1, "manifestSha1": None}


GONE = "a deleted feed is gone, with its messages and its name"
ADD = "fd7ff95b5b0e8e225b373bf9f0fde6d82b24bc1f"
EMPTY_SHA1 = hashlib.sha1().hexdigest()
DEVIATIONS = {
    "unknown-get": Deviation("a known path with another method is 405, which names the methods there are", 405),
    "stats-html": Deviation("the page loads nothing from elsewhere", 200, a_self_contained_page),
    "storeFile-empty": Deviation("an empty file is a file", 200, stored(EMPTY_SHA1)),
    "store-lost-race": Deviation(
        "nothing has its final name before it is complete",
        200,
        stored(hashlib.sha1(b"a few dozen bytes not stored before").hexdigest()),
    ),
    "store-json-ctype": Deviation(
        "a body is bytes, whatever its content type", 200, stored(hashlib.sha1(b'{"a":1}').hexdigest())
    ),
    "loadFile-chunkOf-local-only-part": Deviation(
        "a chunk is cut out of its file and must have its SHA-1; what is refused makes no progress",
        200,
        one_error_frame,
    ),
    "downloadFileData-empty-range": Deviation("an empty range is a range", 200, b""),
    "downloadFileData-zero-zero": Deviation("an empty range is a range", 200, b""),
    "downloadFileData-emptyfile": Deviation("an empty file is a file", 200, b""),
    "downloadFileData-chunkOf": Deviation("a chunk must have its SHA-1", 422),
    "downloadFileData-chunkOf-range": Deviation("a chunk must have its SHA-1", 422),
    "downloadFileData-linked-modified": Deviation("other bytes are never served under a SHA-1", 410),
    "loadFile-linked-modified": Deviation("other bytes are never served under a SHA-1", 200, one_error_frame),
    "browsercode-stats": Deviation(
        "the counters are of buckets and channels, which this replay has none of",
        200,
        lambda body: stats_are_zero(json.loads(body)),
    ),
    "getNumLocalMessages-deleted": Deviation(GONE, 200, {"success": True, "numMessages": 0}),
    "watch-deleted": Deviation(GONE, 200, {"success": True, "messages": {}}),
    "append-deleted": Deviation(GONE, 403),
    "getNumLocalMessages-deleted-2": Deviation(GONE, 200, {"success": True, "numMessages": 0}),
    "ex13 after-restart num": Deviation(GONE, 200, {"success": True, "numMessages": 0}),
    "ex13 after-restart watch": Deviation(GONE, 200, {"success": True, "messages": {}}),
    "ex13 getFeedId-deleted": Deviation(GONE, 200, {"success": False, "feedId": None}),
    "json-103KB": Deviation("JSON bodies may be much larger than 100 KiB", 200, {"success": True}),
    "json-103KB-noauth": Deviation("the credential is checked before the body", 403),
    "store-chunked-no-length": Deviation(
        "a length need not be known before", 200, stored(hashlib.sha1(b"abc").hexdigest())
    ),
    "requestTask-nobackend": Deviation(
        "buckets have other addresses",
        200,
        lambda body: a_task(body, ADD, ADD),
    ),
    "requestTask-action": Deviation("ids are random", 200, lambda body: a_task(body, "[A-Za-z]{10}")),
    "requestTask-query": Deviation(
        "ids are random, buckets have other addresses",
        200,
        lambda body: a_task(body, "[A-Za-z]{10}", "cedcc93220b834f2cfcda46c54778f58fb051f6e"),
    ),
    "requestTask-not-member-action": Deviation("an action that nobody can be asked for is refused", 404),
    "updateTaskStatus-error-long": Deviation("an overlong message is cut, not lost", 200, {"success": True}),
    "createSignedTaskResultUploadUrl": Deviation("upload URLs look otherwise", 200, a_result_upload),
    "store-empty-as-python-client": Deviation("kachery-client can store an empty file", 200, stored(EMPTY_SHA1)),
}

MAY_HAVE_MORE = {"/feed/appendMessages": {"position"}}
"""Fields that answers have here beyond the recorded ones."""

SETS = ("ex1", "ex2", "ex3", "ex6", "ex13", "ex7", "ex16", "ex12")
"""What concerns a node alone, in the order of its life: a restart comes before ex13, the end is in ex12."""
OTHER_SETS = {
    "ex4": "files from another node",
    "ex5": "files from a bucket",
    "ex8": "feeds of another node",
    "ex9": "tasks between nodes",
    "ex14": "uploads to a bucket",
    "ex15": "files from another node",
}
ELSEWHERE = {
    "/createSignedFileUploadUrl": "channels",
    "/uploadFile": "channels",
}
"""Paths of these sets that need a channel, which the tests of channels make."""


def set_of(exchange: dict[str, Any]) -> str:
    # One exchange has no set: it was seen while others were recorded, by chance.
    return exchange.get("recordedSet", "ex1")


def name_of(exchange: dict[str, Any]) -> str:
    """Unique among the chosen ones: ex13 uses names of ex6 again."""
    return f"ex13 {exchange['name']}" if set_of(exchange) == "ex13" else exchange["name"]


def path_of(exchange: dict[str, Any]) -> str:
    if "rawRequest" in exchange:
        return exchange["rawRequest"].split()[1]
    return exchange["request"]["path"]


CHOSEN = [
    exchange for name in SETS for exchange in DIRECT if set_of(exchange) == name and path_of(exchange) not in ELSEWHERE
]
NAMES = [name_of(exchange) for exchange in CHOSEN]
CLIENT_CHOSEN = [(number, e) for number, e in enumerate(BY_CLIENT) if path_of(e) not in ELSEWHERE]


def test_every_exchange_is_compared_or_named_here():
    assert {set_of(exchange) for exchange in DIRECT} == {*SETS, *OTHER_SETS}
    assert len(set(NAMES)) == len(NAMES)
    assert set(DEVIATIONS) <= set(NAMES)
    assert len(DIRECT) == 226
    others = [exchange for exchange in DIRECT if set_of(exchange) in OTHER_SETS]
    elsewhere = [e for e in DIRECT if set_of(e) in SETS and path_of(e) in ELSEWHERE]
    assert (len(CHOSEN), len(elsewhere), len(others)) == (190, 14, 22)
    assert (len(BY_CLIENT), len(CLIENT_CHOSEN)) == (28, 28)


# -- replaying ---------------------------------------------------------------------------------------------------------


class Replay:
    """Sends recorded requests with our node's names in them, and reads its answers with the recorded names back."""

    def __init__(self, node: RunningNode, files: Path) -> None:
        self.node = node
        self.files = files
        self.ours: dict[str, str] = {}
        for name, (data, mtime) in FILES.items():
            self.write(name, data, mtime)
        self.ours[RECORDED_NODE] = (node.storage / "kachery-node-id").read_text()
        self.ours["221f45bc9e4dcc1c98896728b05f02df6bb94287"] = hashlib.sha1(FILES["lk5.txt"][0]).hexdigest()

    def write(self, name: str, data: bytes, mtime: float | None = None) -> None:
        path = self.files / name
        path.write_bytes(data)
        if mtime is not None:
            os.utime(path, (mtime, mtime))
            assert abs(path.stat().st_mtime - mtime) < 1e-6

    def filled(self, text: str) -> str:
        """Recorded text with our places, codes and ids in it."""
        for recorded, ours in {
            "<STORAGE>": str(self.node.storage),
            "<FILES>": str(self.files),
            "<AUTH-CODE>": self.node.code,
            **self.ours,
        }.items():
            text = text.replace(recorded, ours)
        return text

    def body(self, request: dict[str, Any]) -> bytes | None:
        if "json" in request:
            text = self.filled(json.dumps(request["json"]))
            # The recording shortens long texts: "(text of 101 letters x)".
            return re.sub(r"\(text of (\d+) letters (\w)\)", lambda m: m[2] * int(m[1]), text).encode()
        described = request.get("bodyDescription", request.get("body"))
        if described is None:
            return None
        size = re.fullmatch(r"(\d+) bytes", described)
        return generated(int(size[1])) if size else described.encode()

    def send(self, exchange: dict[str, Any]) -> Answer | Exception:
        if "rawRequest" in exchange:
            return self.send_raw(self.filled(exchange["rawRequest"].replace("Host: x", "Host: 127.0.0.1")).encode())
        request = exchange["request"]
        headers = {name: self.filled(value) for name, value in request["headers"].items()}
        # Lengths follow from the bodies as we fill them in.
        headers = {name: value for name, value in headers.items() if name != "Content-Length" or value == "0"}
        try:
            answer = self.node.request(request["method"], request["path"], self.body(request), headers, auth=False)
        except OSError as error:
            return error
        if request["path"] == "/feed/createFeed" and answer.status == 200:
            recorded = exchange["response"]
            recorded = recorded.get("json") or json.loads(recorded["body"])
            self.ours[recorded["feedId"]] = answer.json()["feedId"]
        return answer

    def send_raw(self, request: bytes) -> Answer:
        with socket.create_connection(("127.0.0.1", self.node.port), timeout=20) as raw:
            raw.sendall(request)
            response = http.client.HTTPResponse(raw)
            response.begin()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())


def generated(size: int) -> bytes:
    """The bytes of the generator in manifests.json: byte i is (i*7 + floor(i/256)) mod 256."""
    period = b"".join(bytes((low * 7 + high) % 256 for low in range(256)) for high in range(256))
    return (period * (size // len(period) + 1))[:size]


def join_testchan(node: RunningNode) -> None:
    """The recorded daemon was a member of this channel, with every role."""
    node_id = (node.storage / "kachery-node-id").read_text()
    for method, path, body in (
        ("POST", "/channels", {"name": "testchan"}),
        ("PUT", f"/channels/testchan/memberships/{node_id}", {}),
        ("PUT", f"/channels/testchan/authorizations/node/{node_id}", {"roles": ["all"]}),
    ):
        answer = node.request(method, f"/api/admin/v1{path}", json.dumps(body), auth=node.admin_token)
        assert answer.status < 300, answer.body


@dataclass
class Outcome:
    answer: Answer | Exception
    filled: Callable[[str], str]
    seconds: float


def start(root: Path) -> tuple[RunningNode, Path]:
    for name in ("storage", "metadata", "files"):
        (root / name).mkdir()
    return RunningNode(root / "storage", root / "metadata").start(), root / "files"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """The answers to all chosen exchanges, by name."""
    node, files = start(tmp_path_factory.mktemp("golden"))
    replay = Replay(node, files)
    replay.write("big.bin", generated(45_000_000))
    found: dict[str, Outcome] = {}

    def send(exchange: dict[str, Any]) -> None:
        started = time.monotonic()
        answer = replay.send(exchange)
        found[name_of(exchange)] = Outcome(answer, replay.filled, time.monotonic() - started)

    def prepare(exchange: dict[str, Any]) -> None:
        if exchange["name"] == "registerTaskFunctions-timeout":
            join_testchan(node)
        if exchange["name"] == "downloadFileData-linked-modified":
            replay.write("link.txt", b"MODIFIED content\n")
        if set_of(exchange) == "ex13" and not any(name.startswith("ex13") for name in found):
            assert node.terminate() == 0
            node.start()
        if exchange["name"] == "probe-after-halt":
            assert node.process is not None
            assert node.process.wait(30) == 0

    try:
        waiting: threading.Thread | None = None
        for exchange in CHOSEN:
            prepare(exchange)
            if exchange["name"] == "append-while-watching":
                # Recorded in the order in which the answers came: this watch was under way.
                watch = next(e for e in CHOSEN if e["name"] == "watch-woken")
                waiting = threading.Thread(target=send, args=(watch,))
                waiting.start()
                time.sleep(0.3)
            if exchange["name"] == "watch-woken":
                assert waiting is not None
                waiting.join(30)
                continue
            send(exchange)
        yield found
    finally:
        node.kill()


@pytest.fixture(scope="module")
def client_outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Outcome]]:
    """The answers to what kachery-client sent, by number."""
    node, files = start(tmp_path_factory.mktemp("golden-client"))
    replay = Replay(node, files)
    try:
        found = {}
        join_testchan(node)
        for number, exchange in CLIENT_CHOSEN:
            started = time.monotonic()
            answer = replay.send(exchange)
            found[number] = Outcome(answer, replay.filled, time.monotonic() - started)
        yield found
    finally:
        node.kill()


# -- comparing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", CHOSEN, ids=NAMES)
def test_the_daemons_answer(exchange: dict[str, Any], outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name_of(exchange)]
    if name_of(exchange) in DEVIATIONS:
        check_deviation(DEVIATIONS[name_of(exchange)], outcome)
        return
    check_same(path_of(exchange), recorded_response(exchange), outcome)


@pytest.mark.parametrize(
    "number", [number for number, _ in CLIENT_CHOSEN], ids=[f"{n}-{path_of(e)}" for n, e in CLIENT_CHOSEN]
)
def test_the_answer_that_the_client_got(number: int, client_outcomes: dict[int, Outcome]) -> None:
    exchange = BY_CLIENT[number]
    if path_of(exchange) == "/task/requestTask":
        task = exchange["response"]["json"]["taskId"]
        answer = client_outcomes[number].answer
        assert isinstance(answer, Answer) and answer.status == 200
        a_task(answer.body, task, task)
        return
    recorded = dict(exchange["response"])
    if "json" in recorded:
        recorded["body"] = json.dumps(recorded["json"])
    recorded["headers"] = {"Content-Type": recorded["contentType"]} if recorded["contentType"] else {}
    check_same(path_of(exchange), recorded, client_outcomes[number])


def recorded_response(exchange: dict[str, Any]) -> dict[str, Any]:
    if "rawResponse" not in exchange:
        return exchange["response"]
    head, _, body = exchange["rawResponse"].partition("\n\n")
    status, *lines = head.split("\n")
    headers = dict(line.split(": ", 1) for line in lines)
    if headers.get("Transfer-Encoding") == "chunked":
        # size, data, size, data, 0
        body = "".join(body.split("\n")[1::2])
    return {"status": int(status.split()[1]), "headers": headers, "body": body}


def check_deviation(expected: Deviation, outcome: Outcome) -> None:
    assert isinstance(outcome.answer, Answer)
    assert outcome.answer.status == expected.status, outcome.answer.body
    if expected.status != 200:
        assert len(outcome.answer.body) > 5
    elif callable(expected.body):
        expected.body(outcome.answer.body)
    elif isinstance(expected.body, bytes):
        assert outcome.answer.body == expected.body
    else:
        assert outcome.answer.json() == expected.body


def check_same(path: str, recorded: dict[str, Any], outcome: Outcome) -> None:
    if "error" in recorded:
        assert "ConnectionRefused" in recorded["error"]
        assert isinstance(outcome.answer, ConnectionRefusedError)
        return
    answer = outcome.answer
    assert isinstance(answer, Answer)
    status = recorded["status"]
    if status >= 400:
        same = {400, 403, 404} & {status}
        assert answer.status in same if same else 400 <= answer.status < 500, answer.body
        assert answer.body.decode()
        assert "Traceback" not in answer.body.decode()
        check_headers(recorded, answer, ("Access-Control-Allow-Origin", "Vary"))
        return
    assert answer.status == status, answer.body
    check_headers(
        recorded,
        answer,
        ("Access-Control-Allow-Origin", "Access-Control-Allow-Methods", "Access-Control-Allow-Headers", "Content-Type"),
    )
    if path == "/loadFile":
        check_frames(recorded, outcome)
    elif recorded["headers"].get("Content-Type", "").startswith("application/json") and recorded["body"]:
        check_json(path, json.loads(outcome.filled(recorded["body"])), answer.json())
    else:
        assert answer.body == recorded["body"].encode()


def check_headers(recorded: dict[str, Any], answer: Answer, names: tuple[str, ...]) -> None:
    for name in names:
        if name in recorded.get("headers", {}):
            expected, found = recorded["headers"][name], answer.headers[name.lower()]
            if name == "Vary":
                assert expected in found
            else:
                assert found == expected


def check_frames(recorded: dict[str, Any], outcome: Outcome) -> None:
    """Byte for byte: lengths, order of fields, no separators; the wording of an error is free."""
    answer = outcome.answer
    assert isinstance(answer, Answer)
    # The client reads the undecoded stream, of a length that is not known when it begins.
    assert answer.headers.get("transfer-encoding") == "chunked"
    assert "content-length" not in answer.headers
    assert "content-encoding" not in answer.headers
    if "frames" in recorded:
        assert recorded["frames"] == [{"type": "error", "error": ERROR}]
        one_error_frame(answer.body)
        return
    expected = b""
    for text in re.findall(r"\d+#({.*?})(?=\d+#|$)", recorded["body"]):
        ours = outcome.filled(text).encode()
        expected += b"%d#%s" % (len(ours), ours)
    assert expected.count(b"#{") >= 2
    assert answer.body == expected


def check_json(path: str, expected: Any, found: Any) -> None:
    if path == "/probe":
        version = found.pop("daemonVersion")
        assert re.fullmatch(r"[A-Za-z0-9 .-]{4,40}", version)
        expected.pop("daemonVersion")
    if path == "/feed/watchForNewMessages" and is_signed(expected):
        check_signed(expected, found)
        return
    for name in [name for name, value in expected.items() if value == ERROR]:
        assert found[name]
        expected[name] = found[name]
    for name in MAY_HAVE_MORE.get(path, set()) & set(found) - set(expected):
        found.pop(name)
    assert found == expected
    assert list(found) == list(expected)


def is_signed(answer: Any) -> bool:
    return any(isinstance(m, dict) and "signature" in m for found in answer["messages"].values() for m in found)


def check_signed(expected: Any, found: Any) -> None:
    """Other keys and times, so other signatures; the same messages in the same envelopes."""
    assert set(found) == set(expected)
    assert set(found["messages"]) == set(expected["messages"])
    for name, envelopes in expected["messages"].items():
        bare = [(set(e), set(e["body"]), e["body"]["message"], e["body"]["messageNumber"]) for e in envelopes]
        ours = found["messages"][name]
        assert [(set(e), set(e["body"]), e["body"]["message"], e["body"]["messageNumber"]) for e in ours] == bare


def stats_are_zero(answer: dict[str, Any]) -> None:
    counters = answer["stats"]
    assert set(counters) == {"nodeId", "totalBytesSent", "totalBytesReceived", "totalMessagesSent"}
    assert [counters[name] for name in sorted(set(counters) - {"nodeId"})] == [0, 0, 0]


# -- what one answer does not show -------------------------------------------------------------------------------------


def test_waits_last_as_long_as_they_were_asked_to(outcomes: dict[str, Outcome]) -> None:
    for exchange in CHOSEN:
        if path_of(exchange) == "/feed/watchForNewMessages":
            wait = exchange["request"]["json"]["waitMsec"] / 1000
            seconds = outcomes[name_of(exchange)].seconds
            if exchange["name"] == "watch-woken":
                assert 0.3 <= seconds < wait
            elif recorded_response(exchange)["status"] == 200:
                assert wait <= seconds + 0.01 < wait + 30


def test_recorded_signed_messages_verify(outcomes: dict[str, Outcome]) -> None:
    answer = outcomes["watch-signed"].answer
    assert isinstance(answer, Answer)
    feed = FeedId(outcomes["createFeed"].answer.json()["feedId"])
    envelopes = answer.json()["messages"]["w"]
    assert len(accept_chain(feed, 0, None, [parse_signed_message(envelope) for envelope in envelopes])) == 3


def test_what_belongs_elsewhere_and_the_bound_of_json(make_node: Callable[..., RunningNode]) -> None:
    """When a path of ELSEWHERE is answered, its exchanges are to move to the compared ones."""
    node = make_node(env={"KACHERY_LAB_MAX_JSON": "1MB"}).start()
    value = {"key": "big", "value": "x" * 900_000}
    assert node.post("/mutable/set", value).status == 200
    value["value"] *= 2
    assert node.post("/mutable/set", value).status == 413
    assert node.post("/mutable/set", value, auth=False).status == 403
