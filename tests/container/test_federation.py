"""Files, feeds and tasks between the three servers of `compose/federation.yaml`, by unmodified kachery-client."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.backends import ASK, BACKEND, FUNCTIONS, NAMES
from tests.clients.environment import client_python
from tests.container.engine import build_image, docker, why_no_engine
from tests.container.federation import CHANNEL, Federation, Server, federation

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def lab() -> Iterator[Federation]:
    """The compose file, brought up once for all tests here."""
    reason = why_no_engine()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)
    with federation(build_image()) as found:
        yield found


def test_a_file_is_loaded_on_another_node_on_demand(lab: Federation, tmp_path: Path) -> None:
    """Nobody has uploaded it: the bucket gets it because somebody asked."""
    content = os.urandom(300_000)
    path = tmp_path / "trial.bin"
    path.write_bytes(content)
    sha1 = hashlib.sha1(content).hexdigest()
    uri = lab.north.client("kachery-store", str(path))
    assert uri == f"sha1://{sha1}/trial.bin"
    assert not [item for item in lab.objects() if sha1 in item["path"]]

    said = lab.south.client("kachery-load", uri, "--channel", CHANNEL)
    loaded = Path(said.splitlines()[-1])
    assert loaded.is_relative_to(lab.south.storage)
    assert loaded.read_bytes() == content
    (item,) = [item for item in lab.objects() if sha1 in item["path"]]
    assert item["size"] == len(content)


APPEND = """
import json, sys
import kachery_client as kc

feed = kc.load_feed(sys.argv[1]) if sys.argv[1] else kc.create_feed("sessions")
feed.load_subfeed("main").append_messages(json.loads(sys.argv[2]))
print(feed.uri)
"""
FOLLOW = """
import json, sys
import kachery_client as kc

uri, channel, total = sys.argv[1:]
subfeed = kc.load_feed(uri).load_subfeed("main", channel=channel)
while subfeed.position < int(total):
    for message in subfeed.get_next_messages(wait_msec=10_000):
        print(json.dumps(message), flush=True)
"""


def test_a_feed_is_followed_on_the_other_nodes(lab: Federation) -> None:
    """Followers that have the first messages get the ones that are appended then."""
    first, later = [{"n": 0}, {"n": 1}], [{"n": 2}, {"n": 3}, {"n": 4}]
    uri = lab.north.python(APPEND, "", json.dumps(first)).splitlines()[-1]
    total = str(len(first + later))
    followers = [
        server.start_client(str(client_python()), "-c", FOLLOW, uri, CHANNEL, total) for server in (lab.south, lab.hub)
    ]
    try:
        for follower in followers:
            assert follower.stdout is not None
            assert [json.loads(follower.stdout.readline()) for _ in first] == first
        lab.north.python(APPEND, uri, json.dumps(later))
        for follower in followers:
            rest, _ = follower.communicate(timeout=60)
            assert [json.loads(line) for line in rest.splitlines()] == later
    finally:
        for follower in followers:
            follower.kill()


@pytest.fixture(scope="module")
def backend(lab: Federation) -> Iterator[Path]:
    """kachery-client's own task backend at north; the file in which the functions write down that they ran."""
    runs, log = lab.root / "runs", lab.root / "backend.log"
    with log.open("w") as out:
        process = lab.north.start_client(
            str(client_python()), "-c", FUNCTIONS + BACKEND, CHANNEL, "", *NAMES,
            env={"TASK_RUNS": str(runs), "TASK_BACKEND": "north", "PYTHONUNBUFFERED": "1"},
            stdout=out, start_new_session=True,
        )  # fmt: skip
    try:
        yield runs
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def ask(server: Server, function: str, kind: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """kachery-client's `request_task` and `wait` there."""
    said = server.python(ASK, CHANNEL, function, kind, "40", "0", json.dumps([kwargs]))
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("function", "kind", "result"),
    [
        ("double.1", "pure-calculation", {"n": 42}),
        ("look.1", "query", {"n": 21, "by": "north"}),
        ("act.1", "action", True),
    ],
)
def test_a_backend_on_one_node_serves_another(
    lab: Federation, backend: Path, function: str, kind: str, result: Any
) -> None:
    found = ask(lab.south, function, kind, {"n": 21})
    assert (found.get("status"), found.get("result")) == ("finished", result), found
    ran = [line.split() for line in backend.read_text().splitlines()]
    assert ran.count(["north", function.removesuffix(".1"), "21"]) == 1


def effective_roles(lab: Federation) -> dict[str, list[str]]:
    """What each member may do in the channel."""
    rows = lab.admin(f"/channels/{CHANNEL}/memberships")["memberships"]
    return {row["nodeId"]: row["effective"] for row in rows}


@pytest.mark.slow
def test_letting_the_nodes_in_again_changes_nothing(lab: Federation) -> None:
    """`up` starts the container that has ended anew."""
    before = effective_roles(lab)
    docker("start", lab.enrol)
    assert docker("wait", lab.enrol, seconds=180).stdout.strip() == "0", docker("logs", lab.enrol).stdout
    assert effective_roles(lab) == before
    assert set(before) == {server.node_id for server in lab.servers.values()}
