"""The network between the three servers of `compose/federation.yaml` is cut and healed while feeds grow and tasks run.

A cable is pulled (the container leaves the network), or one end falls silent (the container is paused). People beside
each server work on meanwhile: they reach it from inside its own network. Backends are kachery-client's own.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.clients.backends import BACKEND, FUNCTIONS
from tests.clients.environment import client_python
from tests.container.engine import build_image, why_no_engine
from tests.container.federation import CHANNEL, Federation, federation
from tests.container.inside import PORT, Inside, paused, unplugged
from tests.faults.report import histogram, messages_of, missing, report, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SUBFEED = "5" * 40
KINDS = {"double.1": "pure-calculation", "look.1": "query", "act.1": "action"}
NUMBERS = itertools.count(1)
HEAL_SECONDS = 30


def count(node: Inside, feed: str) -> int:
    """How many messages of a feed are at a node."""
    answer = node.post("/feed/getNumLocalMessages", {"feedId": feed, "subfeedHash": SUBFEED})
    return int(answer.json()["numMessages"])


class Worker:
    """Does something again and again in a thread until it is told to stop; the last time is done to its end."""

    def __init__(self, pause: float) -> None:
        self._pause = pause
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tell(self) -> None:
        """Do nothing new."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the end; raises what went wrong."""
        self._stop.set()
        self._thread.join(200)
        assert not self._thread.is_alive()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.once()
                self._stop.wait(self._pause)
        except BaseException as failure:
            self._failure = failure

    def once(self) -> None:
        raise NotImplementedError


class Writer(Worker):
    """Appends to a feed of a node, each message until it is acknowledged."""

    def __init__(self, node: Inside) -> None:
        super().__init__(0.1)
        self.node = node
        self.feed = str(node.post("/feed/createFeed", {}).json()["feedId"])
        self.acked = 0

    def once(self) -> None:
        message = {"n": self.acked, "by": self.node.server.name}
        body = {"feedId": self.feed, "subfeedHash": SUBFEED, "messages": [message], "requestId": str(self.acked)}
        while self.node.try_post("/feed/appendMessages", body) is None:
            time.sleep(0.2)
        self.acked += 1


class Follower(Worker):
    """Watches all feeds from where the node's own copies end."""

    def __init__(self, node: Inside, feeds: list[str]) -> None:
        super().__init__(0.05)
        self.node = node
        self.feeds = feeds

    def once(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            watches = {
                feed: {
                    "feedId": feed,
                    "subfeedHash": SUBFEED,
                    "position": count(self.node, feed),
                    "channelName": CHANNEL,
                }
                for feed in self.feeds
            }
            body = {"subfeedWatches": watches, "waitMsec": 1000, "maxNumMessages": 1000}
            self.node.try_post("/feed/watchForNewMessages", body)


@dataclass(frozen=True)
class Task:
    """A task that a node has accepted."""

    node: Inside
    function: str
    n: int
    task_id: str
    result_url: str | None

    def state(self, node: Inside | None = None, wait_ms: int = 0) -> tuple[str, str | None]:
        """Status and error message as a node tells them; without one, the one that was asked."""
        body = {
            "channelName": CHANNEL,
            "taskId": self.task_id,
            "taskFunctionType": KINDS[self.function],
            "timeoutMsec": wait_ms,
        }
        answer = (node or self.node).try_post("/task/waitForTaskResult", body)
        found = {"status": "unknown"} if answer is None else answer.json()
        return found["status"], found.get("errorMessage")

    def is_final(self) -> bool:
        return self.state(wait_ms=500)[0] in ("finished", "error")


def ask(node: Inside, function: str, seconds: float) -> Task:
    """Ask for a new task, until it is accepted."""
    n = next(NUMBERS)
    body = {
        "channelName": CHANNEL,
        "taskFunctionId": function,
        "taskKwargs": {"n": n, "seconds": seconds},
        "taskFunctionType": KINDS[function],
        "timeoutMsec": 0,
        "requestId": f"cut-{n}",
    }
    while (answer := node.try_post("/task/requestTask", body)) is None:
        time.sleep(0.2)
    found = answer.json()
    return Task(node, function, n, found["taskId"], found.get("taskResultUrl"))


class Requester(Worker):
    """Asks a node for tasks of each kind in turn."""

    def __init__(self, node: Inside) -> None:
        super().__init__(1.5)
        self.node = node
        self.tasks: list[Task] = []
        self._functions = itertools.cycle(KINDS)

    def once(self) -> None:
        self.tasks.append(ask(self.node, next(self._functions), 0.3))


@dataclass
class Backends:
    """kachery-client's task backends, and what their functions wrote down."""

    root: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, node: Inside, *functions: str) -> None:
        """`run_task_backend` beside a server; its name is the server's."""
        name = node.server.name
        with (self.root / f"{name}-{len(self.processes)}.log").open("w") as log:
            process = node.server.start_client(
                *("nsenter", f"--net=/proc/{node.pid}/ns/net", str(client_python()), "-c", FUNCTIONS + BACKEND),
                *(CHANNEL, "", *functions),
                env={
                    "KACHERY_DAEMON_PORT": str(PORT),
                    "TASK_RUNS": str(self.root / "runs"),
                    "TASK_BACKEND": name,
                    "PYTHONUNBUFFERED": "1",
                },
                stdout=log,
                start_new_session=True,
            )
        self.processes.append(process)

    def runs(self) -> list[tuple[str, str, int]]:
        """(Server, function, n) of every run, in order."""
        path = self.root / "runs"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(name, f"{function}.1", int(n)) for name, function, n in map(str.split, lines)]

    def kill(self) -> None:
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.fixture(scope="module")
def lab() -> Iterator[Federation]:
    """The compose file, brought up once; each test leaves it whole."""
    reason = why_no_engine()
    if reason is not None:
        missing(reason)
    with federation(build_image()) as found:
        yield found


@pytest.fixture
def nodes(lab: Federation) -> Iterator[dict[str, Inside]]:
    """The three servers, by name."""
    found = {name: Inside(server) for name, server in lab.servers.items()}
    yield found
    for node in found.values():
        node.close()


@pytest.fixture
def backends(tmp_path: Path) -> Iterator[Backends]:
    """Backends of one test; they are killed at its end."""
    made = Backends(tmp_path)
    yield made
    made.kill()


class Traffic:
    """Two feeds that grow, followed everywhere, and tasks that every node asks for."""

    def __init__(self, nodes: dict[str, Inside]) -> None:
        self.nodes = nodes
        self.writers = {name: Writer(nodes[name]) for name in ("north", "south")}
        feeds = [writer.feed for writer in self.writers.values()]
        self.followers = [Follower(node, feeds) for node in nodes.values()]
        self.requesters = [Requester(node) for node in nodes.values()]

    def __enter__(self) -> Traffic:
        for worker in self._all():
            worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all():
            worker.tell()
        for worker in self._all():
            worker.join()

    def _all(self) -> list[Worker]:
        return [*self.writers.values(), *self.requesters, *self.followers]

    def tasks(self) -> list[Task]:
        return [task for requester in self.requesters for task in requester.tasks]

    def lag(self, reader: str, writer: str) -> int:
        """How many acknowledged messages of a writer are not at another node."""
        one = self.writers[writer]
        acked = one.acked
        return acked - count(self.nodes[reader], one.feed)

    def flows(self) -> bool:
        """Whether every node has some of both feeds, and of each node a task is final."""
        read = all(count(node, one.feed) > 5 for one in self.writers.values() for node in self.nodes.values())
        return read and all(any(task.is_final() for task in list(one.tasks)) for one in self.requesters)

    def stop_writing(self) -> None:
        """No new messages and tasks; what is under way is done to its end."""
        for worker in (*self.writers.values(), *self.requesters):
            worker.tell()
        for worker in (*self.writers.values(), *self.requesters):
            worker.join()

    def is_everywhere(self) -> bool:
        return all(count(node, one.feed) == one.acked for one in self.writers.values() for node in self.nodes.values())


def check_feeds(traffic: Traffic) -> int:
    """Every node has the same messages, which are those that were acknowledged, once and in order; how many."""
    total = 0
    for name, writer in traffic.writers.items():
        copies = [messages_of(node, writer.feed, SUBFEED, signed=True) for node in traffic.nodes.values()]
        said = [message["body"]["message"] for message in copies[0]]
        assert said == [{"n": n, "by": name} for n in range(writer.acked)]
        assert copies[1] == copies[2] == copies[0]
        total += len(said)
    return total


def check_tasks(tasks: list[Task], nodes: dict[str, Inside], backends: Backends) -> Counter[str]:
    """Every node tells the same final status of each task, no action was done twice, and results are right; how often
    each status came."""
    runs = Counter((function, n) for _, function, n in backends.runs())
    ids = [node.server.node_id for node in nodes.values()]
    found: Counter[str] = Counter()
    for task in tasks:
        (status, message), *others = [task.state(node) for node in nodes.values()] + [task.state()]
        assert others == [(status, message)] * len(nodes), task
        found[f"{KINDS[task.function]} {status}"] += 1
        ran = runs[task.function, task.n]
        if KINDS[task.function] == "action":
            assert ran <= 1, task
        if status == "finished":
            assert ran >= 1, task
            check_result(task, nodes["hub"])
        else:
            # A backend that was lost, or kachery-client's, which gives up a result that it cannot upload at once.
            assert message is not None
            assert any(one in message for one in ids) or "Problem updating task status to finished" in message, message
    return found


def check_result(task: Task, hub: Inside) -> None:
    if task.result_url is None:
        assert KINDS[task.function] == "action"
        return
    answer = hub.request("GET", urlsplit(task.result_url).path, auth=False)
    assert answer.status == 200, (task, answer.body)
    assert json.loads(answer.body)["n"] == (2 * task.n if task.function == "double.1" else task.n)


def heal(row: str, traffic: Traffic, held: list[Task], backends: Backends, healed: float) -> None:
    """What has to be so within 30 s after the cut has ended, and how soon it was."""
    traffic.stop_writing()
    wait_for(traffic.is_everywhere, "every message is everywhere", 120)
    feeds = time.monotonic() - healed
    tasks = [*held, *traffic.tasks()]
    open_tasks = list(tasks)

    def all_final() -> bool:
        open_tasks[:] = [task for task in open_tasks if not task.is_final()]
        return not open_tasks

    wait_for(all_final, f"every task is final: {open_tasks}", 120)
    ended = time.monotonic() - healed
    messages = check_feeds(traffic)
    statuses = check_tasks(tasks, traffic.nodes, backends)
    report(
        f"network cut: {row}",
        messages + len(tasks),
        acked=sum(writer.acked for writer in traffic.writers.values()),
        stored=messages,
        messages_after_seconds=round(feeds, 1),
        tasks=len(tasks),
        tasks_after_seconds=round(ended, 1),
        statuses=histogram(statuses.elements()),
    )
    assert feeds < HEAL_SECONDS
    assert ended < HEAL_SECONDS


Cut = Callable[[Federation, str], AbstractContextManager[None]]


@pytest.mark.parametrize(
    ("cut", "name", "seconds"),
    [(unplugged, "south", 12), (unplugged, "hub", 15), (paused, "hub", 15), (paused, "south", 12)],
)
def test_a_short_cut(
    lab: Federation, nodes: dict[str, Inside], backends: Backends, cut: Cut, name: str, seconds: float
) -> None:
    """Longer than silence is borne, and shorter than a lease: what was under way goes on where it was."""
    for one in ("north", "south"):
        backends.start(nodes[one], *KINDS)
    with Traffic(nodes) as traffic:
        wait_for(traffic.flows, "feeds and tasks flow", 120)
        wait_for(lambda: {one for one, *_ in backends.runs()} == {"north", "south"}, "both backends work", 120)
        before = traffic.writers["south"].acked
        with cut(lab, name):
            time.sleep(seconds)
            if cut is paused and name == "south":
                assert traffic.writers["south"].acked - before <= 1, "nothing was cut"
            else:
                assert traffic.lag("south", "north") > seconds, "nothing was cut"
        heal(f"{name} {cut.__name__} for {seconds} s", traffic, [], backends, time.monotonic())


def test_a_cut_that_outlasts_the_leases(lab: Federation, nodes: dict[str, Inside], backends: Backends) -> None:
    """A calculation of the node that is away is done elsewhere; its action is an error that names the node."""
    south = nodes["south"]
    for function in ("double.1", "act.1"):
        backends.start(south, function)
    action, calculation = ask(nodes["north"], "act.1", 15), ask(nodes["hub"], "double.1", 15)
    held = {("south", task.function, task.n) for task in (action, calculation)}
    wait_for(lambda: held <= set(backends.runs()), "south works on both", 60)
    backends.start(nodes["north"], *KINDS)
    with Traffic(nodes) as traffic:
        wait_for(lambda: ("north", "look.1") in {run[:2] for run in backends.runs()}, "north works", 60)
        with unplugged(lab, "south"):
            time.sleep(45)
            assert traffic.lag("south", "north") > 45, "nothing was cut"
        heal("south unplugged for 45 s", traffic, [action, calculation], backends, time.monotonic())
    status, message = action.state()
    assert status == "error" and message is not None and south.server.node_id in message
    assert calculation.state() == ("finished", None)
    assert ("north", "double.1", calculation.n) in backends.runs()
