"""Tasks between three servers: backends and requesters are kachery-client's own, each in its own processes.

The functions themselves write down that they ran. The full runs of kills are slow ones.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import TaskFunctionId
from kachery_lab.core.tasks import task_hash
from tests.clients.backends import Backend, answers, ask, asking
from tests.faults.report import wait_for
from tests.federations import CHANNEL, SECONDS, Federation, federation, node_id
from tests.nodes import requests_of
from tests.servers import RunningNode

LEASE = 4.0
"""Seconds, instead of 30: what a test can wait for."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The same three servers for all tests here."""
    root = tmp_path_factory.mktemp("tasks")
    with federation(root, "one", "two", KACHERY_LAB_TASK_LEASE_SECONDS=str(LEASE)) as lab:
        yield lab


def wanted(function: str, kind: str, n: int, wait_ms: int, **more: Any) -> dict[str, Any]:
    """The body of a `requestTask`."""
    return {
        "channelName": CHANNEL,
        "taskFunctionId": function,
        "taskKwargs": {"n": n},
        "taskFunctionType": kind,
        "timeoutMsec": wait_ms,
        **more,
    }


class Backends:
    """Starts backends and ends them; counts what their functions wrote down."""

    def __init__(self, root: Path) -> None:
        self.runs = root / "runs"
        self.runs.touch()
        self.all: list[Backend] = []

    def start(self, node: RunningNode, name: str, channel: str = CHANNEL, **more: Any) -> Backend:
        backend = Backend(node, channel, self.runs, name, **more)
        self.all.append(backend)
        return backend

    def lines(self) -> list[tuple[str, str, int]]:
        """(Backend, function, n) of every run, in order."""
        found = [line.split() for line in self.runs.read_text().splitlines()]
        return [(backend, function, int(n)) for backend, function, n in found]

    def counts(self) -> Counter[tuple[str, int]]:
        return Counter((function, n) for _, function, n in self.lines())


@pytest.fixture
def backends(tmp_path: Path) -> Iterator[Backends]:
    made = Backends(tmp_path)
    yield made
    for backend in made.all:
        backend.kill()


def ready(node: RunningNode, channel: str = CHANNEL) -> None:
    """Until some backend waits for tasks that this node asks for: one of a wrong type is refused then, and runs
    nowhere."""
    until = time.monotonic() + SECONDS
    body = wanted("double.1", "query", -1, 1000, channelName=channel)
    while True:
        found = node.post("/task/requestTask", body).json()
        if found["status"] == "error":
            assert "offered as pure-calculation" in found["errorMessage"]
            return
        assert time.monotonic() < until, found
        wait = {"channelName": channel, "taskId": found["taskId"], "taskFunctionType": "query", "timeoutMsec": 3000}
        if node.post("/task/waitForTaskResult", wait).json()["status"] == "error":
            return


def test_each_kind_by_the_published_client(lab: Federation, backends: Backends) -> None:
    """The backend at one node, the requester at another, the hub is a third."""
    provider, requester = lab.members["one"], lab.members["two"]
    backends.start(provider, "one")
    ready(requester)

    found = ask(requester, CHANNEL, "double.1", "pure-calculation", {"n": 21})
    assert (found["status"], found["result"]) == ("finished", {"n": 42})
    found = ask(requester, CHANNEL, "look.1", "query", {"n": 1})
    assert (found["status"], found["result"]) == ("finished", {"n": 1, "by": "one"})
    found = ask(requester, CHANNEL, "act.1", "action", {"n": 2})
    assert (found["status"], found["result"]) == ("finished", True)

    # A slow one of each: waiting for an action works, too.
    slow = {"n": 3, "seconds": 1.5}
    found = ask(requester, CHANNEL, "act.1", "action", slow)
    assert (found["first"], found["status"], found["result"]) == ("waiting", "finished", True)
    found = ask(requester, CHANNEL, "look.1", "query", slow)
    assert (found["first"], found["result"]) == ("waiting", {"n": 3, "by": "one"})

    # A cached result needs no backend, a query is always done anew.
    ran = backends.counts()
    again = ask(requester, CHANNEL, "double.1", "pure-calculation", {"n": 21})
    assert (again["first"], again["result"]) == ("finished", {"n": 42})
    ask(requester, CHANNEL, "look.1", "query", {"n": 1})
    assert backends.counts() - ran == Counter({("look", 1): 1})

    # What a function raises arrives, however long it is, and is tried again when asked again.
    for _ in range(2):
        found = ask(requester, CHANNEL, "fail.1", "pure-calculation", {"n": 4})
        assert "no 4 today" in found["error"]
    assert backends.counts()["fail", 4] == 2
    found = ask(requester, CHANNEL, "fail.1", "pure-calculation", {"n": 5, "length": 5000})
    assert "no 5 today" in found["error"] and found["error"].endswith("...") and len(found["error"]) < 1100

    # A wrong type gets an error, not silence.
    found = ask(requester, CHANNEL, "double.1", "action", {"n": 6})
    assert "double.1 is offered as pure-calculation, not as action" in found["error"]
    assert ("double", 6) not in backends.counts()

    # The hub's own node may ask, and provide, as well.
    assert ask(lab.hub, CHANNEL, "double.1", "pure-calculation", {"n": 50})["result"] == {"n": 100}
    assert set(backends.counts().values()) <= {1, 2}


def test_who_may_not(lab: Federation, backends: Backends) -> None:
    """A request without permission is refused, with the role's or the function's name; with it, it works."""
    provider, requester, channel = lab.members["one"], lab.members["two"], lab.open_channel()
    backends.start(provider, "one", channel)
    ready(requester, channel)

    def refused(kind: str = "action", function: str = "act.1") -> str:
        found = ask(requester, channel, function, kind, {"n": 1})
        assert "error" in found and "result" not in found, found
        return str(found["error"])

    body = wanted("act.1", "action", 1, 1000, channelName=channel)
    lab.grant(requester, "provideTasks", "requestFiles", channel=channel)
    lab.settle()
    refused()
    answer = requester.post("/task/requestTask", body)
    assert answer.status == 403 and b"requestTasks" in answer.body and channel.encode() in answer.body
    lab.grant(requester, "all", channel=channel)
    lab.settle()
    assert ask(requester, channel, "act.1", "action", {"n": 2})["result"] is True

    grants = f"/channels/{channel}/functions/act.1/grants/node"
    lab.admin("PUT", f"{grants}/{node_id(lab.hub)}", {"roles": ["requestTasks"]})
    answer = requester.post("/task/requestTask", body)
    assert answer.status == 403 and b"requestTasks for the function act.1" in answer.body
    assert ask(lab.hub, channel, "act.1", "action", {"n": 3})["result"] is True
    lab.admin("PUT", f"{grants}/{node_id(requester)}", {"roles": ["requestTasks"]})
    assert ask(requester, channel, "act.1", "action", {"n": 4})["result"] is True
    assert ask(requester, channel, "double.1", "pure-calculation", {"n": 5})["result"] == {"n": 10}
    assert sorted(n for function, n in backends.counts() if function == "act") == [2, 3, 4]

    answer = requester.post("/task/requestTask", {**body, "channelName": "nowhere"})
    assert answer.status == 404 and b"nowhere" in answer.body
    status = {"channelName": channel, "taskId": "x", "status": "running"}
    lab.grant(requester, "requestTasks", channel=channel)
    lab.settle()
    answer = requester.post("/task/updateTaskStatus", status)
    assert answer.status == 403 and b"provideTasks" in answer.body
    assert provider.post("/task/updateTaskStatus", status).status == 200


def test_results_need_no_credential_but_the_role(lab: Federation, backends: Backends) -> None:
    """The client reads them with a plain GET, also of this private channel; a revoked role ends that."""
    provider, requester, channel = lab.members["one"], lab.members["two"], lab.open_channel()
    backends.start(provider, "one", channel)
    ready(requester, channel)
    body = wanted("double.1", "pure-calculation", 8, 30_000, channelName=channel)
    found = requester.post("/task/requestTask", body).json()
    assert found["status"] == "finished"

    def read() -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", lab.hub.port)
        connection.request("GET", found["taskResultUrl"].removeprefix(f"http://127.0.0.1:{lab.hub.port}") + "?cb=$x")
        answer = connection.getresponse()
        try:
            return answer.status, answer.read()
        finally:
            connection.close()

    assert read() == (200, b'{"n":16}')
    lab.grant(requester, "requestFiles", channel=channel)
    assert read()[0] == 403
    lab.grant(requester, "all", channel=channel)
    assert read()[0] == 200


@pytest.mark.slow
def test_a_backend_that_comes_later(lab: Federation, backends: Backends) -> None:
    """A task that nobody took is offered again while somebody waits."""
    provider, requester = lab.members["one"], lab.members["two"]
    waiting = asking(requester, CHANNEL, "act.1", "action", [{"n": 1}], seconds=60)
    time.sleep(20)
    backends.start(provider, "late")
    (found,) = answers(waiting)
    assert (found["first"], found.get("result")) == ("waiting", True), found
    assert backends.counts() == Counter({("act", 1): 1})


def register(node: RunningNode, function: str, kind: str, wait_ms: int = 3000, **more: Any) -> Any:
    functions = [{"channelName": CHANNEL, "taskFunctionId": function, "taskFunctionType": kind}]
    body = {"taskFunctions": functions, "backendId": None, "timeoutMsec": wait_ms, **more}
    answer = node.post("/task/registerTaskFunctions", body)
    assert answer.status == 200, answer.body
    return answer.json()


def test_a_caller_that_hung_up_swallows_nothing(lab: Federation) -> None:
    """Its registration ends at once; the task goes to the next one. The answer has the recorded shape."""
    node = lab.hub
    functions = [{"channelName": CHANNEL, "taskFunctionId": "late.1", "taskFunctionType": "action"}]
    text = json.dumps({"taskFunctions": functions, "backendId": None, "timeoutMsec": 60_000})
    path, before = "/task/registerTaskFunctions", len(node.log)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", node.port)) as gone:
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(text)}\r\n"
            head += f"Content-Type: application/json\r\nKACHERY-CLIENT-AUTH-CODE: {node.code}\r\n\r\n"
            gone.sendall(head.encode() + text.encode())
            time.sleep(0.3)
    wait_for(lambda: [one["path"] for one in requests_of(node, before)].count(path) == 3, "all have ended", SECONDS)
    body = wanted("late.1", "action", 1, 200)
    asked = node.post("/task/requestTask", body).json()
    assert asked["status"] == "waiting"
    started = time.monotonic()
    found = register(node, "late.1", "action", 30_000)
    assert time.monotonic() - started < 15, "at once, and not when the wait ends"
    (task,) = found["requestedTasks"]
    assert list(found) == ["success", "requestedTasks"]
    assert list(task) == [
        *("channelName", "backendId", "taskId", "taskHash", "taskFunctionId", "kwargs", "taskFunctionType")
    ]
    assert (task["taskId"], task["kwargs"], task["backendId"]) == (asked["taskId"], {"n": 1}, None)
    assert register(node, "late.1", "action", 500)["requestedTasks"] == []
    done = {"channelName": CHANNEL, "taskId": task["taskId"], "status": "finished"}
    assert node.post("/task/updateTaskStatus", done).status == 200
    wait = {"channelName": CHANNEL, "taskId": task["taskId"], "taskResultUrl": None, "taskFunctionType": "action"}
    wait["timeoutMsec"] = 30_000.5
    started = time.monotonic()
    assert node.post("/task/waitForTaskResult", wait).json() == {"success": True, "status": "finished"}
    assert time.monotonic() - started < 15, "what is finished already is told at once"


def test_backend_ids_are_told_apart(lab: Federation) -> None:
    """Null is a value of its own."""
    asked = lab.hub.post("/task/requestTask", wanted("f.1", "action", 1, 100, backendId="gpu")).json()
    assert register(lab.hub, "f.1", "action", 300)["requestedTasks"] == []
    assert register(lab.hub, "f.1", "action", 300, backendId="cpu")["requestedTasks"] == []
    (task,) = register(lab.hub, "f.1", "action", 3000, backendId="gpu")["requestedTasks"]
    assert (task["taskId"], task["backendId"]) == (asked["taskId"], "gpu")


# -- exactly once ----------------------------------------------------------------------------------------------------

KINDS = {"double.1": "pure-calculation", "look.1": "query", "act.1": "action"}


def request_all(requester: RunningNode, count: int, at_once: int, patience: float, **kwargs: Any) -> Any:
    """`count` tasks of the three kinds in turn, from `at_once` client processes: what each found, by function and n."""
    shares: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for n in range(count):
        function = list(KINDS)[n % 3]
        shares.setdefault((function, n // 3 % max(at_once // 3, 1)), []).append({"n": n, **kwargs})
    processes = [
        (function, tasks, asking(requester, CHANNEL, function, KINDS[function], tasks, patience))
        for (function, _), tasks in shares.items()
    ]
    found = {}
    for function, tasks, process in processes:
        for task, answer in zip(tasks, answers(process, 600), strict=True):
            found[function, task["n"]] = answer
    return found


def without_kills(lab: Federation, backends: Backends, count: int) -> None:
    for name, node in lab.members.items():
        backends.start(node, name)
        ready(node)
    found = request_all(lab.hub, count, 6, 60, seconds=count / 10_000)
    assert len(found) == count
    assert [key for key, answer in found.items() if answer.get("status") != "finished"] == []
    assert set(backends.counts().values()) == {1}
    assert len(backends.lines()) == count
    share = Counter(backend for backend, _, _ in backends.lines())
    print(json.dumps({"tasks": count, "ran": len(backends.lines()), "by": share}))
    assert set(share) == {"one", "two"}


def test_eighteen_tasks_of_two_backends(lab: Federation, backends: Backends) -> None:
    without_kills(lab, backends, 18)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_hundred_tasks_of_two_backends(lab: Federation, backends: Backends) -> None:
    without_kills(lab, backends, 200)


def with_kills(lab: Federation, backends: Backends, count: int, kills: int, seconds: float) -> None:
    """A backend's whole process group is killed again and again, and started anew when its leases are lost."""
    nodes, before = lab.members, lab.hub.log
    running = {name: backends.start(node, name) for name, node in nodes.items()}
    for node in nodes.values():
        ready(node)
    asker = ThreadPoolExecutor(1)
    asked = asker.submit(request_all, lab.hub, count, 6, 120, seconds=seconds)
    for number in range(kills):
        name = ("one", "two")[number % 2]
        ran_before = len(backends.lines())
        until = time.monotonic() + 60
        while not any(backend == name for backend, _, _ in backends.lines()[ran_before:]) and time.monotonic() < until:
            time.sleep(0.01)
        running[name].kill()
        # A backend of the same kind at the same node would keep the lost leases alive.
        time.sleep(LEASE * 1.5 + 1)
        running[name] = backends.start(nodes[name], name)
        if number < kills - 1:
            time.sleep(3)
    found = asked.result(500)
    counts, lost = backends.counts(), 0
    for (function, n), answer in found.items():
        ran = counts[function.partition(".")[0], n]
        if function == "act.1":
            if answer.get("status") == "finished":
                assert ran == 1, (n, answer)
            else:
                lost += 1
                assert "backend of the node" in answer["error"] and ran <= 1, (n, ran, answer)
                assert any(node_id(node) in answer["error"] for node in nodes.values())
        else:
            assert answer.get("status") == "finished", (function, n, answer)
            assert 1 <= ran <= 1 + lost_leases(lab, function, n), (function, n, ran)
    again = sum(times - 1 for times in counts.values() if times > 1)
    print(json.dumps({"tasks": count, "kills": kills, "ran_again": again, "actions_lost": lost}))
    assert "a task's lease ended" in lab.hub.log[len(before) :], "the kills hit tasks that were being worked on"


def lost_leases(lab: Federation, function: str, n: int) -> int:
    """How often the hub took a lease of this task back."""
    ended = [json.loads(line) for line in lab.hub.log.splitlines() if "a task's lease ended" in line]
    if function == "double.1":
        hashes = {task_hash(TaskFunctionId(function), {"n": n, "seconds": s}) for s in (0.3, 0.2)}
        return sum(one["task"] in hashes for one in ended)
    return sum(one["function"] == function for one in ended)


@pytest.mark.timeout(180)
def test_twelve_tasks_and_a_kill(lab: Federation, backends: Backends) -> None:
    with_kills(lab, backends, 12, 1, 0.3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_tasks_and_many_kills(lab: Federation, backends: Backends) -> None:
    with_kills(lab, backends, 200, 8, 0.2)
