"""C5, S6, S7, O1, O4 for tasks: lost answers, replays, rights and leases that end meanwhile, stops, clocks.

Backends here are plain requests of the daemon API; what they were given is counted.
"""

from __future__ import annotations

import http.client
import json
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from kachery_lab.core.ids import TaskFunctionId
from kachery_lab.core.tasks import task_hash
from tests.faults.report import report, wait_for, without
from tests.federations import CHANNEL, Federation, SignedRequests, node_id
from tests.servers import Answer, RunningNode

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]
FUNCTION = "count.1"


def register(node: RunningNode, wait_ms: int, kind: str = "action", function: str = FUNCTION) -> list[dict[str, Any]]:
    functions = [{"channelName": CHANNEL, "taskFunctionId": function, "taskFunctionType": kind}]
    answer = node.post("/task/registerTaskFunctions", {"taskFunctions": functions, "timeoutMsec": wait_ms})
    assert answer.status == 200, answer.body
    found: list[dict[str, Any]] = answer.json()["requestedTasks"]
    return found


def ask(node: RunningNode, n: int, kind: str = "action", wait_ms: int = 0, **more: Any) -> Answer:
    body = {
        "channelName": CHANNEL,
        "taskFunctionId": FUNCTION,
        "taskKwargs": {"n": n},
        "taskFunctionType": kind,
        "timeoutMsec": wait_ms,
        **more,
    }
    return node.post("/task/requestTask", body)


def wait(node: RunningNode, task_id: str, wait_ms: int = 10_000) -> Any:
    body = {"channelName": CHANNEL, "taskId": task_id, "taskFunctionType": "action", "timeoutMsec": wait_ms}
    answer = node.post("/task/waitForTaskResult", body)
    assert answer.status == 200, answer.body
    return answer.json()


def done(node: RunningNode, task_id: str, status: str = "finished", **more: Any) -> Answer:
    return node.post("/task/updateTaskStatus", {"channelName": CHANNEL, "taskId": task_id, "status": status, **more})


class Polls:
    """A backend in a thread: takes tasks until it is told to stop, and reports each as finished when `finish`."""

    def __init__(self, node: RunningNode, *, finish: bool) -> None:
        self.node = node
        self.given: Counter[str] = Counter()
        self._finish = finish
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Polls:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                found = register(self.node, 1000)
            except (OSError, http.client.HTTPException):
                self._stop.wait(0.2)
                continue
            for task in found:
                self.given[task["taskId"]] += 1
                if self._finish:
                    assert done(self.node, task["taskId"]).status == 200


class LossyHub:
    """In front of a hub: passes everything, but of the next request to each path in `losing` it drops the answer. While
    it is `cut` nothing passes, and what was connected is not any more."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.losing: list[str] = []
        self.lost: Counter[str] = Counter()
        self._cut = False
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self._cut:
                    client.close()
                else:
                    threading.Thread(target=self._pass, args=(client,), daemon=True).start()

    def cut(self) -> None:
        """Between this moment and `heal` the hub cannot be reached."""
        self._cut = True
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        """The hub can be reached again."""
        self._cut = False

    def _pass(self, client: socket.socket) -> None:
        self._open.add(client)
        try:
            self._forward(client)
        finally:
            self._open.discard(client)

    def _forward(self, client: socket.socket) -> None:
        with suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as server:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = client.recv(65536)
                if not piece:
                    return
                head += piece
            lines, _, body = head.partition(b"\r\n\r\n")
            if b"upgrade: websocket" in lines.lower():
                server.sendall(head)
                threading.Thread(target=_copy, args=(client, server), daemon=True).start()
                _copy(server, client)
                return
            fields = [line for line in lines.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            length = next((int(line[15:]) for line in fields if line.lower().startswith(b"content-length:")), 0)
            while len(body) < length:
                body += client.recv(65536)
            server.sendall(b"\r\n".join([*fields, b"Connection: close"]) + b"\r\n\r\n" + body)
            answer = b""
            while piece := server.recv(65536):
                answer += piece
            path = urlsplit(fields[0].split()[1].decode()).path.rpartition("/")[2]
            if path in self.losing and answer.startswith(b"HTTP/1.1 2"):
                self.losing.remove(path)
                self.lost[path] += 1
            else:
                client.sendall(answer)

    def close(self) -> None:
        self._listener.close()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            sink.sendall(piece)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def behind_a_lossy_hub(
    make_node: Make, prefix: list[str] | None = None, seconds: float = 6
) -> tuple[Federation, RunningNode, LossyHub]:
    """A hub, and a member that reaches it through a proxy."""
    hub = make_node("hub", prefix=prefix or (), env={"KACHERY_LAB_TASK_LEASE_SECONDS": str(seconds)}).start()
    lab = Federation(hub, {})
    lab.make_channel(CHANNEL)
    proxy = LossyHub(hub.port)
    node = make_node("far", prefix=prefix or (), env={"KACHERY_LAB_HUB_URL": f"http://127.0.0.1:{proxy.port}"}).start()
    lab.approve(node_id(node))
    lab.join(hub)
    lab.join(node)
    lab.members["far"] = node
    lab.settle()
    return lab, node, proxy


# -- C5 ----------------------------------------------------------------------------------------------------------------


def test_c5_lost_answers_to_claims_and_reports(make_node: Make) -> None:
    """The hub's answers to a claim and to a final status are lost: each task is given out once and ends once."""
    lab, far, proxy = behind_a_lossy_hub(make_node)
    trials = 12
    try:
        with Polls(far, finish=True) as polls:
            ids = []
            for n in range(trials):
                proxy.losing += ["claim", "finish"]
                ids.append(ask(lab.hub, n).json()["taskId"])
                assert wait(lab.hub, ids[-1]) == {"success": True, "status": "finished"}
            wait_for(lambda: not proxy.losing, "every answer was lost once", 20)
        assert polls.given == Counter(ids)
        assert proxy.lost == {"claim": trials, "finish": trials}
        assert all(wait(far, task, 0)["status"] == "finished" for task in ids)
        report("C5 tasks", trials, answers_lost=sum(proxy.lost.values()), duplicates=0, lost=0)
    finally:
        proxy.close()


def test_c5_a_repeated_request(make_node: Make) -> None:
    """Asking again with the same request id is the same task, whatever was lost; with another function it is a 409."""
    lab, far, proxy = behind_a_lossy_hub(make_node)
    try:
        with Polls(lab.hub, finish=True) as polls:
            proxy.losing.append("tasks")
            assert ask(far, 1, requestId="a").status == 503
            first = ask(far, 1, requestId="a", wait_ms=5000)
            again = ask(far, 1, requestId="a", wait_ms=5000)
            assert first.json()["taskId"] == again.json()["taskId"]
            assert again.json()["status"] == "finished"
            other = ask(far, 2, requestId="a")
            assert (other.status, other.json()["code"]) == (409, "request_id_reused")
            assert ask(far, 1, requestId="b").json()["taskId"] != first.json()["taskId"]
            time.sleep(1)
        assert polls.given[first.json()["taskId"]] == 1
        assert len(polls.given) == 2
        report("C5 task requests", 1, duplicates=0)
    finally:
        proxy.close()


def test_c5_control_claims_not_repeated(make_node: Make) -> None:
    """A claim that is not granted again is held by nobody who knows it: the task lies until the lease ends."""
    lab, far, proxy = behind_a_lossy_hub(make_node, without("claims_not_repeated"))
    try:
        with Polls(far, finish=True) as polls:
            proxy.losing += ["claim"]
            task = ask(lab.hub, 1).json()["taskId"]
            late = wait(lab.hub, task, 3000)["status"]
        assert (late, sum(polls.given.values())) == ("waiting", 0)
        report("C5 control: claims not repeated", 1, lost=1)
    finally:
        proxy.close()


def test_c5_control_new_task_each_time(make_node: Make) -> None:
    node = make_node(prefix=without("new_task_each_time")).start()
    lab = Federation(node, {})
    lab.make_channel(CHANNEL)
    lab.join(node)
    with Polls(node, finish=True) as polls:
        ids = {ask(node, 1, requestId="a", wait_ms=3000).json()["taskId"] for _ in range(2)}
        time.sleep(0.5)
    assert len(ids) == 2 == len(polls.given)
    report("C5 control: new task each time", 1, duplicates=1)


# -- a network that is cut ---------------------------------------------------------------------------------------------


def test_a_final_status_that_the_hub_could_not_be_told(make_node: Make) -> None:
    """The node keeps it, also over its own restart, and the hub knows it soon after it can be reached."""
    lab, far, proxy = behind_a_lossy_hub(make_node, seconds=40)
    try:
        ids = [ask(lab.hub, n).json()["taskId"] for n in range(2)]
        assert sorted(task["taskId"] for task in register(far, 5000)) == sorted(ids)
        time.sleep(1)
        proxy.cut()
        assert done(far, ids[0]).status == 200
        assert done(far, ids[1], "error", errorMessage="no").status == 200
        assert far.terminate() == 0
        far.start()
        assert wait(lab.hub, ids[0], 500)["status"] == "waiting"
        healed = time.monotonic()
        proxy.heal()
        assert wait(lab.hub, ids[0], 30_000) == {"success": True, "status": "finished"}
        assert wait(lab.hub, ids[1], 30_000) == {"success": True, "status": "error", "errorMessage": "no"}
        report("tasks, cut and healed", 2, heal_ms=round((time.monotonic() - healed) * 1000))
    finally:
        proxy.close()


def test_a_cut_that_outlasts_the_lease(make_node: Make) -> None:
    """A calculation runs elsewhere, an action is an error that names the node; what comes later changes nothing."""
    lab, far, proxy = behind_a_lossy_hub(make_node)
    try:
        action = ask(lab.hub, 1).json()["taskId"]
        pure = ask(lab.hub, 1, "pure-calculation").json()["taskId"]
        assert [task["taskId"] for task in register(far, 5000)] == [action]
        assert [task["taskId"] for task in register(far, 5000, "pure-calculation")] == [pure]
        time.sleep(1)
        proxy.cut()
        assert done(far, action).status == 200
        wait_for(lambda: lab.hub.log.count("a task's lease ended") == 2, "both leases ended", 20)
        assert [task["taskId"] for task in register(lab.hub, 8000, "pure-calculation")] == [pure]
        url = lab.hub.post("/task/createSignedTaskResultUploadUrl", {"channelName": CHANNEL, "taskId": pure, "size": 1})
        assert lab.hub.request("PUT", urlsplit(url.json()["signedUrl"]).path, b"2", auth=False).status == 200
        assert done(lab.hub, pure).status == 200
        lost = wait(lab.hub, action)
        assert lost["status"] == "error" and node_id(far) in lost["errorMessage"]
        healed = time.monotonic()
        proxy.heal()
        while done(far, pure, "error", errorMessage="late").status != 409:
            assert time.monotonic() - healed < 30
            time.sleep(0.5)
        assert wait(lab.hub, action) == lost
        for node in (lab.hub, far):
            assert ask(node, 1, "pure-calculation", 5000).json()["status"] == "finished"
        report("tasks, cut for longer", 2, heal_ms=round((time.monotonic() - healed) * 1000), final_statuses=2)
    finally:
        proxy.close()


# -- S6, S7 ------------------------------------------------------------------------------------------------------------


class Holder:
    """A member that is no server: it claims tasks of the hub with signed requests."""

    def __init__(self, lab: Federation, label: str) -> None:
        self.lab = lab
        self.requests: SignedRequests = lab.stranger(label)
        self.lease = secrets.token_hex(16)

    def task(self, task_id: str, n: int, kind: str) -> dict[str, Any]:
        digest = task_hash(TaskFunctionId(FUNCTION), {"n": n})
        return {
            "taskId": task_id,
            "taskHash": digest,
            "taskFunctionId": FUNCTION,
            "taskFunctionType": kind,
            "backendId": None,
        }

    def claim_body(self, task_id: str, n: int, kind: str = "query") -> dict[str, Any]:
        requester = node_id(self.lab.hub)
        return {**self.task(task_id, n, kind), "requester": requester, "leaseId": self.lease, "ageMs": 0}

    def claim(self, task_id: str, n: int, kind: str = "query") -> bool:
        answer = self.requests.request(
            "POST", f"/api/v1/channels/{CHANNEL}/tasks/claim", self.claim_body(task_id, n, kind)
        )
        assert answer.status == 200, answer.body
        return answer.json()["granted"] is True

    def url(self, n: int, size: int, lease: str | None = None) -> str:
        body = {"taskHash": task_hash(TaskFunctionId(FUNCTION), {"n": n}), "size": size, "leaseId": lease}
        answer = self.requests.request("POST", f"/api/v1/channels/{CHANNEL}/tasks/uploads", body)
        assert answer.status == 200, answer.body
        return urlsplit(answer.json()["url"]).path

    def put(self, path: str, data: bytes, before_end: Callable[[], None] | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.lab.hub.port, timeout=30)
        try:
            connection.putrequest("PUT", path)
            connection.putheader("Content-Length", str(len(data)))
            connection.endheaders(data[:2])
            if before_end is not None:
                time.sleep(0.2)
                before_end()
            connection.send(data[2:])
            return connection.getresponse().status
        finally:
            connection.close()

    def finish(self, task_id: str) -> int:
        body = {"taskId": task_id, "leaseId": self.lease, "status": "finished", "errorMessage": None}
        return self.requests.request("POST", f"/api/v1/channels/{CHANNEL}/tasks/finish", body).status


def a_lab(make_node: Make, prefix: list[str] | None = None, seconds: float = 2) -> Federation:
    hub = make_node("hub", prefix=prefix or (), env={"KACHERY_LAB_TASK_LEASE_SECONDS": str(seconds)}).start()
    lab = Federation(hub, {})
    lab.make_channel(CHANNEL)
    lab.join(hub)
    lab.settle()
    return lab


def result_of(lab: Federation, n: int) -> bytes:
    found = ask(lab.hub, n, "query").json()
    answer = lab.hub.request("GET", urlsplit(found["taskResultUrl"]).path, auth=False)
    return answer.body if answer.status == 200 else b""


def test_s6_replays(make_node: Make) -> None:
    """A signed claim is good once, also over a restart; an upload URL puts the same bytes again and no others."""
    lab = a_lab(make_node, seconds=30)
    holder = Holder(lab, "one")
    target = f"/api/v1/channels/{CHANNEL}/tasks/claim"
    body = json.dumps(holder.claim_body("t1", 1)).encode()
    headers = {"Content-Type": "application/json", **holder.requests.header("POST", target, body)}
    statuses = [lab.hub.request("POST", target, body, headers, auth=False).status for _ in range(3)]
    assert statuses == [200, 409, 409]
    time.sleep(1.1)
    assert lab.hub.terminate() == 0
    lab.hub.start()
    assert lab.hub.request("POST", target, body, headers, auth=False).status == 401
    url = holder.url(1, 4, holder.lease)
    assert [holder.put(url, b'"aa"'), holder.put(url, b'"aa"'), holder.put(url, b'"bb"')] == [200, 200, 409]
    assert holder.finish("t1") == 200
    assert holder.put(url, b'"bb"') == 409
    assert result_of(lab, 1) == b'"aa"'
    report("S6 tasks", 5, replays_with_effect=0)


def lose_the_lease(lab: Federation) -> None:
    wait_for(lambda: "a task's lease ended" in lab.hub.log, "the lease ended", 10)


def overwriting(lab: Federation) -> tuple[int, bytes]:
    """A result whose lease is lost while its bytes come, when another backend has the task: status, what is kept."""
    first, second = Holder(lab, "one"), Holder(lab, "two")
    assert first.claim("t1", 1)
    url = first.url(1, 6, first.lease)

    def meanwhile() -> None:
        lose_the_lease(lab)
        assert second.claim("t1", 1)
        assert second.put(second.url(1, 6, second.lease), b'"good"') == 200
        assert second.finish("t1") == 200

    status = first.put(url, b'"late"', meanwhile)
    return status, result_of(lab, 1)


def test_s7_a_lease_that_ends_during_the_upload(make_node: Make) -> None:
    assert overwriting(a_lab(make_node)) == (409, b'"good"')
    report("S7 tasks", 1, bypass=0)


def test_s6_s7_control_results_overwrite(make_node: Make) -> None:
    assert overwriting(a_lab(make_node, without("results_overwrite"))) == (200, b'"late"')
    report("S7 control: results overwrite", 1, bypass=1)


def test_s7_a_role_that_is_taken_away(make_node: Make) -> None:
    """While a task is held: the upload that is under way is refused, and within 1 s the task is free."""
    lab = a_lab(make_node, seconds=30)
    first, second = Holder(lab, "one"), Holder(lab, "two")
    assert first.claim("t1", 1)
    url = first.url(1, 6, first.lease)
    began = 0.0

    def revoke() -> None:
        nonlocal began
        lab.grant(first.requests.id, "requestTasks")
        began = time.monotonic()

    assert first.put(url, b'"late"', revoke) == 403
    assert first.finish("t1") == 403
    while not second.claim("t1", 1):
        assert time.monotonic() - began < 1
        time.sleep(0.05)
    assert second.put(second.url(1, 6, second.lease), b'"good"') == 200
    assert second.finish("t1") == 200
    assert result_of(lab, 1) == b'"good"'
    report("S7 tasks, role revoked", 1, bypass=0, freed_ms=round((time.monotonic() - began) * 1000))


# -- O1 ----------------------------------------------------------------------------------------------------------------


def stop_with_polls(node: RunningNode, polls: int, wait_ms: int) -> tuple[int, float, list[int]]:
    """(Exit code, seconds to stop, statuses of the polls that were waiting)."""
    statuses: list[int] = []

    def poll() -> None:
        functions = [{"channelName": CHANNEL, "taskFunctionId": "idle.1", "taskFunctionType": "action"}]
        answer = node.post("/task/registerTaskFunctions", {"taskFunctions": functions, "timeoutMsec": wait_ms})
        statuses.append(answer.status)

    threads = [threading.Thread(target=poll) for _ in range(polls)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    began = time.monotonic()
    code = node.terminate()
    seconds = time.monotonic() - began
    for thread in threads:
        thread.join(30)
    return code, seconds, statuses


def test_o1_stop_with_polls_and_leases(make_node: Make) -> None:
    """Polls are answered at once, and what backends hold is theirs after the restart."""
    lab = a_lab(make_node, seconds=10)
    node = lab.hub
    ids = [ask(node, n).json()["taskId"] for n in range(3)]
    assert [task["taskId"] for task in register(node, 2000)] == ids
    assert done(node, ids[0]).status == 200
    time.sleep(1)
    code, seconds, statuses = stop_with_polls(node, 20, 60_000)
    assert (code, statuses) == (0, [200] * 20)
    assert seconds < 5
    node.start()
    assert register(node, 1500) == [], "nobody gets them a second time"
    assert done(node, ids[1]).status == 200
    assert done(node, ids[2], "error", errorMessage="no").status == 200
    found = [wait(node, task) for task in ids]
    assert [one["status"] for one in found] == ["finished", "finished", "error"]
    report("O1 tasks", 1, polls=20, failed_requests=0, leases_lost=0, stop_ms=round(seconds * 1000))


def test_o1_control_deaf_polls(make_node: Make) -> None:
    _, seconds, _ = stop_with_polls(a_lab(make_node, without("deaf_polls")).hub, 3, 8000)
    assert seconds > 4
    report("O1 control: deaf polls", 1, stop_ms=round(seconds * 1000))


def asked_again_after_a_restart(node: RunningNode) -> int:
    """How often a calculation is given out that is asked for again while a backend has it."""
    task = ask(node, 1, "pure-calculation").json()["taskId"]
    assert [one["taskId"] for one in register(node, 3000, "pure-calculation")] == [task]
    time.sleep(1)
    assert node.terminate() == 0
    node.start()
    time.sleep(1)
    assert ask(node, 1, "pure-calculation").json()["taskId"] == task
    return 1 + len(register(node, 2000, "pure-calculation"))


def test_o1_a_restart_gives_nothing_out_again(make_node: Make) -> None:
    assert asked_again_after_a_restart(a_lab(make_node, seconds=15).hub) == 1
    report("O1 leases over a restart", 1, handed_out_again=0)


def test_o1_control_leases_forgotten(make_node: Make) -> None:
    assert asked_again_after_a_restart(a_lab(make_node, without("leases_forgotten"), seconds=15).hub) == 2
    report("O1 control: leases forgotten", 1, handed_out_again=1)


# -- O4 ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "clock"
    path.write_text("0")
    yield path


def set_clock(clock: Path, offset: float) -> None:
    """At once: the server reads the file at any time."""
    draft = clock.with_suffix(".new")
    draft.write_text(str(offset))
    draft.rename(clock)


def jumps(make_node: Make, clock: Path, guard: str) -> tuple[int, int]:
    """(Leases that ended, tasks that finished) of a backend that polls on while the clock is set."""
    env = {"TEST_CLOCK": str(clock), "KACHERY_LAB_TASK_LEASE_SECONDS": "5"}
    node = make_node("hub", prefix=without(guard), env=env).start()
    lab = Federation(node, {})
    lab.make_channel(CHANNEL)
    lab.join(node)
    with Polls(node, finish=False) as polls:
        ids = [ask(node, n).json()["taskId"] for n in range(2)]
        wait_for(lambda: set(ids) <= set(polls.given), "the backend has both", 10)
        for offset in (3600, -3600, 90_000, -90_000, -1_700_000_000, 0):
            set_clock(clock, offset)
            time.sleep(1.3)
        for task in ids:
            done(node, task)
        states = [wait(node, task, 1000)["status"] for task in ids]
    return node.log.count("a task's lease ended"), states.count("finished")


def test_o4_clocks_that_are_set(make_node: Make, clock: Path) -> None:
    assert jumps(make_node, clock, "shifted_clock") == (0, 2)
    report("O4 leases", 6, wrong_expiries=0)


def test_o4_control_leases_by_the_wall(make_node: Make, clock: Path) -> None:
    ended, finished = jumps(make_node, clock, "leases_by_the_wall")
    assert ended > 0 and finished < 2
    report("O4 control: leases by the wall", 6, wrong_expiries=ended)
