"""F6: an I/O error at a write or a flush. The flush is never tried again on the same descriptor."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.report import histogram, messages_of, report
from tests.faults.tools import (
    SUBFEED,
    Ledger,
    Point,
    append,
    calls,
    create_feed,
    leftovers,
    need_strace,
    next_draft,
    restart,
    rows,
    sha1_of,
    strace,
    without,
)
from tests.servers import RunningNode, blob_path

TRACED = "trace=openat,write,fsync,ftruncate,unlink,close,link"


def failing(call: str, path: str, when: str = "1") -> list[str]:
    """strace's options: everything on the path is seen, one use of `call` fails."""
    return ["-P", path, "-e", TRACED, "-e", f"inject={call}:error=EIO:when={when}"]


def flushes(log: Path, path: str) -> list[str]:
    """What each fsync on a path got: the rest of its line, descriptor first."""
    return [rest for _, call, found, rest in calls(log) if call == "fsync" and found == path]


@pytest.mark.parametrize("size", [4096, 3_000_000], ids=["small", "large"])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_store(node: RunningNode, tmp_path: Path, call: str, size: int) -> None:
    need_strace()
    data = os.urandom(size)
    sha1 = sha1_of(data)
    draft = next_draft(node)
    with strace(node, tmp_path / "trace", *failing(call, draft)):
        refused = node.store(data)
    assert refused.status == 503, refused.body
    assert int(refused.headers["retry-after"]) > 0
    tried = flushes(tmp_path / "trace", draft)
    assert len(tried) == (1 if call == "fsync" else 0), tried
    assert all("(INJECTED)" in line for line in tried)
    assert leftovers(node.storage) == []
    assert not blob_path(node.storage, sha1).exists()
    assert sha1 not in rows(node)[0]
    assert node.store(data).status == 200
    assert blob_path(node.storage, sha1).read_bytes() == data
    report(
        f"F6 store {size} B, {call}",
        1,
        fsync_retries=max(0, len(tried) - 1),
        leaked_bytes=0,
        status_histogram=histogram([refused.status]),
    )


def test_control_fsync_again(make_node: Any, tmp_path: Path) -> None:
    """A server that tries again acknowledges, and the trace tells: the row can fail."""
    need_strace()
    node = make_node(prefix=without("fsync_again")).start()
    draft = next_draft(node)
    with strace(node, tmp_path / "trace", *failing("fsync", draft)):
        status = node.store(os.urandom(4096)).status
    tried = flushes(tmp_path / "trace", draft)
    report("F6 control: fsync tried again", 1, fsync_retries=len(tried) - 1, status_histogram=histogram([status]))
    assert (status, len(tried)) == (200, 2)


def test_readiness_goes_after_three_failures(node: RunningNode, tmp_path: Path) -> None:
    """While every flush fails: ready after two failures, not after three, and again when a probe works."""
    need_strace()

    def ready() -> int:
        return node.request("GET", "/readyz", auth=False).status

    statuses = []
    everything = ["-e", "trace=fsync", "-e", "inject=fsync:error=EIO"]
    with strace(node, tmp_path / "trace", *everything):
        for expected in (200, 200, 503):
            statuses.append(node.store(os.urandom(4096)).status)
            assert ready() == expected
        assert node.request("GET", "/livez", auth=False).status == 200
        problem = node.request("GET", "/readyz", auth=False)
        assert "storage" in problem.json()["problems"][0]
    assert statuses == [503, 503, 503]
    assert ready() == 200
    assert node.store(os.urandom(4096)).status == 200
    assert leftovers(node.storage) == []
    report("F6 readiness", 3, status_histogram=histogram(statuses), leaked_bytes=0)


def test_control_trouble_is_forgotten(make_node: Any, tmp_path: Path) -> None:
    need_strace()
    node = make_node(prefix=without("trouble_is_forgotten")).start()
    with strace(node, tmp_path / "trace", "-e", "trace=fsync", "-e", "inject=fsync:error=EIO"):
        for _ in range(3):
            assert node.store(os.urandom(4096)).status == 503
        ready = node.request("GET", "/readyz", auth=False).status
    report("F6 control: failures not counted", 3, ready=ready)
    assert ready == 200


@pytest.mark.parametrize("restarted", ["at once", "later"])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_feeds_log(node: RunningNode, tmp_path: Path, call: str, restarted: str) -> None:
    """Refused messages never come back, whether the next thing is an append or a restart."""
    need_strace()
    feed_id = create_feed(node)
    ledger = Ledger()
    assert append(node, feed_id, [{"n": 0}]).json()["position"] == 0
    ledger.append(feed_id, SUBFEED, 0, [{"n": 0}])
    log = str(node.storage / "feeds-log" / "00000001.log")
    with strace(node, tmp_path / "trace", *failing(call, log)):
        refused = append(node, feed_id, [{"n": "refused"}])
        if restarted == "later":
            # The fault is counted for each thread of the server, so it may strike again on another one.
            for _ in range(40):
                answer = append(node, feed_id, [{"n": 1}], expectedPosition=1)
                if answer.status != 503:
                    break
            assert (answer.status, answer.json()["position"]) == (200, 1)
            ledger.append(feed_id, SUBFEED, 1, [{"n": 1}])
    assert refused.status == 503, refused.body
    assert int(refused.headers["retry-after"]) > 0
    tried = flushes(tmp_path / "trace", log)
    if call == "fsync":
        assert "(INJECTED)" in tried[0]
        failed = tried[0].split("<")[0]
        assert all(line.split("<")[0] != failed for line in tried[1:]), tried
    assert not ledger.check(node)
    node.kill() if call == "write" else node.terminate()
    restart(node)
    found = ledger.check(node)
    assert not found, found
    answer = append(node, feed_id, [{"n": "last"}])
    assert (answer.status, answer.json()["position"]) == (200, len(ledger.messages[feed_id, SUBFEED]))
    report(f"F6 feeds log, {call}, restart {restarted}", 1, acked=ledger.acked, lost=0, wrong=0, fsync_retries=0)


def test_log_that_stays_broken(node: RunningNode, tmp_path: Path) -> None:
    """Every flush of the log fails for a while: everything is refused, then it works; nothing refused comes back."""
    need_strace()
    feed_id = create_feed(node)
    assert append(node, feed_id, [{"n": 0}]).status == 200
    log = str(node.storage / "feeds-log" / "00000001.log")
    with strace(node, tmp_path / "trace", *failing("fsync", log, "1+")):
        statuses = [append(node, feed_id, [{"n": f"refused {number}"}]).status for number in range(4)]
        assert node.store(b"blobs are another matter").status == 200
    assert statuses == [503] * 4
    assert append(node, feed_id, [{"n": 1}]).json()["position"] == 1
    assert node.process is not None
    node.process.send_signal(signal.SIGKILL)
    node.process.wait(10)
    restart(node)
    assert messages_of(node, feed_id, SUBFEED) == [{"n": 0}, {"n": 1}]
    report("F6 feeds log stays broken", 4, acked=2, lost=0, wrong=0, status_histogram=histogram(statuses))


def test_control_no_repair(make_node: Any, tmp_path: Path) -> None:
    """A log that keeps what a failed append left brings the refused messages back: the row can fail."""
    need_strace()
    node = make_node(prefix=without("no_repair")).start()
    feed_id = create_feed(node)
    assert append(node, feed_id, [{"n": 0}]).status == 200
    log = str(node.storage / "feeds-log" / "00000001.log")
    point = Point("fsync", log)
    with strace(node, tmp_path / "trace", *point.options(log, "error=EIO")):
        assert append(node, feed_id, [{"n": "refused"}]).status == 503
    node.kill()
    node.prefix = ()
    restart(node)
    found = messages_of(node, feed_id, SUBFEED)
    report("F6 control: the log is not mended", 1, wrong=len(found) - 1)
    assert found == [{"n": 0}, {"n": "refused"}]
