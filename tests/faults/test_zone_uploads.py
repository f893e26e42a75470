"""H1, H3, H8, S6 to S10, S14, C1, C5 for uploads into zones: three requests, each of which may go wrong.

The hub runs in the test's process, so that a control can take one guard away.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.requests import ClientDisconnect, Request

from kachery_lab.blobs import local, receive
from kachery_lab.core.roles import Role
from kachery_lab.errors import ContentMismatch
from kachery_lab.services import channel_files, pending
from kachery_lab.services.principals import OPERATOR
from tests.faults.report import histogram, report, wait_for
from tests.faults.test_c5_retry import LossyProxy
from tests.faults.test_s9_collisions import pair
from tests.hubs import Hub, path_of, sha1_of
from tests.servers import drafts, files_below
from tests.zones import Zone, fresh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture
def zone(hub: Hub) -> Zone:
    return Zone(hub)


def announced(zone: Zone, data: bytes, key: str | None = None) -> str:
    """Where the bytes of a fresh announcement go."""
    made = zone.initiate(key or zone.owner, data)
    assert made.status == 200, made.body
    return str(made.json()["signedUploadUrl"])


def blobs(hub: Hub) -> set[str]:
    return {path.name for path in files_below(hub.storage / "sha1")} if (hub.storage / "sha1").exists() else set()


# -- H1: cut off bodies ------------------------------------------------------------------------------------------------


def cut(zone: Zone, url: str, data: bytes, how: str) -> None:
    """Half of a body, then the end of the connection."""
    half = data[: len(data) // 2]
    framing = "Transfer-Encoding: chunked" if how == "chunked" else f"Content-Length: {len(data)}"
    body = b"%x\r\n%s\r\n" % (len(half), half) if how == "chunked" else half
    with socket.create_connection(("127.0.0.1", zone.hub.port)) as connection:
        head = f"PUT {urlsplit(url).path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{framing}\r\n\r\n"
        connection.sendall(head.encode() + body)
        time.sleep(0.1)
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("how", ["length", "chunked", "reset"])
def test_h1_a_cut_upload_leaves_nothing(zone: Zone, how: str) -> None:
    data = fresh(200_000)
    url, before = announced(zone, data), blobs(zone.hub)
    cut(zone, url, data, how)
    wait_for(lambda: not zone.hub.node.pending._arriving, "the upload ended", 1.0)
    wait_for(lambda: drafts(zone.hub.storage) == [], "no temporary file is left", 1.0)
    assert zone.finalize(zone.owner, data).status == 409
    assert blobs(zone.hub) == before
    assert zone.put(url, data).status == 200
    assert zone.finalize(zone.owner, data).status == 200
    report(f"H1 zone {how}", 1, leaked=0, wrong=0)


def test_h1_control_without_its_guards_a_cut_body_is_stored(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fresh(200_000)
    url, before = announced(zone, data), blobs(zone.hub)
    stream = Request.stream

    async def lenient(self: Request) -> Any:
        try:
            async for piece in stream(self):
                yield piece
        except ClientDisconnect:
            return

    monkeypatch.setattr(Request, "stream", lenient)
    monkeypatch.setattr(receive, "_check", lambda *_: None)
    cut(zone, url, data, "length")
    wait_for(lambda: len(blobs(zone.hub) - before) == 1, "the cut body is a file")
    report("H1 zone control", 1, wrong=1)


# -- H3: bodies without a length ---------------------------------------------------------------------------------------


def pour(zone: Zone, url: str, total: int) -> tuple[int, int]:
    """(Status, bytes sent until it came) of an endless chunked body."""
    piece = b"10000\r\n" + bytes(65536) + b"\r\n"
    with socket.create_connection(("127.0.0.1", zone.hub.port), timeout=30) as connection:
        head = f"PUT {urlsplit(url).path} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        sent = 0
        try:
            while sent < total:
                connection.sendall(piece)
                sent += 65536
            connection.sendall(b"0\r\n\r\n")
        except ConnectionError:
            pass
        try:
            answer = connection.recv(65536)
        except ConnectionError:
            return 0, sent
    return int(answer.split()[1]), sent


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the pieces of bodies that the application took."""
    sizes: list[int] = []
    stream = Request.stream

    async def counting(self: Request) -> Any:
        async for piece in stream(self):
            sizes.append(len(piece))
            yield piece

    monkeypatch.setattr(Request, "stream", counting)
    return sizes


def test_h3_a_body_without_a_length_is_cut_at_what_was_announced(hub: Hub, zone: Zone, taken: list[int]) -> None:
    data = bytes(65536) + b"x"
    url = announced(zone, data)
    status, sent = pour(zone, url, 50_000_000)
    past = sum(taken) - len(data)
    assert status in (0, 413)
    assert past < 4_000_000
    assert zone.finalize(zone.owner, data).status == 409
    chunks = iter([data[:5], data[5:]])
    put = hub.request("PUT", url, chunks)  # type: ignore[arg-type]
    assert put.status == 200
    assert zone.finalize(zone.owner, data).status == 200
    report("H3 zone", 1, sent=sent, status=status, read_past_limit=past)


def test_h3_control_without_the_limit_everything_is_read(
    zone: Zone, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "_check_limit", lambda *_: None)
    status, sent = pour(zone, announced(zone, fresh()), 50_000_000)
    assert (status, sum(taken) >= 50_000_000) == (422, True)
    report("H3 zone control", 1, sent=sent, status=status, read_past_limit=sum(taken) - 4096)


# -- H8: encodings that are never decoded ------------------------------------------------------------------------------


def test_h8_nothing_is_decoded(hub: Hub, zone: Zone) -> None:
    data = fresh()
    url = announced(zone, data)
    for encoding in ("gzip", "zstd", "br", "identity, gzip"):
        assert hub.request("PUT", url, data, {"Content-Encoding": encoding}).status == 415
        answer = hub.request("POST", "/api/findFile", b"{}", {"Content-Encoding": encoding})
        assert answer.status == 415
    assert zone.put(url, data).status == 200
    # A credential is asked for before anything is read.
    with socket.create_connection(("127.0.0.1", hub.port)) as connection:
        head = "POST /api/initiateFileUpload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900000\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")
    report("H8 zone", 9, refused=9)


def test_h8_control_a_server_that_asks_for_the_body_first_reads_it(hub: Hub, zone: Zone) -> None:
    """With a good key the same request is asked to go on: that a refusal came before was no accident."""
    with socket.create_connection(("127.0.0.1", hub.port)) as connection:
        head = "POST /api/initiateFileUpload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 900000\r\n"
        connection.sendall(f"{head}Authorization: Bearer {zone.owner}\r\nExpect: 100-continue\r\n\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 Continue")


# -- S6: repetition ----------------------------------------------------------------------------------------------------


def effects(zone: Zone) -> tuple[int, int, int]:
    """(Objects, bytes, uploads counted) of the zone's owner."""
    subject = f"user:{zone.user('owner')}"
    _, held = zone.hub.call(zone.hub.node.quotas.get(OPERATOR, subject))
    rows = zone.hub.call(zone.hub.node.usage.days(10, principal=subject))
    return held.objects, held.bytes, sum(row.uploads for row in rows)


def test_s6_repeated_requests_have_no_second_effect(tmp_path: Path) -> None:
    with Hub(tmp_path) as hub:
        zone = Zone(hub)
        data = fresh()
        path = announced(zone, data).removeprefix(hub.base)
        for _ in range(3):
            assert zone.put(path, data).status == 200
        for _ in range(3):
            assert zone.finalize(zone.owner, data).status == 200
            assert zone.put(path, data).status == 200
        assert effects(zone) == (1, len(data), 1)
    with Hub(tmp_path) as hub:
        zone.hub = hub
        for _ in range(2):
            assert zone.put(path, data).status == 200
            assert zone.put(path, bytes(len(data))).status == 422
            assert zone.finalize(zone.owner, data).status == 200
        assert effects(zone) == (1, len(data), 1)
        # Between PUT and the last request a restart does not matter.
        second = fresh()
        path = announced(zone, second).removeprefix(hub.base)
        assert zone.put(path, second).status == 200
    with Hub(tmp_path) as hub:
        zone.hub = hub
        assert zone.finalize(zone.owner, second).status == 200
        assert effects(zone)[0] == 2
    report("S6 zone", 14, with_effect=0)


def test_s6_control_what_is_not_dropped_counts_twice(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_files, "drop", lambda *_: None)
    data = fresh()
    zone.upload(zone.owner, data)
    assert effects(zone)[:2] == (2, 2 * len(data))
    report("S6 zone control", 1, with_effect=1)


# -- S7: rights that end on the way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before PUT", "while bytes come", "before finalize"])
def test_s7_rights_are_looked_at_each_time(zone: Zone, when: str) -> None:
    data = fresh(1_000_000)
    url = announced(zone, data, zone.writer)

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
    assert zone.put(announced(zone, data, zone.writer), data).status == 200
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
    url = announced(zone, unfinished)
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
    refused = other.put(announced(other, second), second)
    assert (refused.status, refused.json()["code"]) == (409, "sha1_collision")
    assert other.finalize(other.owner, second).status == 409
    assert hub.get(zone.url(zone.owner, first)).body == first
    assert other.put(announced(other, first), first).status == 200
    assert other.finalize(other.owner, first).status == 200
    assert sha1 == sha1_of(first)
    report(f"S9 zone {name[0]}", 1, wrong=0)


def test_s9_control_taking_the_name_for_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = pair("sha-mbles", "bin")
    with Hub(tmp_path) as hub:
        zone, other = Zone(hub), Zone(hub)
        zone.upload(zone.owner, first)
        monkeypatch.setattr(local, "same_bytes", lambda _fd, _stored: True)
        assert other.put(announced(other, second), second).status == 200
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
    url = announced(mine, secret, key)
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


# -- C1: the same file from many at once -------------------------------------------------------------------------------

EACH = 25


def storm(zone: Zone, data: bytes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Statuses of the three requests of each client: `writer` sends the right bytes, `owner` others."""
    wrong = data[:-1] + bytes([data[-1] ^ 1])
    ready = threading.Barrier(2 * EACH)

    def one(sent: bytes, key: str) -> tuple[int, ...]:
        ready.wait()
        made = zone.initiate(key, data)
        if made.json().get("alreadyExists"):
            return (made.status,)
        put = zone.put(made.json()["signedUploadUrl"], sent)
        return made.status, put.status, zone.finalize(key, data).status

    with ThreadPoolExecutor(2 * EACH) as pool:
        right = [pool.submit(one, data, zone.writer) for _ in range(EACH)]
        others = [pool.submit(one, wrong, zone.owner) for _ in range(EACH)]
        return [found.result() for found in right], [found.result() for found in others]


def test_c1_many_clients_and_one_file(hub: Hub, zone: Zone) -> None:
    data, before = os.urandom(500_000), blobs(hub)
    right, wrong = storm(zone, data)
    assert set(right) <= {(200, 200, 200), (200,)}
    assert set(wrong) <= {(200, 422, 409), (200,)}
    assert blobs(hub) - before == {sha1_of(data)}
    assert drafts(hub.storage) == []
    assert hub.get(zone.url(zone.owner, data)).body == data
    rows = hub.call(hub.node.usage.days(10, channels=frozenset({zone.name})))
    assert sum(row.uploads for row in rows) == 1
    statuses = [status for found in right + wrong for status in found]
    report("C1 zone", 2 * EACH, lost=0, wrong=0, files=1, status_histogram=histogram(statuses))


def test_c1_control_without_the_claim_other_bytes_are_taken(
    hub: Hub, zone: Zone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "_check", lambda *_: None)
    data, before = os.urandom(5000), blobs(hub)
    storm(zone, data)
    assert len(blobs(hub) - before) == 2
    report("C1 zone control", 2 * EACH, wrong=1)


# -- C5: answers that are lost -----------------------------------------------------------------------------------------


def lossy_upload(zone: Zone, data: bytes) -> list[int | None]:
    """Each of the three requests is answered twice: the first answer is lost."""
    proxy = LossyProxy(zone.hub.port)
    statuses: list[int | None] = []
    try:
        through = Zone.__new__(Zone)
        through.__dict__ |= zone.__dict__
        through.hub = _Through(zone.hub, proxy.port)  # type: ignore[assignment]
        url = ""
        for step in ("initiate", "put", "finalize"):
            for proxy.losing in (True, False):
                try:
                    answer = through.put(url, data) if step == "put" else getattr(through, step)(zone.owner, data)
                except OSError:
                    statuses.append(None)
                    continue
                statuses.append(answer.status)
                url = answer.json()["signedUploadUrl"] if step == "initiate" else url
    finally:
        proxy.close()
    return statuses


class _Through:
    """The hub, reached by another port."""

    def __init__(self, hub: Hub, port: int) -> None:
        self._hub, self.port = hub, port

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, *arguments: Any, **more: Any) -> Any:
        return Hub.request(self, *arguments, **more)  # type: ignore[arg-type]

    def post(self, *arguments: Any, **more: Any) -> Any:
        return Hub.post(self, *arguments, **more)  # type: ignore[arg-type]


def test_c5_a_lost_answer_is_asked_for_again(zone: Zone) -> None:
    for number in range(10):
        data = fresh() + bytes([number])
        assert lossy_upload(zone, data) == [None, 200, None, 200, None, 200]
        assert zone.hub.get(zone.url(zone.owner, data)).body == data
    assert effects(zone)[0] == effects(zone)[2] == 10
    report("C5 zone", 30, lost=0, duplicates=0)


def test_c5_control_a_server_that_forgets_refuses_the_second(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forgets(*_: Any) -> bool:
        raise ContentMismatch("no such upload")

    monkeypatch.setattr(zone.hub.node.channel_files, "_finished_before", forgets)
    assert lossy_upload(zone, fresh())[-1] == 422
    report("C5 zone control", 1, lost=1)
