"""Addresses that the server hands out, and who may say what they are."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.errors import StartRefused
from kachery_lab.http.public_url import _is_elsewhere, _is_for_others, is_trusted
from kachery_lab.settings import load_settings
from tests.hubs import Hub
from tests.logs import logged_to
from tests.servers import Answer

BODY = json.dumps({"channelName": "lab"})


def ask(hub: Hub, *lines: str, target: str = "/api/getChannelBucketBaseUrl", host: str = "localhost") -> Answer:
    """A request as written, and where the answer says that buckets are."""
    head = [
        f"POST {target} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(BODY)}",
    ]
    with socket.create_connection(("127.0.0.1", hub.port), 5) as connection:
        connection.sendall("\r\n".join([*head, *lines, "Connection: close", "", BODY]).encode())
        data = b""
        while piece := connection.recv(65536):
            data += piece
    first, _, body = data.partition(b"\r\n\r\n")
    return Answer(int(first.split()[1]), {}, body)


def warnings(log: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line for line in lines if line["level"] == "warning"]


FORWARDED = ("X-Forwarded-Proto: https", "X-Forwarded-Host: data.lab.org", "X-Forwarded-Prefix: /kachery")


def test_the_address_that_the_client_used(tmp_path: Path) -> None:
    with Hub(tmp_path) as hub:
        for host in ("localhost", f"127.0.0.1:{hub.port}", "localhost:80", "[::1]:99"):
            assert ask(hub, host=host).json() == {"url": f"http://{host}/bucket"}
        assert ask(hub, *FORWARDED).json() == {"url": "http://localhost/bucket"}


def test_forwarded_headers_count_from_trusted_proxies(tmp_path: Path) -> None:
    with Hub(tmp_path, trusted_proxies=("127.0.0.0/8",)) as hub:
        assert ask(hub, *FORWARDED).json() == {"url": "https://data.lab.org/kachery/bucket"}
        assert ask(hub).json() == {"url": "http://localhost/bucket"}
        assert ask(hub, "X-Forwarded-Host: forged, data.lab.org").json() == {"url": "http://data.lab.org/bucket"}
        odd = ("X-Forwarded-Proto: javascript", "X-Forwarded-Host: a b", "X-Forwarded-Prefix: //evil.com/..")
        assert ask(hub, *odd).json() == {"url": "http://localhost/bucket"}


def test_the_configured_address_wins(tmp_path: Path) -> None:
    with Hub(tmp_path, public_url="https://data.lab.org/kachery/", trusted_proxies=("127.0.0.1",)) as hub:
        assert ask(hub, *FORWARDED).json() == {"url": "https://data.lab.org/kachery/bucket"}
        assert ask(hub, host="data.lab.org").status == 200


def test_requests_as_a_client_sends_them_to_a_proxy(tmp_path: Path) -> None:
    """kachery-client 1.2.0 can name no port; with `http_proxy` it sends the whole address as the target."""
    with Hub(tmp_path, allowed_hosts=("hub.lab",)) as hub:
        path = "/api/getChannelBucketBaseUrl"
        answer = ask(hub, target=f"http://hub.lab{path}", host="hub.lab")
        assert answer.json() == {"url": "http://hub.lab/bucket"}
        assert ask(hub, target=f"http://hub.lab{path}", host="other.lab").status == 400
        assert ask(hub, target=f"http://other.lab{path}", host="other.lab").status == 421
        assert ask(hub, target=f"http://hub.lab.evil.com{path}", host="hub.lab.evil.com").status == 421


def test_an_address_that_other_machines_may_not_reach_is_told_once(tmp_path: Path) -> None:
    """By a proxy, as everything here comes from this machine."""
    with logged_to(tmp_path / "log"), Hub(tmp_path / "hub", trusted_proxies=("127.0.0.1",)) as hub:
        for _ in range(3):
            assert ask(hub).json() == {"url": "http://localhost/bucket"}
    told = [line for line in warnings(tmp_path / "log") if "KACHERY_LAB_PUBLIC_URL" in line["hint"]]
    assert [(line["peer"], line["given"]) for line in told] == [("127.0.0.1", "http://localhost")]


def test_a_name_by_which_a_proxy_was_reached_is_not_told(tmp_path: Path) -> None:
    with logged_to(tmp_path / "log"), Hub(tmp_path / "hub", trusted_proxies=("127.0.0.1",)) as hub:
        for host in ("data.lab.org", "192.0.2.7:8443"):
            assert ask(hub, f"X-Forwarded-Host: {host}").json() == {"url": f"http://{host}/bucket"}
        assert warnings(tmp_path / "log") == []
        assert ask(hub, "X-Forwarded-Host: 127.0.0.1:8443").status == 200
    assert [line["given"] for line in warnings(tmp_path / "log")] == ["http://127.0.0.1:8443"]


@pytest.mark.parametrize(
    ("url", "for_others"),
    [
        ("http://data.lab.org/kachery", True),
        ("https://labhost:8443", True),
        ("http://192.0.2.7", True),
        ("http://[2001:db8::1]:80", True),
        ("http://localhost:20431", False),
        ("http://lab.localhost", False),
        ("http://127.0.0.2:80", False),
        ("http://[::1]:80", False),
        ("http://0.0.0.0:80", False),
        ("http://LOCALHOST", False),
    ],
)
def test_hosts_for_others(url: str, for_others: bool) -> None:
    assert _is_for_others(url) is for_others


@pytest.mark.parametrize(
    "settings", [{}, {"public_url": "http://localhost:20431", "trusted_proxies": ("127.0.0.1",)}], ids=["here", "set"]
)
def test_an_address_that_is_reached_is_not_told(tmp_path: Path, settings: dict[str, Any]) -> None:
    with logged_to(tmp_path / "log"), Hub(tmp_path / "hub", **settings) as hub:
        assert ask(hub).status == 200
    assert warnings(tmp_path / "log") == []


@pytest.mark.parametrize(
    ("peer", "elsewhere"),
    [
        ("127.0.0.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("/run/admin.sock", False),
        ("", False),
        ("127.0.0.2", True),
        ("192.0.2.7", True),
        ("fe80::1%eth0", True),
    ],
)
def test_peers_elsewhere(peer: str, elsewhere: bool) -> None:
    assert _is_elsewhere(peer, ("127.0.0.2",)) is elsewhere


@pytest.mark.parametrize(
    ("address", "proxies", "trusted"),
    [
        ("10.0.0.1", ("10.0.0.1",), True),
        ("10.0.0.2", ("10.0.0.1",), False),
        ("10.0.0.2", ("10.0.0.0/24",), True),
        ("::ffff:10.0.0.2", ("10.0.0.0/24",), True),
        ("fe80::1%eth0", ("fe80::/10",), True),
        ("::1", ("127.0.0.1",), False),
        ("/run/socket", ("0.0.0.0/0",), False),
        ("10.0.0.1", (), False),
    ],
)
def test_trusted_addresses(address: str, proxies: tuple[str, ...], trusted: bool) -> None:
    assert is_trusted(address, proxies) is trusted


@pytest.mark.parametrize(
    "flags",
    [{"public_url": "data.lab.org"}, {"public_url": "ftp://x"}, {"public_url": "http://x?y"}, {"trusted_proxies": "x"}],
    ids=repr,
)
def test_settings_that_are_no_addresses_are_refused(flags: dict[str, object]) -> None:
    with pytest.raises(StartRefused, match=r"PUBLIC_URL|TRUSTED_PROXIES"):
        load_settings(flags)
