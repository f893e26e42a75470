"""C4: a second server on the same storage or metadata; a server that died leaves nothing that stops the next."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable

from tests.faults.report import report
from tests.faults.test_f13_volume import refusal
from tests.faults.tools import restart, sha1_of, without
from tests.servers import RunningNode

TAKEOVER_SECONDS = 60
Make = Callable[..., RunningNode]


def twin(make_node: Make, node: RunningNode, name: str, **more: object) -> RunningNode:
    """Another server, on a port of its own, with this one's directories unless others are given."""
    made = make_node(name, **{"storage": node.storage, "metadata": node.metadata, **more})
    made.port = 0
    return made


def refused_by(second: RunningNode, first: RunningNode) -> str:
    """The second does not start and names the first: machine and process."""
    assert first.process is not None
    text = refusal(second)
    assert str(first.process.pid) in text, text
    assert socket.gethostname() in text, text
    return text


def test_same_storage_and_metadata(make_node: Make) -> None:
    first = make_node("first").start()
    assert first.store(b"one").status == 200
    second = twin(make_node, first, "second")
    refused_by(second, first)
    assert first.store(b"two").status == 200
    assert first.request("GET", "/readyz", auth=False).status == 200
    first.kill()
    began = time.monotonic()
    restart(second)
    seconds = time.monotonic() - began
    assert seconds < TAKEOVER_SECONDS
    for data in (b"one", b"two"):
        path = f"/api/v1/blobs/{sha1_of(data)}"
        assert second.request("GET", path, auth=second.admin_token).body == data
    report("C4 same storage and metadata", 1, lost=0, takeover_ms=round(seconds * 1000))


def test_two_metadata_directories_on_one_storage(make_node: Make) -> None:
    """With an empty database, with a copy of the first's, and by the command that may fill an empty one."""
    first = make_node("first").start()
    fresh = make_node("fresh", storage=first.storage)
    text = refusal(fresh)
    assert "the database knows nothing of it" in text
    assert "kachery-lab reindex" in text
    assert first.store(b"one").status == 200
    done = fresh.run_cli("reindex")
    assert done.returncode == 1
    assert first.process is not None
    assert str(first.process.pid) in done.stderr
    copy = make_node("copy", storage=first.storage)
    for path in first.metadata.glob("kachery-lab.db*"):
        shutil.copy(path, copy.metadata)
    refused_by(copy, first)
    assert first.store(b"two").status == 200
    first.kill()
    began = time.monotonic()
    restart(copy)
    seconds = time.monotonic() - began
    assert seconds < TAKEOVER_SECONDS
    assert copy.store(b"three").status == 200
    report("C4 two metadata directories", 3, lost=0, takeover_ms=round(seconds * 1000))


def test_control_no_locks(make_node: Make) -> None:
    """Without the locks two servers write to one storage: the row can fail."""
    first = make_node("first").start()
    second = twin(make_node, first, "second")
    second.prefix = without("no_locks")
    restart(second)
    running = [node.request("GET", "/livez", auth=False).status for node in (first, second)]
    report("C4 control: no locks", 1, servers=running.count(200))
    assert running == [200, 200]
