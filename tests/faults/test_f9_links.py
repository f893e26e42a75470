"""F9: the file behind a link changes, disappears, or is replaced."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from hashlib import sha1
from pathlib import Path

from tests.faults.report import report, without
from tests.servers import Answer, RunningNode

MIB = 1 << 20
SIZES = [5000, 3 * MIB]
Make = Callable[..., RunningNode]


def link(node: RunningNode, path: Path) -> Answer:
    stat = path.stat()
    return node.post("/linkFile", {"localFilePath": str(path), "size": stat.st_size, "mtime": stat.st_mtime})


def readings(node: RunningNode, name: str) -> list[Answer]:
    key = {"fileKey": {"sha1": name}}
    answers = [node.request("GET", f"/api/v1/blobs/{name}"), node.post("/downloadFileData", key)]
    loaded = node.post("/loadFile", key)
    last = json.loads(loaded.body.rpartition(b"#")[2])
    if last["type"] == "finished":
        loaded.body = Path(last["localFilePath"]).read_bytes()
    else:
        gone = "link" in last["error"] or "set aside" in last["error"]
        loaded = Answer(410 if gone else 599, {}, last["error"].encode())
    return [*answers, loaded]


def rewrite(path: Path, other: bytes) -> None:
    """Other content of the same size and modification time, in the same inode."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(other)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace(path: Path, other: bytes) -> None:
    """Another file with the same name, size and modification time."""
    stat = path.stat()
    new = path.with_name("new")
    new.write_bytes(other)
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new.rename(path)


def replace_by_symlink(path: Path, other: bytes) -> None:
    """A symbolic link to a file that may be linked, of the same size and modification time."""
    stat = path.stat()
    target = path.with_name("target")
    target.write_bytes(other)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    path.unlink()
    path.symlink_to(target)


def append(path: Path, other: bytes) -> None:
    with path.open("ab") as file:
        file.write(other[:10])


def remove(path: Path, _other: bytes) -> None:
    path.unlink()


def become_directory(path: Path, _other: bytes) -> None:
    path.unlink()
    path.mkdir()


CHANGES = [rewrite, replace, replace_by_symlink, append, remove, become_directory]


def restore(path: Path, data: bytes, stat: os.stat_result) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_changed_file_is_never_served_under_the_old_name(node: RunningNode, tmp_path: Path) -> None:
    for change, size in itertools.product(CHANGES, SIZES):
        path = tmp_path / f"{change.__name__}-{size}"
        data, other = os.urandom(size), os.urandom(size)
        path.write_bytes(data)
        stat = path.stat()
        name = sha1(data).hexdigest()
        assert link(node, path).json()["sha1"] == name
        assert [answer.status for answer in readings(node, name)] == [200] * 3

        change(path, other)
        answers = readings(node, name)
        assert [answer.status for answer in answers] == [410] * 3, answers
        assert answers[0].json()["code"] in ("link_changed", "quarantined")
        assert b"again" in answers[0].body
        # The other content got no name of its own by this.
        assert node.request("GET", f"/api/v1/blobs/{sha1(other).hexdigest()}").status == 404

        restore(path, data, stat)
        answers = readings(node, name)
        if change in (rewrite, replace, replace_by_symlink):
            # Clients that mount the directory could not tell, so the record was taken away: link it anew.
            assert [answer.status for answer in answers] == [410] * 3
            assert link(node, path).json()["sha1"] == name
            answers = readings(node, name)
        assert [(answer.status, answer.body == data) for answer in answers] == [(200, True)] * 3
    trials = len(CHANGES) * len(SIZES)
    report("F9", trials, wrong=0, detected=f"{trials}/{trials}", restored=trials)


def test_a_large_file_that_is_rewritten_between_two_reads_is_noticed_by_its_ctime(
    node: RunningNode, tmp_path: Path
) -> None:
    """The fingerprint of a link is trusted without hashing; this is the case where only ctime tells."""
    path = tmp_path / "data"
    data = os.urandom(2 * MIB)
    path.write_bytes(data)
    name = sha1(data).hexdigest()
    link(node, path)
    wrong = 0
    for _ in range(5):
        assert node.request("GET", f"/api/v1/blobs/{name}").body == data
        rewrite(path, os.urandom(2 * MIB))
        answer = node.request("GET", f"/api/v1/blobs/{name}")
        wrong += answer.status == 200
        assert answer.status == 410
        rewrite(path, data)
        assert link(node, path).status == 200
    report("F9 rewrites", 5, wrong=wrong)


def test_an_unreadable_record_is_absence_and_not_a_failure(node: RunningNode, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"linked")
    name = link(node, path).json()["sha1"]
    record = node.storage / "sha1" / name[:2] / name[2:4] / name[4:6] / f"{name}.link"
    good = record.read_bytes()
    for bad in (b"", b"{}", b"\xff", b'{"path":1}', b"[" * 100_000, good[:-5]):
        record.write_bytes(bad)
        assert node.request("GET", f"/api/v1/blobs/{name}").status == 404
    record.write_bytes(good)
    assert node.request("GET", f"/api/v1/blobs/{name}").body == b"linked"


def test_control_trusted_links_serve_other_bytes(make_node: Make, tmp_path: Path) -> None:
    node = make_node(prefix=without("trust_links")).start()
    wrong = 0
    for size in SIZES:
        path = tmp_path / f"data-{size}"
        data = os.urandom(size)
        path.write_bytes(data)
        name = link(node, path).json()["sha1"]
        rewrite(path, os.urandom(size))
        wrong += sum(answer.status == 200 and answer.body != data for answer in readings(node, name))
    assert wrong >= len(SIZES)
    report("F9 control trust_links", len(SIZES), wrong=wrong)
