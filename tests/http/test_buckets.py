"""Buckets: what may be read, by whom, in which parts; and what is verified before it counts."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from starlette.routing import compile_path

from kachery_lab.core.roles import Role
from kachery_lab.services.principals import OPERATOR
from tests.hubs import Hub, LabNode, path_of, sha1_of
from tests.logs import logged_to
from tests.servers import Answer

DATA = bytes(range(256)) * 20


@pytest.fixture
def public(hub: Hub) -> tuple[LabNode, str]:
    name, node = f"p{time.monotonic_ns():x}", LabNode()
    hub.make_channel(name, public=True)
    hub.register(node)
    hub.join(node, name)
    return node, name


# -- who may read ------------------------------------------------------------------------------------------------------


def test_a_private_object_needs_the_capability(hub: Hub, channel: str, member: LabNode) -> None:
    path = hub.upload(member, channel, DATA)
    plain, own = f"/bucket/{channel}/{path}", f"{hub.bucket(member, channel)}/{path}"
    for method in ("GET", "HEAD"):
        assert hub.request(method, plain).status == 404
        assert hub.request(method, own).status == 200
    assert hub.get(own).body == DATA
    assert hub.get(own, Authorization="Bearer klk_nonsense").status == 200
    head, tail = own.split("/bucket/~")
    capability, _, rest = tail.partition("/")
    for altered in (capability[:-1], capability[1:], capability + "A", capability.replace(".", ""), "x", "a.b"):
        assert hub.get(f"{head}/bucket/~{altered}/{rest}").status == 403
    assert hub.get(f"{head}/bucket/~{capability}/default/{path}").status == 403
    assert hub.get(own).status == 200


def test_a_role_that_is_taken_away_ends_reading_at_once(hub: Hub, channel: str, member: LabNode) -> None:
    path = hub.upload(member, channel, DATA)
    own = f"{hub.bucket(member, channel)}/{path}"
    assert hub.get(own).status == 200
    for roles, status in (
        (Role.REQUEST_FEEDS | Role.PROVIDE_FILES, 403),
        (Role.REQUEST_FILES, 200),
        (Role.REQUEST_TASKS, 403),
        (Role.ALL, 200),
    ):
        hub.grant(member.id, channel, roles)
        answer = hub.get(own)
        assert answer.status == status
        if status == 403:
            assert "requestFiles" in answer.json()["detail"]
            assert channel in answer.json()["detail"]
            assert hub.get(own, **{"If-None-Match": "*"}).status == 403
    hub.call(hub.node.authorizations.leave(OPERATOR, channel, member.id))
    assert hub.get(own).status == 403
    assert (f"node:{member.id}", "bucket.read", channel) in [entry[:3] for entry in hub.refusals()]
    hub.join(member, channel)
    assert hub.get(own).status == 200
    hub.call(hub.node.nodes.remove(OPERATOR, member.id))
    assert hub.get(own).status == 403


def test_a_new_epoch_ends_every_address(hub: Hub, channel: str, member: LabNode) -> None:
    path = hub.upload(member, channel, DATA)
    old = f"{hub.bucket(member, channel)}/{path}"
    assert hub.get(f"/bucket/{channel}/{path}").status == 404
    hub.call(hub.node.channels.update(OPERATOR, channel, {"public": True}))
    assert hub.get(f"/bucket/{channel}/{path}").body == DATA
    assert hub.bucket(member, channel) == f"{hub.base}/bucket/{channel}"
    hub.call(hub.node.channels.update(OPERATOR, channel, {"public": False}))
    assert hub.get(f"/bucket/{channel}/{path}").status == 404
    assert hub.get(old).status == 403
    assert hub.get(f"{hub.bucket(member, channel)}/{path}").body == DATA


def test_capabilities_and_tickets_reach_no_log(tmp_path: Path) -> None:
    # A server of its own: one that has answered before writes to the log of that time.
    with logged_to(tmp_path / "log"), Hub(tmp_path / "hub") as hub:
        channel, member = "lab", LabNode()
        hub.make_channel(channel)
        hub.register(member)
        hub.join(member, channel)
        (url,) = hub.upload_urls(member, channel, [path_of(DATA)], [len(DATA)])
        assert hub.put(url, DATA).status == 200
        assert hub.put(f"{url}?x=1", DATA).status == 403
        own = hub.bucket(member, channel)
        assert hub.get(f"{own}/{path_of(DATA)}").status == 200
        assert hub.get(f"{own}/nonsense").status == 400
        assert hub.get(f"{own.replace('~', '%7E')}/{path_of(DATA)}").status == 200
    written = (tmp_path / "log").read_text()
    requests = [json.loads(line) for line in written.splitlines() if '"event": "request"' in line]
    found = [(line["method"], line["status"]) for line in requests if "/bucket/" in line["path"]]
    assert found == [("PUT", 200), ("PUT", 403), ("GET", 200), ("GET", 400), ("GET", 200)]
    ticket, capability = url.rpartition("/")[2], own.split("~")[1].split("/")[0]
    for secret in (ticket, capability):
        for part in secret.split("."):
            assert part not in written


# -- parts and headers -------------------------------------------------------------------------------------------------


SIZE = len(DATA)
RANGES = [
    ("bytes=0-0", 206, DATA[:1]),
    ("bytes=10-19", 206, DATA[10:20]),
    (f"bytes={SIZE - 1}-", 206, DATA[-1:]),
    ("bytes=-5", 206, DATA[-5:]),
    (f"bytes=-{SIZE * 2}", 206, DATA),
    (f"bytes=0-{2**63}", 206, DATA),
    ("bytes=-0", 416, None),
    (f"bytes={SIZE}-", 416, None),
    (f"bytes={2**62}-{2**63}", 416, None),
    ("bytes=20-10", 200, DATA),
    (f"bytes=0-{2**64}", 206, DATA),
    ("bytes=-", 200, DATA),
    ("bytes=", 200, DATA),
    ("bytes=a-b", 200, DATA),
    ("bytes=\u0661-\u0662", 200, DATA),
    ("lines=0-1", 200, DATA),
    ("bytes=0-1,3-4", 200, DATA),
    ("bytes=" + ",".join(["0-"] * 1000), 200, DATA),
    ("bytes=" + ",".join(f"{n}-{n}" for n in range(1000)), 200, DATA),
]


@pytest.mark.parametrize(("header", "status", "body"), RANGES, ids=lambda value: repr(value)[:30])
def test_h7_ranges(hub: Hub, public: tuple[LabNode, str], header: str, status: int, body: bytes | None) -> None:
    node, channel = public
    path = hub.upload(node, channel, DATA)
    begun = time.monotonic()
    try:
        answer = hub.get(f"/bucket/{channel}/{path}", Range=header)
    except UnicodeEncodeError:
        answer = hub.get(f"/bucket/{channel}/{path}", Range=header.encode().decode("latin-1"))
    assert time.monotonic() - begun < 1
    assert answer.status == status
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{SIZE}"
    else:
        assert answer.body == body
        assert ("content-range" in answer.headers) is (status == 206)
        assert answer.headers["content-length"] == str(len(answer.body))


def test_validators(hub: Hub, public: tuple[LabNode, str]) -> None:
    node, channel = public
    path = hub.upload(node, channel, DATA)
    address = f"/bucket/{channel}/{path}"
    tag = hub.get(address).headers["etag"]
    assert tag == f'"{sha1_of(DATA)}"'
    assert hub.get(address, **{"If-None-Match": tag}).status == 304
    assert hub.get(address, **{"If-None-Match": '"other"'}).status == 200
    assert hub.get(address, Range="bytes=1-2", **{"If-Range": tag}).status == 206
    assert hub.get(address, Range="bytes=1-2", **{"If-Range": '"other"'}).status == 200
    head = hub.request("HEAD", address)
    assert head.status == 200
    assert head.body == b""
    assert head.headers["content-length"] == str(SIZE)
    assert head.headers["content-type"] == "application/octet-stream"
    assert hub.get(f"{address}?cb=$abcDEFghij&x=1").body == DATA


def test_browsers_may_read(hub: Hub, public: tuple[LabNode, str]) -> None:
    node, channel = public
    address = f"/bucket/{channel}/{hub.upload(node, channel, DATA)}"
    listed = "http://localhost:3000"
    for method in ("GET", "HEAD"):
        assert hub.request(method, address, None, {"Origin": listed}).headers["access-control-allow-origin"] == listed
    assert hub.request("OPTIONS", address, None, {"Origin": listed}).status == 204
    refusal = hub.get(f"/bucket/{channel}/{path_of(b'?')}", Origin=listed)
    assert (refusal.status, refusal.headers["access-control-allow-origin"]) == (404, listed)
    for origin in ("null", "http://evil.com", "http://localhost:3000.evil.com", "https://localhost:3000"):
        answer = hub.get(address, Origin=origin)
        assert answer.headers["access-control-allow-origin"] != origin
        assert "access-control-allow-credentials" not in answer.headers
        assert "Origin" in answer.headers["vary"]
    assert hub.get(address, Host="evil.com").status == 421


SHA1 = sha1_of(DATA)
PARENT = path_of(DATA).rpartition("/")[0]
NAMES = [
    "",
    "/",
    "sha1",
    f"sha1/{SHA1}",
    f"{PARENT}/{SHA1[:39]}",
    f"{PARENT}/{SHA1}0",
    f"{PARENT}/{SHA1.upper()}",
    f"{PARENT}/{SHA1}.link",
    f"{PARENT}/{SHA1}.tmp",
    f"{PARENT}/{SHA1}/",
    f"{PARENT}/{SHA1}%00",
    f"{PARENT}/{SHA1}%0a",
    f"{PARENT}/{SHA1}%20",
    f"{PARENT}//{SHA1}",
    f"{PARENT}/%2e%2e/{SHA1}",
    f"{PARENT}/..%2f{SHA1}",
    f"../{PARENT}/{SHA1}",
    f"{PARENT}/" + SHA1.replace(SHA1[0], "%D9%A1"),
    f"sha1/00/00/00/{SHA1}",
    f"md5{PARENT.removeprefix('sha1')}/{SHA1}",
    "../../etc/passwd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "feeds/ab/ab/ab/" + "ab" * 32 + "/subfeeds/cd/cd/cd/" + "cd" * 20 + "/01",
    "feeds/ab/ab/ab/" + "ab" * 32 + "/subfeeds/cd/cd/cd/" + "cd" * 20 + "/-1",
    "feeds/ab/ab/ab/" + "ab" * 32 + "/subfeeds/cd/cd/cd/" + "cd" * 20 + "/%D9%A1",
    "feeds/ab/ab/ab/" + "ab" * 32 + "/subfeeds/cd/cd/cd/" + "cd" * 20 + "/subfeed.json.",
]


def raw_get(hub: Hub, target: str) -> Answer:
    """The target as it is, which http.client and browsers would normalise or refuse."""
    with socket.create_connection(("127.0.0.1", hub.port), 5) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        data = b""
        while piece := connection.recv(65536):
            data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return Answer(int(head.split()[1]), {}, body)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:40] or "empty")
def test_h9_names_that_are_no_objects(hub: Hub, public: tuple[LabNode, str], name: str) -> None:
    node, channel = public
    path = hub.upload(node, channel, DATA)
    assert raw_get(hub, f"/bucket/{channel}/{path}").body == DATA
    assert raw_get(hub, f"/bucket/{channel}/{name}").status == 400
    # Whatever the channel is, the name is looked at first.
    assert raw_get(hub, f"/bucket/no-such-channel/{name}").status == 400


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e", "a%2fb", "~", "a%00", "a%0a", "%20", "a..b", ".a", "a" * 101, "api", "upload", "%D9%A1%D9%A1"],
)
def test_h9_names_that_are_no_channels(hub: Hub, name: str) -> None:
    assert raw_get(hub, f"/bucket/{name}/{path_of(DATA)}").status in (400, 403, 404)


# -- controls: without the guard the attack works, so these tests would see it ---------------------------------------


def test_control_a_private_object_is_open_without_the_check_of_rights(
    hub: Hub, channel: str, member: LabNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"/bucket/{channel}/{hub.upload(member, channel, DATA)}"
    assert hub.get(address).status == 404
    monkeypatch.setattr(hub.node.buckets, "may_read", lambda *_: True)
    assert hub.get(address).body == DATA


def test_control_the_usual_convertor_makes_a_wrong_name_right() -> None:
    path = path_of(DATA)
    for kind, found in (("path", path), ("everything", path + "\n")):
        regex = compile_path(f"/bucket/{{channel}}/{{path:{kind}}}")[0]
        match = regex.match(f"/bucket/lab/{path}\n")
        assert match is not None
        assert match.group("path") == found
