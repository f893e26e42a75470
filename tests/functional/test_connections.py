"""How many connections a server takes, and the open files that it asks the system for."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from kachery_lab.http.descriptors import FEWEST, LOWERED, connections_within, descriptors_for
from kachery_lab.settings import Settings
from tests.faults.report import wait_for
from tests.servers import RunningNode, connections_of, files_below, free_port

Make = Callable[..., RunningNode]
DEFAULT = Settings.model_fields["max_connections"].default
SUBFEED = "0" * 40


def limited(*, soft: int | None = None, hard: int | None = None) -> list[str]:
    """A command prefix: so many open files are allowed, and so many could be asked for."""
    words = [f"ulimit -S -n {soft}"] if soft else []
    words += [f"ulimit -n {hard}"] if hard else []
    return ["sh", "-c", " && ".join([*words, 'exec "$@"']), "sh"]


def soft_limit(node: RunningNode) -> int:
    assert node.process is not None
    limits = Path(f"/proc/{node.process.pid}/limits").read_text()
    found = re.search(r"^Max open files +(\d+)", limits, re.MULTILINE)
    assert found is not None
    return int(found[1])


def refusal(node: RunningNode) -> str:
    """What a start says that is refused."""
    node.port = free_port()
    node.launch()
    assert node.process is not None
    assert node.process.wait(60) == 1
    assert files_below(node.storage) == []
    return node.log


def long_poll(node: RunningNode, feed: str) -> http.client.HTTPConnection:
    """A connection that waits for the first message of a feed."""
    watch = {"feedId": feed, "subfeedHash": SUBFEED, "position": 0, "channelName": "*local*"}
    body = json.dumps({"subfeedWatches": {"w": watch}, "waitMsec": 600_000})
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=120)
    headers = {"Content-Type": "application/json", "KACHERY-CLIENT-AUTH-CODE": node.code}
    connection.request("POST", "/feed/watchForNewMessages", body, headers)
    return connection


@pytest.mark.parametrize("most", [5, 6])
def test_as_many_connections_as_are_set_and_no_more(make_node: Make, most: int) -> None:
    node = make_node(env={"KACHERY_LAB_MAX_CONNECTIONS": str(most)}).start()
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    wait_for(lambda: connections_of(node.port) == 0, "the connections so far are closed")
    held = [long_poll(node, feed) for _ in range(5)]
    # Connections are taken in the order in which they came.
    further = node.request("GET", "/livez", auth=False)
    if most == 5:
        assert further.status == 503
        assert further.headers["retry-after"] == "5"
        assert b"5 connections" in further.body
        held.pop().close()
        wait_for(lambda: node.request("GET", "/livez", auth=False).status == 200, "there is room again")
    else:
        assert further.status == 200
    wait_for(lambda: _append(node, feed) == 200, "a message is appended")
    for connection in held:
        answer = connection.getresponse()
        assert answer.status == 200
        assert len(json.loads(answer.read())["messages"]["w"]) >= 1
        connection.close()


def _append(node: RunningNode, feed: str) -> int:
    body = {"feedId": feed, "subfeedHash": SUBFEED, "messages": [{"n": 1}]}
    return node.post("/feed/appendMessages", body).status


def test_the_soft_limit_of_open_files_is_raised_to_what_is_needed(make_node: Make) -> None:
    node = make_node(prefix=limited(soft=256), env={"KACHERY_LAB_MAX_CONNECTIONS": "100"}).start()
    assert soft_limit(node) == descriptors_for(100, 1)
    node.kill()
    figurl = {"KACHERY_LAB_FIGURL_PORT": str(free_port()), "KACHERY_LAB_FIGURL_USER": "admin"}
    node.env = {**node.env, **figurl}
    node.start()
    assert soft_limit(node) == descriptors_for(100, 2)
    node.kill()
    # A limit that is higher already is left alone.
    node.prefix = limited(soft=descriptors_for(100, 2) + 1)
    node.start()
    assert soft_limit(node) == descriptors_for(100, 2) + 1


def test_a_setting_that_cannot_be_kept_is_refused_and_says_what_can(make_node: Make) -> None:
    node = make_node(prefix=limited(hard=1000), env={"KACHERY_LAB_MAX_CONNECTIONS": "600"})
    told = refusal(node)
    assert "Traceback" not in told
    needed = descriptors_for(600, 1)
    assert f"KACHERY_LAB_MAX_CONNECTIONS=600 needs {needed} open files" in told
    assert "may open 1000" in told
    assert f"ulimit -n {needed}" in told
    assert f"--ulimit nofile={needed}:{needed}" in told
    found = re.search(r"set KACHERY_LAB_MAX_CONNECTIONS to (\d+) at most", told)
    assert found is not None
    most = int(found[1])
    node.env = {"KACHERY_LAB_MAX_CONNECTIONS": str(most + 1)}
    assert f"KACHERY_LAB_MAX_CONNECTIONS={most + 1} needs" in refusal(node)
    node.env = {"KACHERY_LAB_MAX_CONNECTIONS": str(most)}
    node.start()
    assert soft_limit(node) <= 1000
    node.kill()
    # The other way out.
    node.prefix = limited(hard=needed)
    node.env = {"KACHERY_LAB_MAX_CONNECTIONS": "600"}
    node.start()
    assert soft_limit(node) == needed


def test_the_default_is_lowered_with_a_warning(make_node: Make) -> None:
    node = make_node(prefix=limited(hard=1000)).start()
    fitting = connections_within(1000, 1)
    entries = [json.loads(line) for line in node.log.splitlines() if line.startswith("{")]
    (warning,) = (entry for entry in entries if entry["event"] == "fewer connections than by default")
    assert warning["level"] == "warning"
    assert (warning["connections"], warning["hard_limit"]) == (fitting, 1000)
    assert f"ulimit -n {descriptors_for(DEFAULT, 1)}" in warning["hint"]
    shown = node.run_cli("config", "--running").stdout.splitlines()
    assert f"KACHERY_LAB_MAX_CONNECTIONS={fitting}  # {LOWERED}" in shown


def test_no_lab_works_with_a_few_connections(make_node: Make) -> None:
    node = make_node(prefix=limited(hard=descriptors_for(FEWEST, 1) - 1))
    assert f"KACHERY_LAB_MAX_CONNECTIONS={DEFAULT} needs" in refusal(node)
    node = make_node("none", prefix=limited(hard=200))
    told = refusal(node)
    assert "may open 200" in told
    assert "at most" not in told


@pytest.mark.parametrize("listeners", [1, 2])
def test_the_most_connections_that_fit(listeners: int) -> None:
    for descriptors in range(2, 20_000, 7):
        fitting = connections_within(descriptors, listeners)
        assert fitting == 0 or descriptors_for(fitting, listeners) <= descriptors
        assert descriptors_for(fitting + 1, listeners) > descriptors
