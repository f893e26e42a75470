"""F8, reading: bytes that changed on the volume are never served."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from hashlib import sha1
from pathlib import Path

import pytest

from tests.faults.report import histogram, report, without
from tests.servers import Answer, RunningNode, blob_path

MIB = 1 << 20
SMALL = 24
DAMAGED = 16
Make = Callable[..., RunningNode]


def flip(path: Path, _other: Path) -> None:
    with path.open("r+b") as file:
        file.seek(random.randrange(path.stat().st_size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << random.randrange(8)]))


def truncate(path: Path, _other: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def zero_fill(path: Path, _other: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def swap(path: Path, other: Path) -> None:
    spare = path.with_name("spare")
    path.rename(spare)
    other.rename(path)
    spare.rename(other)


DAMAGES = [flip, truncate, zero_fill, swap]


def readings(node: RunningNode, name: str) -> list[Answer]:
    """The blob by every route that reads one. `/loadFile` names a path: its bytes stand for the answer's."""
    key = {"fileKey": {"sha1": name}}
    answers = [
        node.request("GET", f"/api/v1/blobs/{name}"),
        node.request("GET", f"/api/v1/blobs/{name}", headers={"Range": "bytes=0-9"}),
        node.post("/downloadFileData", key),
        node.post("/downloadFileData", {**key, "startByte": 0, "endByte": 10}),
    ]
    loaded = node.post("/loadFile", key)
    last = json.loads(loaded.body.rpartition(b"#")[2])
    if last["type"] == "finished":
        loaded.body = Path(last["localFilePath"]).read_bytes()
    else:
        loaded = Answer(410 if "set aside" in last["error"] else 599, {}, last["error"].encode())
    return [*answers, loaded]


def served_wrong(answers: list[Answer], data: bytes) -> int:
    """How many gave bytes that are not the blob's."""
    return sum(answer.status in (200, 206) and answer.body not in (data, data[:10]) for answer in answers)


def store_all(node: RunningNode, sizes: list[int]) -> dict[str, bytes]:
    blobs = {sha1(data).hexdigest(): data for data in map(os.urandom, sizes)}
    for name, data in blobs.items():
        assert node.request("PUT", f"/api/v1/blobs/{name}", data).status == 201
        assert [a.status for a in readings(node, name)] == [200, 206, 200, 200, 200]
    return blobs


def damage(node: RunningNode, names: list[str]) -> None:
    """Damage blobs two by two, in turn by each kind; a swap damages both at once, the others one after the other."""
    for number in range(0, len(names), 2):
        first, second = (blob_path(node.storage, name) for name in names[number : number + 2])
        kind = DAMAGES[number // 2 % len(DAMAGES)]
        kind(first, second)
        if kind is not swap:
            kind(second, first)


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_small_blobs_are_hashed_on_every_read(make_node: Make, restarted: bool) -> None:
    node = make_node().start()
    blobs = store_all(node, [*([100] * 8), *([40_000] * 8), *([MIB] * (SMALL - 16))])
    names = sorted(blobs)
    if restarted:
        node.kill()
    damage(node, names[:DAMAGED])
    if restarted:
        node.start()
    wrong, statuses = 0, []
    for name in names[:DAMAGED]:
        answers = readings(node, name)
        wrong += served_wrong(answers, blobs[name])
        statuses += [answer.status for answer in answers]
        assert {answer.status for answer in answers} == {410}, (name, answers)
        assert b"damaged and are set aside" in answers[0].body
        assert answers[0].json()["code"] == "quarantined"
    false = sum([a.status for a in readings(node, name)] != [200, 206, 200, 200, 200] for name in names[DAMAGED:])
    for name in names[:DAMAGED]:
        assert node.request("PUT", f"/api/v1/blobs/{name}", blobs[name]).status == 201
        healed = readings(node, name)
        assert [answer.status for answer in healed] == [200, 206, 200, 200, 200]
        wrong += served_wrong(healed, blobs[name])
    report(
        "F8 small",
        SMALL,
        detected=f"{statuses.count(410) // 5}/{DAMAGED}",
        false=false,
        wrong=wrong,
        healed=DAMAGED,
        status_histogram=histogram(statuses),
    )
    assert (wrong, false) == (0, 0)


def test_large_blobs_are_hashed_when_their_fingerprint_differs(node: RunningNode) -> None:
    blobs = store_all(node, [3 * MIB, 3 * MIB, 3 * MIB])
    first, second, untouched = blobs
    detected = 0
    for kind in DAMAGES:
        before = blob_path(node.storage, first).stat()
        kind(blob_path(node.storage, first), blob_path(node.storage, second))
        if kind is not swap:
            # The time alone can be put back; ctime cannot.
            os.utime(blob_path(node.storage, first), ns=(before.st_atime_ns, before.st_mtime_ns))
        for name in [first, second] if kind is swap else [first]:
            answers = readings(node, name)
            assert {answer.status for answer in answers} == {410}, (kind, answers)
            assert served_wrong(answers, blobs[name]) == 0
            detected += 1
            assert node.request("PUT", f"/api/v1/blobs/{name}", blobs[name]).status == 201
            assert [a.status for a in readings(node, name)] == [200, 206, 200, 200, 200]
    assert [a.status for a in readings(node, untouched)] == [200, 206, 200, 200, 200]
    report("F8 large", detected, detected=f"{detected}/{detected}", wrong=0, healed=detected)


def test_a_rotten_blob_is_healed_by_a_store_that_nobody_preceded_with_a_read(node: RunningNode) -> None:
    (name, data), *_ = store_all(node, [50_000]).items()
    flip(blob_path(node.storage, name), blob_path(node.storage, name))
    assert node.store(data).json()["sha1"] == name
    assert [a.status for a in readings(node, name)] == [200, 206, 200, 200, 200]
    assert blob_path(node.storage, name).read_bytes() == data


def test_control_without_hashing_rot_is_served(make_node: Make) -> None:
    node = make_node(prefix=without("no_read_hash")).start()
    blobs = store_all(node, [100] * 4 + [3 * MIB] * 2)
    names = list(blobs)
    for name in names:
        flip(blob_path(node.storage, name), blob_path(node.storage, name))
    wrong = sum(served_wrong(readings(node, name), blobs[name]) for name in names)
    assert wrong >= len(names)
    report("F8 control no_read_hash", len(names), wrong=wrong)
