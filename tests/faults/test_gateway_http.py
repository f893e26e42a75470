"""H3, H6, H10, H11 for `/api/gateway` and its pages: bodies without end, deep JSON, hostile labels, other origins.

Every row has a positive control: with its guard taken out the loss shows.
"""

from __future__ import annotations

import json
import socket
import time

import pytest

from kachery_lab.http import middleware
from kachery_lab.http.protocols.gateway2022 import gateway, pages
from kachery_lab.services import clients
from kachery_lab.services.principals import OPERATOR
from tests import gateway as zones
from tests.faults.report import histogram, report
from tests.gateway import ZONE, CloudClient, ask
from tests.hubs import Hub

pytestmark = pytest.mark.slow
hub, writer, data = zones.hub, zones.writer, zones.data


def send_chunks(hub: Hub, path: str, size: int) -> tuple[int, int]:
    """(Status, bytes sent until the answer came) of a body without a length."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked"
    chunk, sent = b" " * 16_384, 0
    with socket.create_connection(("127.0.0.1", hub.port), timeout=20) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n")
        try:
            while sent < size:
                connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                sent += len(chunk)
                connection.setblocking(False)
                try:
                    if connection.recv(1, socket.MSG_PEEK):
                        break
                except BlockingIOError:
                    pass
                finally:
                    connection.setblocking(True)
                time.sleep(0.002)
            else:
                connection.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass
        return int(connection.recv(4096).split()[1]), sent


@pytest.mark.parametrize("path", ["/api/gateway", f"/p/{'x' * 10}/r/{ZONE}", f"/r/{ZONE}"])
def test_h3_h6_bodies_are_bounded(hub: Hub, path: str) -> None:
    status, sent = send_chunks(hub, path, 4_000_000)
    assert status in (401, 413)
    assert sent < 2_000_000
    report("H3 gateway", 1, path=path, status=status, sent=sent)


def test_h3_control_without_the_limit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_BODY", 100_000_000)
    status, sent = send_chunks(hub, "/api/gateway", 4_000_000)
    assert (status, sent) == (400, 4_014_080)
    report("H3 gateway control", 1, status=status, sent=sent)


def test_h6_large_and_deep(hub: Hub, writer: CloudClient, data: bytes) -> None:
    good = writer.file("findFile", data, ZONE)
    attempts = [
        json.dumps({**good, "padding": "x" * 200_000}).encode(),
        b"[" * 10_000,
        json.dumps({**good, "payload": {f"key{number}": 1 for number in range(5000)}}).encode(),
        json.dumps({**good, "signature": "a" * 90_000}).encode(),
        json.dumps(good).encode().replace(b'"timestamp": ', b'"timestamp": 1' + b"0" * 400),
        json.dumps(good).encode().replace(b'"timestamp": ', b'"timestamp": 1e308, "x": '),
    ]
    statuses = [hub.post("/api/gateway", one).status for one in attempts]
    statuses += [hub.get(f"/client/{'a' * 20_000}").status, hub.get(f"/registerClient/x?label={'a' * 20_000}").status]
    assert all(400 <= status < 500 for status in statuses), statuses
    assert ask(hub, good).status == 200
    report("H6 gateway", len(statuses), statuses=histogram(statuses))


HOSTILE = ("a\r\nSet-Cookie: x=1", "a\nb", "\x1b[31mred", "\u202eevil", "\x00", "a\u2028b")


def test_h10_labels(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    refused = 0
    for label in HOSTILE:
        client = CloudClient()
        for answer in (
            hub.get(client.link(label=label)),
            hub.request("POST", client.link(label=label), b"user=ann", {"Content-Type": FORM}),
        ):
            assert answer.status == 400
            assert "set-cookie" not in answer.headers
            refused += 1
        assert client.id not in hub.node.data.clients
        assert hub.get(client.link(label="fine")).status == 200
    printed = capfd.readouterr().out
    assert "\x1b[31mred" not in printed
    assert "\nSet-Cookie" not in printed
    report("H10 gateway", refused, injected_lines=0)


FORM = "application/x-www-form-urlencoded"


def test_h10_control_without_the_check_of_labels(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pages, clients):
        monkeypatch.setattr(module, "check_label", lambda label: label)
    client = CloudClient()
    assert hub.request("POST", client.link(label=HOSTILE[0]), b"user=ann", {"Content-Type": FORM}).status == 200
    assert "\n" in hub.node.data.clients[client.id].label
    hub.call(hub.node.clients.remove(OPERATOR, client.id))
    report("H10 gateway control", 1, injected_lines=1)


ORIGINS = (
    "null",
    "https://evil.example",
    "https://figurl.org.evil.example",
    "http://localhost:30001",
    "https://figurl.org",
)


def reflected(hub: Hub, writer: CloudClient, data: bytes) -> int:
    """How many answers let a page of an origin that is not listed read them."""
    found = 0
    body = json.dumps(writer.file("findFile", data, ZONE)).encode()
    for origin in ORIGINS:
        for method, path, sent in (
            ("POST", "/api/gateway", body),
            ("OPTIONS", "/api/gateway", None),
            ("GET", writer.link(), None),
            ("POST", f"/r/{ZONE}", b"{}"),
        ):
            headers = hub.request(method, path, sent, {"Origin": origin}).headers
            found += headers.get("access-control-allow-origin") in (origin, "*")
            assert "access-control-allow-credentials" not in headers
    return found


def test_h11_other_origins(hub: Hub, writer: CloudClient, data: bytes) -> None:
    assert reflected(hub, writer, data) == 0
    listed = hub.request("OPTIONS", "/api/gateway", None, {"Origin": "http://localhost:3000"})
    assert listed.headers["access-control-allow-origin"] == "http://localhost:3000"
    rebound = hub.request("POST", "/api/gateway", b"{}", {"Host": "evil.example"})
    assert rebound.status == 421
    report("H11 gateway", 4 * len(ORIGINS), wrong_acao=0)


def test_h11_control_a_server_that_reflects(
    hub: Hub, writer: CloudClient, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "allow_origin", lambda origins, origin: origin)
    found = reflected(hub, writer, data)
    assert found == 4 * len(ORIGINS)
    report("H11 gateway control", 4 * len(ORIGINS), wrong_acao=found)
