"""F4: no space, or no quota, at each step of a store, of an append to a log and of a database commit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.report import histogram, messages_of, report
from tests.faults.tools import (
    SUBFEED,
    Ledger,
    Point,
    append,
    create_feed,
    leftovers,
    need_strace,
    next_draft,
    restart,
    rows,
    sha1_of,
    strace,
    without,
    wrong_bytes,
)
from tests.servers import RunningNode, blob_path

FULL = ("ENOSPC", "EDQUOT")
STEPS: dict[str, tuple[str, str]] = {
    "make the draft": ("openat", "draft"),
    "write the draft": ("write", "draft"),
    "flush the draft": ("fsync", "draft"),
    "close the draft": ("close", "final"),
    "make the first directory": ("mkdir", "aa"),
    "make the last directory": ("mkdir", "cc"),
    "give the name": ("renameat2", "draft"),
    "open the directory": ("openat", "cc"),
    "flush the directory": ("fsync", "cc"),
    "flush a parent": ("fsync", "aa"),
}
NAMED = ("close the draft", "open the directory", "flush the directory", "flush a parent")
"""Steps after the name was given: complete bytes may lie there, without a row, which is legal."""


def paths(node: RunningNode, sha1: str) -> dict[str, str]:
    final = blob_path(node.storage, sha1)
    cc, bb, aa = final.parents[:3]
    return {"draft": next_draft(node), "final": str(final), "cc": str(cc), "bb": str(bb), "aa": str(aa)}


def unused(node: RunningNode) -> bytes:
    """Bytes whose directories do not exist yet."""
    while True:
        data = os.urandom(4096)
        if not (node.storage / "sha1" / sha1_of(data)[:2]).exists():
            return data


def test_every_step_of_a_store(node: RunningNode, tmp_path: Path) -> None:
    need_strace()
    ledger = Ledger()
    statuses = []
    for error in FULL:
        for step, (call, place) in STEPS.items():
            data = unused(node)
            sha1 = sha1_of(data)
            path = paths(node, sha1)[place]
            with strace(node, tmp_path / "trace", *Point(call, path).options(path, f"error={error}")):
                answer = node.store(data)
                assert "(INJECTED)" in (tmp_path / "trace").read_text(), step
            statuses.append(answer.status)
            assert answer.status == 507, (step, error, answer.body)
            assert b"full" in answer.body, answer.body
            assert leftovers(node.storage) == [], step
            assert sha1 not in rows(node)[0], step
            assert step in NAMED or not blob_path(node.storage, sha1).exists(), step
            assert wrong_bytes(node.storage) == [], step
            # Room again: the same request, without a restart.
            again = node.store(data)
            assert (again.status, again.json().get("sha1")) == (200, sha1), step
            ledger.store(sha1, len(data))
    assert node.request("GET", "/readyz", auth=False).status == 200
    node.kill()
    restart(node)
    found = ledger.check(node)
    report(
        "F4 store",
        len(statuses),
        acked=ledger.acked,
        lost=len(found.lost),
        wrong=len(found.wrong),
        leaked_bytes=0,
        status_histogram=histogram(statuses),
    )
    assert not found


def test_the_own_api_answers_507_as_a_problem(node: RunningNode, tmp_path: Path) -> None:
    need_strace()
    data = unused(node)
    path = f"/api/v1/blobs/{sha1_of(data)}"
    draft = next_draft(node)
    with strace(node, tmp_path / "trace", *Point("fsync", draft).options(draft, "error=ENOSPC")):
        refused = node.request("PUT", path, data, auth=node.admin_token)
    assert refused.status == 507
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["code"] == "storage_full"
    assert node.request("GET", path, auth=node.admin_token).status == 404
    assert node.request("PUT", path, data, auth=node.admin_token).status == 201
    assert node.request("GET", path, auth=node.admin_token).body == data


@pytest.mark.parametrize("call", ["write", "fsync"])
@pytest.mark.parametrize("error", FULL)
def test_append_to_the_feeds_log(node: RunningNode, tmp_path: Path, call: str, error: str) -> None:
    """Refused messages are nowhere, not after the next append and not after a restart."""
    need_strace()
    feed_id = create_feed(node)
    assert append(node, feed_id, [{"n": 0}]).status == 200
    log = str(node.storage / "feeds-log" / "00000001.log")
    with strace(node, tmp_path / "trace", *Point(call, log).options(log, f"error={error}")):
        refused = append(node, feed_id, [{"n": "refused"}])
        assert "(INJECTED)" in (tmp_path / "trace").read_text()
    assert refused.status == 507, refused.body
    assert messages_of(node, feed_id, SUBFEED) == [{"n": 0}]
    node.kill()
    restart(node)
    assert messages_of(node, feed_id, SUBFEED) == [{"n": 0}]
    answer = append(node, feed_id, [{"n": 1}], expectedPosition=1)
    assert (answer.status, answer.json()["position"]) == (200, 1)
    node.kill()
    restart(node)
    assert messages_of(node, feed_id, SUBFEED) == [{"n": 0}, {"n": 1}]
    report(f"F4 log {call} {error}", 1, acked=2, lost=0, wrong=0, status_histogram=histogram([refused.status]))


Request = Callable[[RunningNode, str], Any]
COMMITS: dict[str, Request] = {
    "append": lambda node, feed_id: append(node, feed_id, [{"n": "again"}], requestId="once"),
    "mutable": lambda node, _: node.post("/mutable/set", {"key": "key", "value": "new"}),
    "store": lambda node, _: node.store(b"one store"),
}


@pytest.mark.parametrize(("call", "error"), [("pwrite64", "ENOSPC"), ("pwrite64", "EDQUOT"), ("fdatasync", "ENOSPC")])
def test_commit_of_the_database(node: RunningNode, tmp_path: Path, call: str, error: str) -> None:
    """SQLite calls only ENOSPC of a write "full"; the rest is an I/O error to it."""
    need_strace()
    feed_id = create_feed(node)
    assert append(node, feed_id, [{"n": 0}]).status == 200
    assert node.post("/mutable/set", {"key": "key", "value": "old"}).status == 200
    wal = str(node.metadata / "kachery-lab.db-wal")
    expected = 507 if (call, error) == ("pwrite64", "ENOSPC") else 503
    statuses = []
    for name, send in COMMITS.items():
        with strace(node, tmp_path / "trace", *Point(call, wal).options(wal, f"error={error}")):
            refused = send(node, feed_id)
            assert "(INJECTED)" in (tmp_path / "trace").read_text(), name
        statuses.append(refused.status)
        assert refused.status == expected, (name, refused.body)
        assert ("retry-after" in refused.headers) == (expected == 503)
        assert messages_of(node, feed_id, SUBFEED) == [{"n": 0}]
        assert node.post("/mutable/get", {"key": "key"}).json()["value"] == "old"
        assert sha1_of(b"one store") not in rows(node)[0]
    node.kill()
    restart(node)
    assert messages_of(node, feed_id, SUBFEED) == [{"n": 0}]
    assert node.post("/mutable/get", {"key": "key"}).json()["value"] == "old"
    for name, send in COMMITS.items():
        assert send(node, feed_id).status == 200, name
    assert messages_of(node, feed_id, SUBFEED) == [{"n": 0}, {"n": "again"}]
    assert node.post("/mutable/get", {"key": "key"}).json()["value"] == "new"
    assert rows(node)[0][sha1_of(b"one store")] == 9
    report(f"F4 commit {call} {error}", 3, lost=0, wrong=0, status_histogram=histogram(statuses))


def test_control_acknowledge_anyway(make_node: Any, tmp_path: Path) -> None:
    """A server that swallows the error acknowledges what it does not have: the row can fail."""
    need_strace()
    node = make_node(prefix=without("acknowledge_anyway")).start()
    data = unused(node)
    draft = next_draft(node)
    with strace(node, tmp_path / "trace", *Point("renameat2", draft).options(draft, "error=ENOSPC")):
        answer = node.store(data)
    assert answer.status == 200
    ledger = Ledger()
    ledger.store(sha1_of(data), len(data))
    found = ledger.check(node)
    report("F4 control: errors swallowed", 1, acked=1, lost=len(found.lost))
    assert found.lost
