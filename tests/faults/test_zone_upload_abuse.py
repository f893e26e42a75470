"""S7 to S10 and S14 for uploads into zones: what somebody may take, learn or use up who may upload, or may no more.

The hub runs in the test's process, so that a control can take one guard away.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.blobs import local
from kachery_lab.core.roles import Role
from kachery_lab.errors import ContentMismatch
from kachery_lab.services import pending
from tests.faults.report import histogram, report
from tests.faults.test_s9_collisions import pair
from tests.hubs import Hub, path_of, sha1_of
from tests.zones import Zone, fresh

pytestmark = pytest.mark.slow


# -- S7: rights that end on the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before PUT", "while bytes come", "before finalize"])
def test_s7_rights_are_looked_at_each_time(zone: Zone, when: str) -> None:
    data = fresh(1_000_000)
    url = zone.announced(data, zone.writer)

    def take_away() -> None:
        zone.grant("writer", Role.REQUEST_FILES)

    if when == "before PUT":
        take_away()
        assert zone.put(url, data).status == 403
    elif when == "while bytes come":
        assert zone.hub.request("PUT", url, data, before_end=take_away).status == 403
    else:
        assert zone.put(url, data).status == 200
        take_away()
    assert zone.finalize(zone.writer, data).status == 403
    assert zone.find(zone.owner, data).json()["found"] is False
    zone.grant("writer", Role.PROVIDE_FILES)
    assert zone.put(url, data).status == 200
    assert zone.finalize(zone.writer, data).status == 200
    report(f"S7 zone {when}", 1, bypass=0)


def test_s7_control_without_the_last_look_the_file_is_there(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fresh()
    assert zone.put(zone.announced(data, zone.writer), data).status == 200
    zone.revoke("writer")
    with monkeypatch.context() as unguarded:
        unguarded.setattr(zone.hub.node.roles, "require", lambda *_: None)
        assert zone.finalize(zone.writer, data).status == 200
    assert zone.find(zone.owner, data).json()["found"] is True
    report("S7 zone control", 1, bypass=1)


# -- S8: abuse of the last request -------------------------------------------------------------------------------------


def abuse(zone: Zone, data: bytes) -> list[int]:
    """Statuses of requests that should not touch what is there."""
    wrong_size = [zone.finalize(zone.owner, data, size=size).status for size in (0, len(data) + 1, 2**53)]
    others = [zone.finalize(key, data).status for key in (zone.writer, zone.reader, zone.other, None)]
    url = zone.initiate(zone.writer, data)
    assert url.json()["alreadyExists"] is True
    return wrong_size + others


def test_s8_nothing_that_is_there_goes(zone: Zone) -> None:
    data = fresh()
    zone.upload(zone.owner, data)
    assert abuse(zone, data) == [422, 422, 422, 409, 403, 403, 401]
    unfinished = fresh()
    url = zone.announced(unfinished)
    assert zone.put(url, unfinished).status == 200
    # Another one's unfinished upload answers like none at all.
    theirs, none = zone.finalize(zone.writer, unfinished), zone.finalize(zone.writer, fresh())
    assert (theirs.status, theirs.json()) == (none.status, none.json()) and theirs.status == 409
    assert zone.finalize(zone.owner, unfinished, size=1).status == 422
    assert zone.finalize(zone.owner, unfinished).status == 200
    assert zone.finalize(zone.owner, unfinished).status == 200
    for one in (data, unfinished):
        assert zone.hub.get(zone.url(zone.reader, one)).body == one
    report("S8 zone", 10, lost=0)


def test_s8_control_deleting_on_a_wrong_size_loses_the_file(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the published gateway does it."""
    data = fresh()
    zone.upload(zone.owner, data)
    files = zone.hub.node.channel_files
    before = files.finish

    async def deleting(channel: str, sha1: Any, owner: Any, size: int | None = None) -> bool:
        try:
            return await before(channel, sha1, owner, size)
        except ContentMismatch:
            await files._blobs.delete(sha1)
            raise

    monkeypatch.setattr(files, "finish", deleting)
    abuse_lost = zone.finalize(zone.owner, data, size=1).status
    assert abuse_lost == 422
    assert zone.find(zone.owner, data).json()["found"] is False
    report("S8 zone control", 1, lost=1)


# -- S9: two files, one SHA-1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [("shattered", "pdf"), ("sha-mbles", "bin")], ids=lambda one: one[0])
def test_s9_the_first_file_stays(hub: Hub, zone: Zone, name: tuple[str, str]) -> None:
    first, second, sha1 = pair(*name)
    other = Zone(hub)
    zone.upload(zone.owner, first)
    refused = other.put(other.announced(second), second)
    assert (refused.status, refused.json()["code"]) == (409, "sha1_collision")
    assert other.finalize(other.owner, second).status == 409
    assert hub.get(zone.url(zone.owner, first)).body == first
    assert other.put(other.announced(first), first).status == 200
    assert other.finalize(other.owner, first).status == 200
    assert sha1 == sha1_of(first)
    report(f"S9 zone {name[0]}", 1, wrong=0)


def test_s9_control_taking_the_name_for_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = pair("sha-mbles", "bin")
    with Hub(tmp_path) as hub:
        zone, other = Zone(hub), Zone(hub)
        zone.upload(zone.owner, first)
        monkeypatch.setattr(local, "same_bytes", lambda _fd, _stored: True)
        assert other.put(other.announced(second), second).status == 200
        assert other.finalize(other.owner, second).status == 200
        # Stored, it was said; what comes back are other bytes.
        assert hub.get(other.url(other.owner, second)).body != second
    report("S9 zone control", 1, lost=1)


# -- S10: a hash is no permission --------------------------------------------------------------------------------------


def strip(answer: Any, *names: str) -> tuple[int, str]:
    text = answer.body.decode()
    for name in names:
        text = text.replace(name, "NAME")
    return answer.status, text.partition('"signedUploadUrl"')[0]


def leaks(zone: Zone, mine: Zone, secret: bytes, key: str) -> int:
    """How many answers differ between a file of another zone and one that is nowhere."""
    absent = os.urandom(len(secret))
    names = (sha1_of(secret), sha1_of(absent), path_of(secret), path_of(absent))
    found = 0
    for ask in (mine.find, mine.initiate, mine.finalize, zone.find, zone.initiate, zone.finalize):
        found += strip(ask(key, secret), *names) != strip(ask(key, absent), *names)
    for method in ("GET", "HEAD"):
        for headers in ({}, {"Authorization": f"Bearer {key}"}):
            answers = [zone.hub.request(method, f"/sha1/{sha1_of(one)}", None, headers) for one in (secret, absent)]
            found += (answers[0].status, answers[0].body) != (answers[1].status, answers[1].body)
    return found


def test_s10_a_hash_from_elsewhere_opens_nothing(hub: Hub, zone: Zone) -> None:
    mine, secret = Zone(hub), fresh()
    zone.upload(zone.owner, secret)
    key = mine.owner
    assert leaks(zone, mine, secret, key) == 0
    # The bytes are what counts: nothing, or others, do not do.
    url = mine.announced(secret, key)
    for wrong in (b"", bytes(len(secret)), secret[:-1]):
        assert mine.put(url, wrong).status == 422
    assert mine.finalize(key, secret).status == 409
    assert mine.put(url, secret).status == 200
    assert mine.finalize(key, secret).status == 200
    assert hub.get(mine.url(key, secret)).body == secret
    assert zone.find(key, secret).status == 403
    report("S10 zone", 10, leaks=0)


def test_s10_control_a_global_look_up_tells(hub: Hub, zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, secret = Zone(hub), fresh()
    zone.upload(zone.owner, secret)
    before, buckets = hub.node.buckets.find, hub.node.buckets

    async def anywhere(channel: str, path: str) -> Any:
        return await before(channel, path) or next(iter(await buckets.everywhere(path)), None)

    monkeypatch.setattr(buckets, "find", anywhere)
    found = leaks(zone, mine, secret, mine.owner)
    assert found > 0
    report("S10 zone control", 1, leaks=found)


# -- S14: one who floods -----------------------------------------------------------------------------------------------


def flood(zone: Zone, count: int) -> list[int]:
    data = [fresh(100) + n.to_bytes(4, "big") for n in range(count)]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda one: zone.initiate(zone.owner, one).status, data))


def finds(zone: Zone, data: bytes, count: int) -> list[float]:
    found = []
    for _ in range(count):
        begun = time.perf_counter()
        assert zone.find(zone.reader, data).status == 200
        found.append(time.perf_counter() - begun)
    return found


def test_s14_one_who_announces_without_end_is_stopped(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "MOST", 200)
    data = fresh()
    zone.upload(zone.writer, data)
    alone = finds(zone, data, 100)
    statuses: list[int] = []
    attacker = threading.Thread(target=lambda: statuses.extend(flood(zone, 600)))
    attacker.start()
    beside = finds(zone, data, 100)
    attacker.join()
    counted = histogram(statuses)
    assert counted == {"200": 200, "429": 400}
    # Others go on, and have all of their own room.
    zone.upload(zone.writer, fresh())
    p99 = [statistics.quantiles(times, n=100)[98] for times in (alone, beside)]
    report("S14 zone", 600, status_histogram=counted, victim_p99_ratio=round(p99[1] / p99[0], 1))


def test_s14_control_without_the_bound_nobody_is_stopped(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "MOST", 10**9)
    assert histogram(flood(zone, 300)) == {"200": 300}
    report("S14 zone control", 300, stopped=0)
