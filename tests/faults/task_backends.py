"""Backends of tasks that are plain requests of the daemon API, and what they were given."""

from __future__ import annotations

import http.client
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.federations import CHANNEL, Federation
from tests.servers import Answer, RunningNode

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


def a_lab(make_node: Make, prefix: list[str] | None = None, seconds: float = 2) -> Federation:
    hub = make_node("hub", prefix=prefix or (), env={"KACHERY_LAB_TASK_LEASE_SECONDS": str(seconds)}).start()
    lab = Federation(hub, {})
    lab.make_channel(CHANNEL)
    lab.join(hub)
    lab.settle()
    return lab
