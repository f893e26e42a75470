"""H1, H3, H8, S6, C1, C5 for uploads into zones: three requests, each of which may go wrong.

The hub runs in the test's process, so that a control can take one guard away.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.requests import ClientDisconnect, Request

from kachery_lab.blobs import receive
from kachery_lab.errors import ContentMismatch
from kachery_lab.services import channel_files
from kachery_lab.services.principals import OPERATOR
from tests.faults.report import histogram, report, wait_for
from tests.hubs import Hub, sha1_of
from tests.proxies import LosingProxy
from tests.servers import Answer, drafts, files_below
from tests.zones import Zone, fresh

pytestmark = pytest.mark.slow


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
    url, before = zone.announced(data), blobs(zone.hub)
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
    url, before = zone.announced(data), blobs(zone.hub)
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
    url = zone.announced(data)
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
    status, sent = pour(zone, zone.announced(fresh()), 50_000_000)
    assert (status, sum(taken) >= 50_000_000) == (422, True)
    report("H3 zone control", 1, sent=sent, status=status, read_past_limit=sum(taken) - 4096)


# -- H8: encodings that are never decoded ------------------------------------------------------------------------------


def test_h8_nothing_is_decoded(hub: Hub, zone: Zone) -> None:
    data = fresh()
    url = zone.announced(data)
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
        path = zone.announced(data).removeprefix(hub.base)
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
        path = zone.announced(second).removeprefix(hub.base)
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


def lossy_upload(zone: Zone, data: bytes) -> list[int]:
    """Each of the three requests is sent twice, as the first answer is lost; statuses of the second ones."""
    statuses = []
    with LosingProxy(zone.hub.port) as proxy:
        through = copy(zone)
        through.hub = copy(zone.hub)
        through.hub.port = proxy.port

        def twice(path: str, send: Callable[[], Answer]) -> Answer:
            proxy.losing.append(path)
            with pytest.raises(OSError):
                send()
            answer = send()
            statuses.append(answer.status)
            return answer

        made = twice("initiateFileUpload", lambda: through.initiate(zone.owner, data))
        url = made.json()["signedUploadUrl"]
        twice(url.rpartition("/")[2], lambda: through.put(url, data))
        twice("finalizeFileUpload", lambda: through.finalize(zone.owner, data))
        assert proxy.lost.total() == 3
    return statuses


def test_c5_a_lost_answer_is_asked_for_again(zone: Zone) -> None:
    for number in range(10):
        data = fresh() + bytes([number])
        assert lossy_upload(zone, data) == [200, 200, 200]
        assert zone.hub.get(zone.url(zone.owner, data)).body == data
    assert effects(zone)[0] == effects(zone)[2] == 10
    report("C5 zone", 30, lost=0, duplicates=0)


def test_c5_control_a_server_that_forgets_refuses_the_second(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forgets(*_: Any) -> bool:
        raise ContentMismatch("no such upload")

    monkeypatch.setattr(zone.hub.node.channel_files, "_finished_before", forgets)
    assert lossy_upload(zone, fresh())[-1] == 422
    report("C5 zone control", 1, lost=1)
