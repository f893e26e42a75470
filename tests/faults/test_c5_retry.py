"""C5: the answer is lost after the commit, and the client asks again."""

from __future__ import annotations

import http.client
import json
import os
import threading
from collections.abc import Callable
from hashlib import sha1
from typing import Any

from tests.faults.report import messages_of, report, without
from tests.proxies import LosingProxy
from tests.servers import RunningNode, files_below

Make = Callable[..., RunningNode]
SUBFEED = "5" * 40
APPEND = "appendMessages"


def ask(port: int, token: str, method: str, path: str, body: bytes) -> tuple[int, Any] | None:
    """(Status, JSON), or None when the connection ended without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def append(port: int, node: RunningNode, feed: str, messages: list[Any], request_id: str) -> tuple[int, Any] | None:
    body = {"feedId": feed, "subfeedHash": SUBFEED, "messages": messages, "requestId": request_id}
    return ask(port, node.admin_token, "POST", f"/feed/{APPEND}", json.dumps(body).encode())


def test_a_repeated_append_gets_the_first_answer_and_adds_nothing(make_node: Make) -> None:
    node = make_node().start()
    with LosingProxy(node.port) as proxy:
        feed = node.post("/feed/createFeed", {}).json()["feedId"]
        expected: list[Any] = []
        trials = 20
        for number in range(trials):
            messages = [{"number": number, "part": part} for part in range(number % 3 + 1)]
            proxy.losing.append(APPEND)
            assert append(proxy.port, node, feed, messages, f"id-{number}") is None
            first = append(proxy.port, node, feed, messages, f"id-{number}")
            second = append(proxy.port, node, feed, messages, f"id-{number}")
            assert first == second == (200, {"success": True, "position": len(expected)})
            expected += messages
            other = append(proxy.port, node, feed, [{"other": number}], f"id-{number}")
            assert other is not None and other[0] == 409
            assert (other[1]["code"], other[1]["success"]) == ("request_id_reused", False)
        assert proxy.lost[APPEND] == trials
        assert messages_of(node, feed, SUBFEED) == expected

        # A message that another writer put behind it changes nothing, and neither does a restart.
        assert append(node.port, node, feed, [{"late": 1}], "late") is not None
        for restart in (node.kill, node.terminate):
            restart()
            node.start()
            assert append(node.port, node, feed, [{"number": 0, "part": 0}], "id-0") == (
                200,
                {"success": True, "position": 0},
            )
            refused = append(node.port, node, feed, [{"number": 0, "part": 1}], "id-0")
            assert refused is not None and (refused[0], refused[1]["code"]) == (409, "request_id_reused")
        assert messages_of(node, feed, SUBFEED) == [*expected, {"late": 1}]
        # The id belongs to its subfeed: on another one it is free.
        body = {"feedId": feed, "subfeedHash": "6" * 40, "messages": [{"x": 1}], "requestId": "id-0"}
        assert node.post("/feed/appendMessages", body, auth=node.admin_token).json()["position"] == 0
        report("C5", trials, acked=trials, lost=0, duplicates=0, answers_lost=proxy.lost[APPEND])


def test_a_repeated_append_is_one_message_even_when_the_server_is_killed_between(make_node: Make) -> None:
    """The index commit and the log say the same about a request id, whichever of the two a restart reads it from."""
    node = make_node().start()
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    for number in range(3):
        with LosingProxy(node.port) as proxy:
            proxy.losing.append(APPEND)
            assert append(proxy.port, node, feed, [{"n": number}], f"k{number}") is None
        node.kill()
        if number == 1:
            # The database loses the row; the feeds log brings it back.
            assert node.run_cli("reindex").returncode == 0
        node.start()
        assert append(node.port, node, feed, [{"n": number}], f"k{number}") == (
            200,
            {"success": True, "position": number},
        )
    assert messages_of(node, feed, SUBFEED) == [{"n": number} for number in range(3)]


def test_equal_requests_at_the_same_moment_add_one_message(node: RunningNode) -> None:
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    answers: list[Any] = []
    ready = threading.Barrier(16)

    def send() -> None:
        ready.wait()
        answers.append(append(node.port, node, feed, [{"n": 1}], "same"))

    threads = [threading.Thread(target=send) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [(200, {"success": True, "position": 0})] * 16
    assert messages_of(node, feed, SUBFEED) == [{"n": 1}]


def test_a_repeated_blob_is_the_same_blob(node: RunningNode) -> None:
    data = os.urandom(100_000)
    name = sha1(data).hexdigest()
    path = f"/api/v1/blobs/{name}"
    with LosingProxy(node.port) as proxy:
        proxy.losing.append(name)
        assert ask(proxy.port, node.admin_token, "PUT", path, data) is None
        assert proxy.lost[name] == 1
        again = ask(proxy.port, node.admin_token, "PUT", path, data)
    assert again is not None and (again[0], again[1]["new"]) == (200, False)
    assert len(files_below(node.storage / "sha1")) == 1


def test_control_without_request_ids_the_message_is_there_twice(make_node: Make) -> None:
    node = make_node(prefix=without("no_request_id")).start()
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    with LosingProxy(node.port) as proxy:
        proxy.losing.append(APPEND)
        assert append(proxy.port, node, feed, [{"n": 0}], "id") is None
        append(proxy.port, node, feed, [{"n": 0}], "id")
    stored = messages_of(node, feed, SUBFEED)
    assert stored == [{"n": 0}, {"n": 0}]
    report("C5 control no_request_id", 1, duplicates=len(stored) - 1)
