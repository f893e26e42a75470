"""C5, O1, O4 for tasks: lost answers, a network that is cut, stops, clocks."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.faults.report import report, wait_for, without
from tests.faults.task_backends import Make, Polls, a_lab, ask, done, register, wait
from tests.federations import CHANNEL, Federation, node_id
from tests.proxies import LosingProxy
from tests.servers import RunningNode

pytestmark = pytest.mark.slow

Far = tuple[Federation, RunningNode, LosingProxy]


@pytest.fixture
def make_far(make_node: Make) -> Iterator[Callable[..., Far]]:
    """Makes a hub, and a member that reaches it through a proxy."""
    with ExitStack() as stack:

        def make(prefix: Sequence[str] = (), seconds: float = 6) -> Far:
            hub = make_node("hub", prefix=prefix, env={"KACHERY_LAB_TASK_LEASE_SECONDS": str(seconds)}).start()
            lab = Federation(hub, {})
            lab.make_channel(CHANNEL)
            proxy = stack.enter_context(LosingProxy(hub.port))
            node = make_node("far", prefix=prefix, env={"KACHERY_LAB_HUB_URL": proxy.url}).start()
            lab.approve(node_id(node))
            lab.join(hub)
            lab.join(node)
            lab.members["far"] = node
            lab.settle()
            return lab, node, proxy

        yield make


# -- C5 ----------------------------------------------------------------------------------------------------------------


def test_c5_lost_answers_to_claims_and_reports(make_far: Callable[..., Far]) -> None:
    """The hub's answers to a claim and to a final status are lost: each task is given out once and ends once."""
    lab, far, proxy = make_far()
    trials = 12
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


def test_c5_a_repeated_request(make_far: Callable[..., Far]) -> None:
    """Asking again with the same request id is the same task, whatever was lost; with another function it is a 409."""
    lab, far, proxy = make_far()
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


def test_c5_control_claims_not_repeated(make_far: Callable[..., Far]) -> None:
    """A claim that is not granted again is held by nobody who knows it: the task lies there, or is given up."""
    lab, far, proxy = make_far(without("claims_not_repeated"))
    with Polls(far, finish=True) as polls:
        proxy.losing += ["claim"]
        task = ask(lab.hub, 1).json()["taskId"]
        late = wait(lab.hub, task, 3000)["status"]
    assert late in ("waiting", "error")
    assert not polls.given
    report("C5 control: claims not repeated", 1, lost=1)


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


def test_a_final_status_that_the_hub_could_not_be_told(make_far: Callable[..., Far]) -> None:
    """The node keeps it, also over its own restart, and the hub knows it soon after it can be reached."""
    lab, far, proxy = make_far(seconds=40)
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


def test_a_cut_that_outlasts_the_lease(make_far: Callable[..., Far]) -> None:
    """A calculation runs elsewhere, an action is an error that names the node; what comes later changes nothing."""
    lab, far, proxy = make_far()
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
