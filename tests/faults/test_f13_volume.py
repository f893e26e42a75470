"""F13: the volume is not mounted, is another one, or is read-only. Nothing is written where it does not belong, and
"empty" never means "all deleted"."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.faults.report import histogram, missing, report
from tests.faults.tools import (
    Ledger,
    LoggedNode,
    append,
    create_feed,
    link_body,
    loop_disk,
    restart,
    rows,
    sha1_of,
    without,
)
from tests.servers import RunningNode, files_below

pytestmark = pytest.mark.slow

DATA = b"a blob of the lab"
SHA1 = sha1_of(DATA)


def refusal(node: RunningNode) -> str:
    """What a start that is refused prints since now. Fails when it is not refused."""
    before = len(node.log)
    node.launch()
    assert node.process is not None
    try:
        assert node.process.wait(20) == 1
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the server runs:\n{node.log[before:]}") from None
    text = node.log[before:]
    assert "Traceback" not in text, text
    return text


def index(node: RunningNode) -> tuple[dict[str, int], set[str]]:
    return rows(node)


def test_unmounted_wrong_and_right_volume(tmp_path: Path) -> None:
    """The mount point is empty, then holds another volume, then the right one."""
    log = tmp_path / "log"
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    with loop_disk("ext4", tmp_path, "right", 64) as right, loop_disk("ext4", tmp_path, "wrong", 64) as wrong:
        other = LoggedNode(wrong.place, tmp_path / "metadata-other", log_file=log)
        other.metadata.mkdir()
        other.start()
        assert other.terminate() == 0
        node = LoggedNode(right.place, metadata, log_file=log).start()
        try:
            assert node.store(DATA).status == 200
            node.terminate()
            before = index(node)
            volume = (right.place / ".kachery-volume").read_text().strip()

            right.umount()
            text = refusal(node)
            assert "no kachery volume" in text
            assert volume in text
            assert str(right.place) in text
            assert list(right.place.iterdir()) == []
            assert index(node) == before

            wrong_id = (wrong.place / ".kachery-volume").read_text().strip()
            held = _snapshot(wrong.place)
            node.storage = wrong.place
            text = refusal(node)
            assert volume in text
            assert wrong_id in text
            assert _snapshot(wrong.place) == held
            assert index(node) == before

            node.storage = right.place
            right.mount()
            restart(node)
            assert node.request("GET", f"/api/v1/blobs/{SHA1}", auth=node.admin_token).body == DATA
            assert index(node) == before
        finally:
            node.kill()
            other.kill()
    report("F13 unmounted, wrong volume", 2, rows_deleted=0, written_below=0, lost=0)


def _snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in files_below(root)}


def test_unmounted_while_it_runs(tmp_path: Path) -> None:
    """A lazy unmount under a running server: 503, not 404 and not "deleted"; the bare directory stays bare."""
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    with loop_disk("ext4", tmp_path, "disk", 64) as disk:
        node = LoggedNode(disk.place, metadata, log_file=tmp_path / "log").start()
        code = node.code
        headers = {"KACHERY-CLIENT-AUTH-CODE": code}
        linked = tmp_path / "linked"
        linked.write_bytes(b"linked")
        try:
            feed_id = create_feed(node)
            assert append(node, feed_id, [{"n": 0}]).status == 200
            assert node.store(DATA).status == 200
            before = index(node)
            subprocess.run(["umount", "-l", str(disk.place)], check=True)
            token = node.admin_token
            path = f"/api/v1/blobs/{SHA1}"
            statuses = {
                "get": node.request("GET", path, auth=token).status,
                "get of an unknown": node.request("GET", f"/api/v1/blobs/{'0' * 40}", auth=token).status,
                "store": node.request("POST", "/store", b"new", headers, auth=False).status,
                "linkFile": node.post("/linkFile", link_body(linked), auth=token).status,
                "delete": node.request("DELETE", path, auth=token).status,
                "readyz": node.request("GET", "/readyz", auth=False).status,
            }
            assert statuses == dict.fromkeys(statuses, 503), statuses
            assert node.request("GET", "/livez", auth=False).status == 200
            assert list(disk.place.iterdir()) == []
            assert index(node) == before
            node.kill()
            disk.mount()
            restart(node)
            assert node.request("GET", path, auth=token).body == DATA
            assert node.request("GET", f"/api/v1/blobs/{'0' * 40}", auth=token).status == 404
            assert node.request("DELETE", path, auth=token).status == 204
        finally:
            node.kill()
    report("F13 unmounted while it runs", 6, rows_deleted=0, written_below=0, status_histogram=histogram([503] * 6))


def test_read_only(tmp_path: Path) -> None:
    """Read-only from one moment to the next: writes are 503, reads go on, nothing is forgotten; a start is refused."""
    metadata = tmp_path / "metadata"
    metadata.mkdir()
    with loop_disk("ext4", tmp_path, "disk", 64) as disk:
        node = LoggedNode(disk.place / "storage", metadata, log_file=tmp_path / "log")
        node.storage.mkdir()
        node.start()
        linked = tmp_path / "linked"
        linked.write_bytes(b"linked")
        ledger = Ledger()
        try:
            assert node.store(DATA).status == 200
            ledger.store(SHA1, len(DATA))
            before = index(node)
            _fail(disk.place)
            with pytest.raises(OSError, match="Read-only file system"):
                (disk.place / "probe").touch()
            statuses = [
                node.store(b"new").status,
                node.post("/linkFile", link_body(linked)).status,
                node.request("DELETE", f"/api/v1/blobs/{SHA1}", auth=node.admin_token).status,
                node.post("/mutable/set", {"key": "key", "value": 1}).status,
            ]
            assert statuses == [503] * 4
            assert node.request("GET", f"/api/v1/blobs/{SHA1}", auth=node.admin_token).body == DATA
            assert node.request("GET", "/readyz", auth=False).status == 503
            node.kill()
            text = refusal(node)
            assert "Read-only file system" in text
            assert str(node.storage) in text
            disk.umount()
            disk.mount()
            restart(node)
            found = ledger.check(node)
            assert not found, found
            assert index(node) == before
            assert node.store(b"new").status == 200
        finally:
            node.kill()
    report("F13 read-only", 4, rows_deleted=0, lost=0, wrong=0, status_histogram=histogram(statuses))


def _fail(place: Path) -> None:
    """What `errors=remount-ro` does: the kernel finds the file system damaged and refuses writes from now on, although
    files are open for writing, which keeps everybody else from remounting it."""
    subprocess.run(["mount", "-o", "remount,errors=remount-ro", str(place)], check=True, capture_output=True)
    device = place.stat().st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    trigger = Path(f"/sys/fs/ext4/{name}/trigger_fs_error")
    if not trigger.exists():
        missing("this kernel cannot pretend that ext4 is damaged")
    trigger.write_text("1")


def test_empty_database(make_node: Any) -> None:
    """A volume with an id and no database: refused, pointing to reindex, which mends it."""
    node = make_node().start()
    feed_id = create_feed(node)
    assert append(node, feed_id, [{"n": 0}]).status == 200
    assert node.store(DATA).status == 200
    node.terminate()
    for path in node.metadata.glob("kachery-lab.db*"):
        path.unlink()
    held = _snapshot(node.storage)
    text = refusal(node)
    assert "kachery-lab reindex" in text
    assert held[".kachery-volume"].decode().strip() in text
    assert _snapshot(node.storage) == held
    done = node.run_cli("reindex")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["blobs"] == 1
    restart(node)
    ledger = Ledger()
    ledger.store(SHA1, len(DATA))
    ledger.append(feed_id, "5" * 40, 0, [{"n": 0}])
    found = ledger.check(node)
    assert not found, found
    assert append(node, feed_id, [{"n": 1}]).json()["position"] == 1
    report("F13 empty database", 1, acked=ledger.acked, lost=0, wrong=0)


def test_control_any_volume(make_node: Any) -> None:
    """Without the comparison the server makes itself at home in the bare directory: the row can fail."""
    node = make_node().start()
    assert node.store(DATA).status == 200
    node.terminate()
    away = node.storage.with_name("away")
    node.storage.rename(away)
    node.storage.mkdir()
    node.prefix = without("any_volume")
    # It may refuse later for another reason; what counts is what it wrote.
    node.launch()
    assert node.process is not None
    try:
        node.process.wait(3)
    except subprocess.TimeoutExpired:
        node.kill()
    written = list(node.storage.iterdir())
    report("F13 control: any volume", 1, written_below=len(written))
    assert written
