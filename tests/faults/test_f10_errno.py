"""F10: what the volume's failures become. Only absence is "not found"; a hung volume stops nothing but itself."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.blobs.disk import from_os_error
from kachery_lab.http.errors import status_of
from tests.faults.report import histogram, missing, need_root, report, wait_for, without
from tests.servers import RunningNode

Make = Callable[..., RunningNode]
DEADLINE = {"KACHERY_LAB_DISK_DEADLINE": "2"}


@dataclass
class BadVolume:
    """A mounted passthrough file system."""

    storage: Path
    control: Path

    def rules(self, *rules: dict[str, Any]) -> None:
        """Replace the rules, at once for the file system to see."""
        draft = self.control.with_name("control.new")
        draft.write_text(json.dumps(rules))
        draft.rename(self.control)
        hits = Path(f"{self.control}.hits")
        hits.unlink(missing_ok=True)

    def hits(self) -> int:
        """How often a rule applied since `rules`."""
        hits = Path(f"{self.control}.hits")
        return len(hits.read_text().splitlines()) if hits.exists() else 0


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[BadVolume]:
    need_root()
    if not Path("/dev/fuse").exists():
        missing("there is no /dev/fuse")
    source, mountpoint, control = tmp_path / "source", tmp_path / "volume", tmp_path / "control"
    source.mkdir()
    mountpoint.mkdir()
    found = BadVolume(mountpoint, control)
    found.rules()
    program = Path(__file__).with_name("fuse_passthrough.py")
    log = tmp_path / "fuse.log"
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, program, source, mountpoint, control], stdout=output, stderr=output)
    try:
        wait_for(lambda: mountpoint.is_mount() or process.poll() is not None, "the file system is mounted")
        if process.poll() is not None:
            missing(f"FUSE does not work here: {log.read_text()[-500:]}")
        yield found
        found.rules()
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False)
        process.kill()
        process.wait()


def statuses(node: RunningNode, name: str, code: str) -> list[int]:
    """The blob by every route that reads one; an in-band refusal of `/loadFile` counts by its text."""
    header = {"KACHERY-CLIENT-AUTH-CODE": code}
    key = json.dumps({"fileKey": {"sha1": name}})
    kind = {**header, "Content-Type": "application/json"}
    answers = [
        node.request("GET", f"/api/v1/blobs/{name}", headers=header, auth=False),
        node.request("POST", "/downloadFileData", key, kind, auth=False),
    ]
    for answer in answers:
        if answer.status == 503:
            assert int(answer.headers["retry-after"]) > 0
            assert b"the storage" in answer.body and str(node.storage).encode() not in answer.body
    loaded = node.request("POST", "/loadFile", key, kind, auth=False)
    text = loaded.body.decode()
    in_band = 503 if "the storage" in text else 404 if "there is no file" in text else loaded.status
    return [*(answer.status for answer in answers), in_band]


def put(node: RunningNode, data: bytes) -> int:
    return node.request("PUT", f"/api/v1/blobs/{sha1(data).hexdigest()}", data).status


def test_the_table_is_total() -> None:
    """Every errno that this system knows, and none at all, has one of three outcomes."""
    expected = {errno.ENOENT: 404, errno.ENOTDIR: 404, errno.ENOSPC: 507, errno.EDQUOT: 507}
    seen = {}
    for number in [*errno.errorcode, 9999, None]:
        error = OSError() if number is None else OSError(number, "/some/secret/path")
        known = from_os_error(error)
        seen[number] = status_of(known)
        assert seen[number] == expected.get(number or 0, 503), number
        assert "secret" not in known.message and "secret" not in (known.hint or "")
    report("F10 table", len(seen), mapped=len(seen), status_histogram=histogram(seen.values()))


@pytest.mark.parametrize("op", ["getattr", "open", "read"])
def test_only_absence_is_not_found(make_node: Make, volume: BadVolume, op: str) -> None:
    node = make_node(storage=volume.storage).start()
    data = os.urandom(5000)
    name = sha1(data).hexdigest()
    assert put(node, data) == 201
    code = node.code
    expected = dict.fromkeys((errno.EACCES, errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EMFILE), 503)
    if op == "open":
        expected |= {errno.ENOENT: 404, errno.ENOTDIR: 404}
    seen: list[int] = []
    for number, status in expected.items():
        assert statuses(node, name, code) == [200] * 3
        volume.rules({"op": op, "match": f"/{name}", "errno": number})
        found = statuses(node, name, code)
        assert volume.hits() > 0
        assert found == [status] * 3, errno.errorcode[number]
        seen += found
        volume.rules()
    assert statuses(node, name, code) == [200] * 3
    assert node.request("GET", f"/api/v1/blobs/{name}").body == data
    assert node.request("GET", "/readyz", auth=False).status == 200
    absent = "0" * 40
    assert statuses(node, absent, code) == [404] * 3
    report(f"F10 {op}", len(seen), wrong=0, status_histogram=histogram(seen))


def test_a_stale_handle_is_opened_once_more(make_node: Make, volume: BadVolume) -> None:
    """The kernel itself tries an open twice, so two failures are one of ours; the next one succeeds."""
    node = make_node(storage=volume.storage).start()
    data = os.urandom(5000)
    assert put(node, data) == 201
    name = sha1(data).hexdigest()
    volume.rules({"op": "open", "match": f"/{name}", "errno": errno.ESTALE, "times": 2})
    answer = node.request("GET", f"/api/v1/blobs/{name}")
    assert (answer.status, answer.body) == (200, data)
    assert volume.hits() == 2
    volume.rules({"op": "open", "match": f"/{name}", "errno": errno.ESTALE})
    assert node.request("GET", f"/api/v1/blobs/{name}").status == 503
    assert volume.hits() == 4, "tried once more, not for ever"
    volume.rules({"op": "open", "match": f"/{name}", "errno": errno.EIO})
    assert node.request("GET", f"/api/v1/blobs/{name}").status == 503
    assert volume.hits() == 1, "only ESTALE is tried again"


def test_a_quarantine_that_cannot_be_looked_at_is_no_absence(make_node: Make, volume: BadVolume) -> None:
    node = make_node(storage=volume.storage).start()
    data = os.urandom(5000)
    assert put(node, data) == 201
    name = sha1(data).hexdigest()
    path = node.storage / "sha1" / name[:2] / name[2:4] / name[4:6] / name
    path.write_bytes(b"rot")
    assert node.request("GET", f"/api/v1/blobs/{name}").status == 410
    volume.rules({"op": "getattr", "match": f"/sha1-quarantine/{name[:2]}", "errno": errno.EIO})
    assert node.request("GET", f"/api/v1/blobs/{name}").status == 503
    volume.rules()
    assert node.request("GET", f"/api/v1/blobs/{name}").status == 410
    assert put(node, data) == 201


def test_failing_writes_are_not_acknowledged(make_node: Make, volume: BadVolume) -> None:
    node = make_node(storage=volume.storage).start()
    seen = []
    for op, match in (
        ("create", "/tmp/"),
        ("write", "/tmp/"),
        ("fsync", "/tmp/"),
        ("rename", "/sha1/"),
        ("mkdir", "/sha1/"),
    ):
        for number, status in ((errno.EIO, 503), (errno.EROFS, 503), (errno.EDQUOT, 507)):
            data = os.urandom(3000)
            volume.rules({"op": op, "match": match, "errno": number})
            assert put(node, data) == status, (op, errno.errorcode[number])
            assert volume.hits() > 0
            volume.rules()
            name = sha1(data).hexdigest()
            assert node.request("GET", f"/api/v1/blobs/{name}").status == 404
            assert put(node, data) == 201
            assert node.request("GET", f"/api/v1/blobs/{name}").body == data
            seen.append(status)
    assert list((node.storage / "tmp").iterdir()) == []
    report("F10 writes", len(seen), lost=0, wrong=0, status_histogram=histogram(seen))


def timed(node: RunningNode, method: str, path: str, code: str, body: object = None) -> tuple[int, float]:
    begun = time.monotonic()
    headers = {"KACHERY-CLIENT-AUTH-CODE": code, "Content-Type": "application/json"}
    answer = node.request(method, path, None if body is None else json.dumps(body), headers, auth=False)
    return answer.status, time.monotonic() - begun


def hang(
    node: RunningNode, volume: BadVolume, seconds: float, readers: int
) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(Reads of a blob whose open hangs, what only needs the loop or the database meanwhile), each with its time."""
    data = os.urandom(5000)
    assert put(node, data) == 201
    name = sha1(data).hexdigest()
    code = node.code
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    assert node.post("/mutable/set", {"key": "k", "value": 1}).status == 200
    volume.rules({"op": "open", "match": f"/{name}", "sleep": seconds})
    light = []
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        heavy = [pool.submit(timed, node, "GET", f"/api/v1/blobs/{name}", code) for _ in range(readers)]
        wait_for(lambda: volume.hits() > 0, "the volume hangs")
        for _ in range(3):
            light += [
                timed(node, "GET", "/livez", code),
                timed(node, "POST", "/mutable/get", code, {"key": "k"}),
                timed(node, "POST", "/feed/getNumLocalMessages", code, {"feedId": feed, "subfeedHash": "0" * 40}),
            ]
        slow = [future.result() for future in heavy]
    volume.rules()
    time.sleep(max(0.0, seconds - slow[0][1]))
    assert timed(node, "GET", f"/api/v1/blobs/{name}", code)[0] == 200
    return slow, light


def test_a_hung_volume_is_503_at_the_deadline_and_stops_nothing_else(make_node: Make, volume: BadVolume) -> None:
    node = make_node(storage=volume.storage, env=DEADLINE).start()
    slow, light = hang(node, volume, 8, 6)
    assert [status for status, _ in slow] == [503] * 6
    assert all(1.9 < seconds < 8 for _, seconds in slow), slow
    assert [status for status, _ in light] == [200] * 9
    assert max(seconds for _, seconds in light) < 5, light
    report(
        "F10 hung",
        len(slow),
        deadline_s=2,
        slowest_503_s=round(max(seconds for _, seconds in slow), 2),
        slowest_other_ms=round(1000 * max(seconds for _, seconds in light)),
    )


def test_control_every_failure_as_absence(make_node: Make, volume: BadVolume) -> None:
    node = make_node(storage=volume.storage, prefix=without("every_errno_is_absence")).start()
    data = os.urandom(5000)
    assert put(node, data) == 201
    volume.rules({"op": "open", "match": f"/{sha1(data).hexdigest()}", "errno": errno.EIO})
    found = statuses(node, sha1(data).hexdigest(), node.code)
    assert found == [404] * 3
    report("F10 control every_errno_is_absence", 3, wrong=3, status_histogram=histogram(found))


def test_control_disk_work_on_the_event_loop_stops_everything(make_node: Make, volume: BadVolume) -> None:
    node = make_node(storage=volume.storage, env=DEADLINE, prefix=without("disk_on_loop")).start()
    _, light = hang(node, volume, 2, 1)
    slowest = max(seconds for _, seconds in light)
    assert slowest > 1
    report("F10 control disk_on_loop", len(light), slowest_other_ms=round(1000 * slowest))
