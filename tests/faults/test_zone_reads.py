"""H6, H7, H10, S4, S5 for files of zones that are read by their hash."""

from __future__ import annotations

import json
import socket
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import given, settings

from kachery_lab.core.tickets import Ticket
from kachery_lab.http import responses
from kachery_lab.http.blobs import files
from kachery_lab.http.server import EdgeLimits, build_server
from kachery_lab.services import channel_files
from tests.faults.report import report
from tests.http.test_tickets import MUTANTS, decoded, encoded
from tests.hubs import Hub, sha1_of
from tests.servers import RunningNode
from tests.zones import Zone, fresh

pytestmark = pytest.mark.slow

DATA = bytes(range(256)) * 4000
SECRET = fresh()


@pytest.fixture(scope="module")
def zone(hub: Hub) -> Zone:
    zone = Zone(hub)
    zone.upload(zone.owner, DATA)
    zone.upload(zone.owner, SECRET)
    return zone


def raw(port: int, request: bytes) -> bytes:
    """The whole answer to bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            pass
    return answer


def get(hub: Hub, target: str, *headers: str) -> bytes:
    lines = [f"GET {target} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers]
    return raw(hub.port, "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")


# -- H6: more of everything --------------------------------------------------------------------------------------------


def test_h6_too_much_is_refused(hub: Hub, zone: Zone) -> None:
    signed = urlsplit(zone.url(zone.reader, SECRET))
    target = f"{signed.path}?{signed.query}"
    path = f"/sha1/{sha1_of(SECRET)}"
    attempts = {
        "50 kB query": get(hub, target + "&x=" + "x" * 50_000),
        "1 MB address": get(hub, path + "/" + "x" * 1_000_000),
        "1 MB query": get(hub, target + "&x=" + "x" * 1_000_000),
        "10 000 parameters": get(hub, target + "&" + "&".join(f"p{n}=1" for n in range(10_000))),
        "1 MB header": get(hub, target, "X-Big: " + "x" * 1_000_000),
        "1 000 headers": get(hub, target, *(f"X-{n}: 1" for n in range(1000))),
    }
    statuses = {name: int(answer.split()[1]) for name, answer in attempts.items()}
    assert set(statuses.values()) <= {400, 414, 431}, statuses
    allowed = get(hub, target + "&" + "&".join(f"p{n}=1" for n in range(1000)), *(f"X-{n}: 1" for n in range(50)))
    assert allowed.startswith(b"HTTP/1.1 200")
    assert allowed.endswith(SECRET)
    report("H6 zone", len(attempts), statuses=statuses)


def test_h6_control_with_bounds_far_away_it_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = EdgeLimits(max_header_bytes=4_000_000, max_target=4_000_000, max_headers=10_000)
    monkeypatch.setattr("tests.hubs.build_server", partial(build_server, limits=wide))
    with Hub(tmp_path) as hub:
        zone = Zone(hub, public=True)
        zone.upload(zone.owner, SECRET)
        path = f"/sha1/{sha1_of(SECRET)}"
        assert get(hub, path + "?x=" + "x" * 50_000).endswith(SECRET)
        assert get(hub, path, *(f"X-{n}: 1" for n in range(1000))).endswith(SECRET)
    report("H6 zone control", 2, served=2)


# -- H7: ranges --------------------------------------------------------------------------------------------------------


def cpu_of(hub: Hub, target: str, header: str, times: int = 20) -> float:
    """Milliseconds of this process for one answer."""
    begun = time.process_time()
    for _ in range(times):
        answer = get(hub, target, f"Range: {header}")
        assert answer.split()[1] in (b"200", b"206", b"416", b"431"), answer[:100]
    return (time.process_time() - begun) / times * 1000


def check_range(hub: Hub, target: str, header: str, data: bytes, first: int | None, end: int = 0) -> None:
    answer = get(hub, target, f"Range: {header}")
    body = answer.partition(b"\r\n\r\n")[2]
    status = int(answer.split()[1])
    if status == 206:
        assert first is not None
        assert body == data[first:end]
        assert f"bytes {first}-{end - 1}/{len(data)}".encode() in answer
    elif status == 200:
        assert body == data
    else:
        assert status == 416
        assert f"bytes */{len(data)}".encode() in answer


def test_h7_ranges_of_every_kind(hub: Hub, zone: Zone) -> None:
    signed = urlsplit(zone.url(zone.reader, DATA))
    target, size = f"{signed.path}?{signed.query}", len(DATA)
    cases: list[tuple[str, int | None, int]] = [
        ("bytes=0-0", 0, 1),
        ("bytes=-1", size - 1, size),
        (f"bytes=-{2**64}", 0, size),
        (f"bytes=5-{2**64}", 5, size),
        ("bytes=-0", None, 0),
        (f"bytes={2**64}-", None, 0),
        ("bytes=9-3", None, 0),
        ("bytes=" + ",".join(["0-9"] * 1000), None, 0),
        ("bytes=" + ",".join(f"{n}-{n + 9}" for n in range(0, 9000, 9)), None, 0),
        ("bytes=0-9,", None, 0),
        ("bytes=" + "9" * 5000 + "-", None, 0),
    ]
    for header, first, end in cases:
        check_range(hub, target, header, DATA, first, end)
    figures = {count: round(cpu_of(hub, target, "bytes=" + ",".join(["0-9"] * count)), 1) for count in (10, 100, 1000)}
    assert figures[1000] < 20 * figures[10] + 50
    report("H7 zone", len(cases), cpu_ms=figures)


def test_h7_control_without_the_bounds_wrong_bytes_are_announced(
    hub: Hub, zone: Zone, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed = urlsplit(zone.url(zone.reader, DATA))
    target = f"{signed.path}?{signed.query}"

    def unchecked(header: str | None, size: int) -> Any:
        if not header:
            return None
        first, _, last = header.removeprefix("bytes=").partition("-")
        return responses.Range(int(first or 0), int(last or size) + 1, size)

    monkeypatch.setattr(responses, "parse_range", unchecked)
    with pytest.raises(AssertionError):
        check_range(hub, target, f"bytes=5-{len(DATA) + 1000}", DATA, 5, len(DATA))
    report("H7 zone control", 1, wrong=1)


# -- H10: texts in headers and logs ------------------------------------------------------------------------------------

EVIL = 'a"\r\nSet-Cookie: evil=1\r\n\r\n<script>\x1b[31m\u202egnp.exe'


def test_h10_names_and_labels(make_node: Any) -> None:
    node: RunningNode = make_node().start()
    made = {"user": "ann", "scopes": ["read", "write"]}
    token = node.request("POST", "/api/admin/v1/tokens", json.dumps(made), auth=node.admin_token).json()["token"]
    channel = json.dumps({"name": "lab", "owner": "ann", "public": True})
    assert node.request("POST", "/api/admin/v1/channels", channel, auth=node.admin_token).status == 201
    fields = {"hashAlg": "sha1", "hash": sha1_of(b"x"), "zoneName": "lab", "size": 1, "workToken": "", "label": EVIL}

    def initiate(label: str) -> Any:
        body = json.dumps({"type": "initiateFileUploadRequest", **fields, "label": label})
        return node.request("POST", "/api/initiateFileUpload", body, auth=token)

    assert initiate(EVIL).status == 400
    made_url = initiate("fine label é").json()["signedUploadUrl"]
    assert node.request("PUT", urlsplit(made_url).path, b"x", auth=False).status == 200
    fields = {"type": "finalizeFileUploadRequest", **fields, "objectKey": f"lab/sha1/{_shards(sha1_of(b'x'))}"}
    assert node.request("POST", "/api/finalizeFileUpload", json.dumps(fields), auth=token).status == 200
    lines = len(node.log.splitlines())
    target = f"/sha1/{sha1_of(b'x')}/{quote(EVIL, safe='')}?download"
    answer = node.request("GET", target, auth=False)
    assert answer.status == 200
    assert answer.headers["content-disposition"].isascii()
    assert "set-cookie" not in answer.headers
    assert answer.headers["content-security-policy"] == "sandbox"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-type"] == "application/octet-stream"
    zone = node.request("POST", "/api/findFile", json.dumps({"type": "findFileRequest", "zoneName": EVIL}), auth=False)
    assert zone.status == 400
    added = node.log.splitlines()[lines:]
    assert len([json.loads(line) for line in added]) == 2
    assert not any(character in "".join(added) for character in "\x1b\r\u202e")
    report("H10 zone", 4, injected_lines=0)


def _shards(sha1: str) -> str:
    return f"{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"


def test_h10_control_a_name_that_is_not_encoded_breaks_the_answer(
    hub: Hub, zone: Zone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvicorn refuses such a header at the last moment, so what is lost is the answer."""
    signed = urlsplit(zone.url(zone.reader, SECRET))
    target = f"{signed.path}/{quote(EVIL[:22], safe='')}?{signed.query}&download"
    assert get(hub, target).endswith(SECRET)
    monkeypatch.setattr(files, "quote", lambda data, safe: data.decode("latin-1"))
    assert SECRET not in get(hub, target)
    report("H10 zone control", 1, answers_lost=1)


# -- S4, S5: tickets for reading ---------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(mutant=MUTANTS)
def test_s4_an_altered_ticket_reads_nothing(hub: Hub, zone: Zone, mutant: tuple[str, Any, str]) -> None:
    url = urlsplit(zone.url(zone.reader, SECRET))
    segment = url.query.removeprefix("ticket=")
    body, _, mac = segment.partition(".")
    kind, a, b = mutant
    if kind in ("query", "kind"):
        return
    if kind == "fields":
        changed = json.dumps({**decoded(body), "path": "sha1/00/00/00/" + "0" * 40, **a}, sort_keys=True).encode()
        altered = encoded(changed) + (f".{mac}" if b == "old mac" else "")
    elif kind == "cut":
        altered = segment[: -(a % len(segment)) or None]
    else:
        place = a % len(segment)
        altered = segment[:place] + b + segment[place + (kind == "byte") :]
    altered = quote(altered, safe="=.~-_%")
    if altered == segment:
        return
    for method in ("GET", "HEAD"):
        answer = hub.request(method, f"{url.path}?ticket={altered}")
        assert answer.status == 403, (altered, answer)


def test_s4_control_an_altered_ticket_reads_without_its_mac(
    hub: Hub, zone: Zone, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = urlsplit(zone.url(zone.reader, SECRET))
    body, _, mac = url.query.removeprefix("ticket=").partition(".")
    fields = {**decoded(body), "path": f"sha1/{_shards(sha1_of(DATA))}"}
    altered = f"/sha1/{sha1_of(DATA)}?ticket={encoded(json.dumps(fields).encode())}.{mac}"
    assert hub.get(altered).status == 403
    monkeypatch.setattr("kachery_lab.core.tickets.hmac.compare_digest", lambda _a, _b: True)
    assert hub.get(altered).body == DATA
    report("S4 zone control", 1, killed=0)


@pytest.mark.parametrize(
    ("after", "status"), [(-61, 403), (-60, 200), (0, 200), (3600, 200), (3659, 200), (3660, 403), (86_400, 403)]
)
def test_s5_a_ticket_is_good_for_an_hour(
    hub: Hub, zone: Zone, monkeypatch: pytest.MonkeyPatch, after: int, status: int
) -> None:
    start = int(time.time())
    monkeypatch.setattr("kachery_lab.services.uploads.time", SimpleNamespace(time=lambda: start))
    url = zone.url(zone.reader, SECRET)
    monkeypatch.setattr("kachery_lab.services.uploads.time", SimpleNamespace(time=lambda: start + after))
    assert hub.get(url).status == status
    if status == 403:
        monkeypatch.setattr(Ticket, "check", lambda *_: None)
        assert hub.get(url).body == SECRET
    report(f"S5 zone {after}", 1, status=status)


def test_the_label_check_is_what_refuses(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control of H10: with the bound on labels away a longer one is kept."""
    long = "x" * 1001
    assert zone.initiate(zone.owner, fresh(), label=long).status == 400
    monkeypatch.setattr(channel_files, "MAX_LABEL", 2000)
    assert zone.initiate(zone.owner, fresh(), label=long).status == 200
