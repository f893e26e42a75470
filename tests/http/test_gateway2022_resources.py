"""`/r/{zone}` and `/p/{token}/r/{zone}`: who may ask, in what form, and what is answered."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.ids import UserName
from kachery_lab.core.roles import Role
from kachery_lab.services.principals import OPERATOR
from tests.gateway import CloudClient
from tests.hubs import Hub, sha1_of
from tests.servers import Answer

PRIVATE, PUBLIC = "lab.private", "lab.open"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("resources")
    for name in ("old", "private"):
        (root / name / "sha1").mkdir(parents=True)
    directories = (f"{PUBLIC}={root / 'old'}", f"{PRIVATE}={root / 'private'}")
    with Hub(root, resource_dirs=directories) as running:
        for zone in (PRIVATE, PUBLIC):
            running.make_channel(zone, public=zone == PUBLIC)
            running.join(running.node.identity.node_id, zone, Role.PROVIDE_FILES)
        yield running


@pytest.fixture
def data(hub: Hub) -> bytes:
    """Bytes of a file that lies in the public zone's directory."""
    found = os.urandom(500)
    (hub.storage.parent / "old" / "sha1" / sha1_of(found)).write_bytes(found)
    return found


def token(hub: Hub, user: str, *scopes: str, channels: list[str] | None = None) -> str:
    name = UserName(user)
    return hub.call(hub.node.tokens.create(OPERATOR, name, list(scopes), channels=channels))[1]


def body(sha1: str, zone: str) -> dict[str, Any]:
    """As kachery-cloud sends it."""
    return {
        "type": "requestFromClient",
        "resourceName": zone,
        "zone": zone,
        "request": {"type": "fileUpload", "uri": f"sha1://{sha1}", "timeoutMsec": 5000},
        "timeoutMsec": 10000,
    }


def ask(hub: Hub, data: bytes, zone: str = PUBLIC, address: str | None = None) -> Answer:
    return hub.post(address or f"/r/{zone}", body(sha1_of(data), zone))


def status(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    found = answer.json()
    assert set(found) == {"type", "response"}
    assert found["type"] == "responseToClient"
    assert set(found["response"]) == {"type", "status"}
    assert found["response"]["type"] == "fileUpload"
    return dict(found["response"]["status"])


def message(answer: Answer, expected: int) -> str:
    assert answer.status == expected, answer.body
    assert set(answer.json()) == {"message"}
    return str(answer.json()["message"])


def test_public_zone(hub: Hub, data: bytes) -> None:
    absent = hub.post("/api/gateway", {"payload": CloudClient().file("findFile", data, PUBLIC)["payload"]})
    assert absent.json() == {"type": "findFile", "found": False}
    assert status(ask(hub, data)) == {"status": "completed", "size": 500, "bytesUploaded": 500}
    assert hub.get(f"/sha1/{sha1_of(data)}").body == data
    assert status(ask(hub, b"absent")) == {"status": "not-found"}
    part = hub.get(f"/sha1/{sha1_of(data)}", Range="bytes=10-19")
    assert (part.status, part.body) == (206, data[10:20])


def test_clients_that_know_no_resources(hub: Hub, data: bytes) -> None:
    """They find a file by its hash at once; kachery-cloud, which asks the resource first, is not made to wait."""
    assert hub.get(f"/sha1/{sha1_of(b'absent')}").status == 404
    assert hub.get(f"/sha1/{sha1_of(data)}").body == data
    other = data + b"1"
    (hub.storage.parent / "old" / "sha1" / sha1_of(other)).write_bytes(other)
    wanted = {"type": "findFileRequest", "hashAlg": "sha1", "hash": sha1_of(other), "zoneName": PUBLIC}
    found = hub.post("/api/findFile", wanted).json()
    assert hub.get(found["url"]).body == other


def test_private_zone(hub: Hub) -> None:
    data = os.urandom(500)
    (hub.storage.parent / "private" / "sha1" / sha1_of(data)).write_bytes(data)
    hub.call(hub.node.authorizations.grant(OPERATOR, PRIVATE, "user", "ann", Role.REQUEST_FILES))
    good = token(hub, "ann", "read")
    assert "/p/<token>/r/" in message(ask(hub, data, PRIVATE), 401)
    for scopes, user, channels in (
        (("write",), "ann", None),
        (("read",), "ben", None),
        (("read",), "ann", [PUBLIC]),
    ):
        wrong = token(hub, user, *scopes, channels=channels)
        message(ask(hub, data, PRIVATE, f"/p/{wrong}/r/{PRIVATE}"), 403)
    message(ask(hub, data, PRIVATE, f"/p/klk_{'a' * 32}/r/{PRIVATE}"), 401)
    client = CloudClient()
    hub.call(hub.node.clients.add(OPERATOR, client.id, UserName("ann"), ""))
    find = client.file("findFile", data, PRIVATE)
    assert hub.post("/api/gateway", find).json()["found"] is False
    assert status(ask(hub, data, PRIVATE, f"/p/{good}/r/{PRIVATE}"))["status"] == "completed"
    found = hub.post("/api/gateway", client.file("findFile", data, PRIVATE)).json()
    assert hub.get(found["url"]).body == data
    # The file is nowhere else.
    assert hub.get(f"/sha1/{sha1_of(data)}").status == 404


def test_unknown_zones_look_like_private_ones(hub: Hub, data: bytes) -> None:
    texts = [message(ask(hub, data, zone), 401).replace(zone, "") for zone in (PRIVATE, "nowhere")]
    assert texts[0] == texts[1]


def test_a_zone_without_directory(hub: Hub, data: bytes) -> None:
    hub.make_channel("empty", public=True)
    assert status(ask(hub, data, "empty")) == {"status": "not-found"}


def test_form(hub: Hub, data: bytes) -> None:
    good = body(sha1_of(data), PUBLIC)
    wrong: list[Any] = [
        [],
        {**good, "requestId": "x"},
        {**good, "type": "fileUpload"},
        {**good, "zone": PRIVATE},
        {**good, "resourceName": PRIVATE},
        {**good, "timeoutMsec": "1"},
        {key: value for key, value in good.items() if key != "timeoutMsec"},
        {**good, "request": {**good["request"], "uri": f"sha1://{'A' * 40}"}},
        {**good, "request": {**good["request"], "uri": f"sha1://{'a' * 41}"}},
        {**good, "request": {**good["request"], "uri": "sha1://../../etc/passwd"}},
        {**good, "request": {**good["request"], "uri": 1}},
        {**good, "request": {**good["request"], "timeoutMsec": -1}},
        {**good, "request": {**good["request"], "more": 1}},
        {**good, "request": {**good["request"], "type": "other"}},
        {**good, "request": "fileUpload"},
    ]
    for one in wrong:
        message(hub.post(f"/r/{PUBLIC}", one), 400)
    message(hub.post("/r/a%20b", good), 400)
    message(hub.post(f"/r/{PUBLIC}", b"{"), 400)
    message(hub.post(f"/r/{PUBLIC}", b" " * 100_001), 413)
    for uri in (f"sha1://{sha1_of(data)}/name.nwb", f"sha1://{sha1_of(data)}?label=x"):
        assert status(hub.post(f"/r/{PUBLIC}", {**good, "request": {**good["request"], "uri": uri}}))["size"] == 500


def test_resource_info(hub: Hub) -> None:
    client, stranger = CloudClient(), CloudClient()
    hub.call(hub.node.clients.add(OPERATOR, client.id, UserName("boss"), ""))

    def info(asking: CloudClient, name: str) -> Any:
        return hub.post("/api/gateway", asking.envelope("getResourceInfo", resourceName=name)).json()

    for asking, name in ((client, PUBLIC), (stranger, PUBLIC), (client, PRIVATE)):
        found = info(asking, name)
        assert found["found"] is True
        assert set(found["resource"]) == {"resourceName", "ownerId", "timestampCreated", "proxyUrl"}
        assert (found["resource"]["resourceName"], found["resource"]["proxyUrl"]) == (name, hub.base)
    for asking, name in ((stranger, PRIVATE), (client, "default"), (client, "nowhere")):
        assert info(asking, name) == {"type": "getResourceInfo", "found": False}


def test_the_directory_is_only_read(hub: Hub, data: bytes) -> None:
    old: Path = hub.storage.parent / "old"
    before = {path: path.stat().st_mtime_ns for path in old.rglob("*")}
    assert status(ask(hub, data))["status"] == "completed"
    assert {path: path.stat().st_mtime_ns for path in old.rglob("*")} == before
    assert hashlib.sha1((old / "sha1" / sha1_of(data)).read_bytes()).hexdigest() == sha1_of(data)
