"""Pages of other origins in Chromium: what they may read of public and private files, and at the port for figurl."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.chromium import Pages, Seen, chromium, request
from tests.clients.zone_client import Lab
from tests.faults.report import wait_for
from tests.servers import RunningNode, free_port

FIGURL = "figurl.org"
SIZE = 3000
# Longer than a visit may last on a busy machine.
pytestmark = pytest.mark.timeout(300)


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


class World(Lab):
    """A server with a public and a private zone, and a key of ann, who may do everything with files in them."""

    def __init__(self, node: RunningNode) -> None:
        super().__init__(node)
        for name in ("lab.public", "lab.private"):
            self.zone(name, public=name == "lab.public", ann=["requestFiles", "provideFiles"])
        self.admin("PUT", "/channels/default/authorizations/user/ann", {"roles": ["requestFiles", "provideFiles"]})
        self.ann = self.key("ann")
        self.base = f"http://127.0.0.1:{node.port}"
        self.figurl = f"http://localhost:{node.env['KACHERY_LAB_FIGURL_PORT']}"

    def call(self, kind: str, data: bytes, zone: str, **fields: Any) -> Any:
        """One call of kachery 2 by ann."""
        body = {"type": f"{kind}Request", "hashAlg": "sha1", "hash": sha1_of(data), "zoneName": zone, **fields}
        answer = self.node.post(f"/api/{kind}", body, auth=self.ann)
        assert answer.status == 200, answer
        return answer.json()

    def upload_url(self, data: bytes, zone: str) -> str:
        """Where the bytes are to be sent, and the rest of the upload is `finish`."""
        made = self.call("initiateFileUpload", data, zone, size=len(data), workToken="x")
        return str(made["signedUploadUrl"])

    def finish(self, data: bytes, zone: str) -> None:
        path = f"sha1/{sha1_of(data)[:2]}/{sha1_of(data)[2:4]}/{sha1_of(data)[4:6]}/{sha1_of(data)}"
        self.call("finalizeFileUpload", data, zone, objectKey=f"{zone}/{path}", size=len(data))

    def stored(self, zone: str) -> bytes:
        """New bytes, that lie in a zone."""
        data = os.urandom(SIZE)
        path = self.upload_url(data, zone).removeprefix(self.base)
        assert self.node.request("PUT", path, data, auth=False).status == 200
        self.finish(data, zone)
        return data

    def address(self, data: bytes, zone: str) -> str:
        """Where it is read: with a ticket in a private zone."""
        return str(self.call("findFile", data, zone)["url"])

    def answered(self, *paths: str) -> list[tuple[str, str, int]]:
        """(Method, path, status) of every request to these paths that was answered so far, in their order."""
        mark = f"/sha1/{os.urandom(20).hex()}"
        self.node.request("GET", mark, auth=False)
        # Lines are written late, and in order.
        wait_for(lambda: mark in self.node.log, "the request in the log", seconds=30)
        entries = [json.loads(line) for line in self.node.log.splitlines() if line.startswith("{")]
        requests = [one for one in entries if one.get("event") == "request" and one["path"] in paths]
        return [(one["method"], one["path"], one["status"]) for one in requests]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pages]:
    chromium()
    with Pages("pages.example", tmp_path_factory.mktemp("pages")) as pages:
        yield pages


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, pages: Pages) -> Iterator[World]:
    """A server that lists the origin of `pages`, and no other of this module."""
    root = tmp_path_factory.mktemp("chromium")
    for name in ("storage", "metadata"):
        (root / name).mkdir()
    env = {
        "KACHERY_LAB_CORS_ORIGINS": f"http://localhost:3000,{pages.origin}",
        "KACHERY_LAB_FIGURL_PORT": str(free_port()),
        "KACHERY_LAB_FIGURL_USER": "ann",
        "KACHERY_LAB_FIGURL_BIND": "127.0.0.1",
    }
    node = RunningNode(root / "storage", root / "metadata", env=env).start()
    yield World(node)
    assert "Traceback" not in node.log
    node.kill()


def whole(seen: Seen, data: bytes) -> None:
    assert (seen.error, seen.status) == (None, 200)
    assert seen.body == data
    assert seen.header("content-length") == str(len(data))
    assert (seen.header("accept-ranges"), seen.header("etag")) == ("bytes", f'"{sha1_of(data)}"')


def part(seen: Seen, data: bytes, first: int, last: int) -> None:
    assert (seen.error, seen.status) == (None, 206)
    assert seen.body == data[first : last + 1]
    assert seen.header("content-range") == f"bytes {first}-{last}/{len(data)}"


def test_a_public_file(world: World, tmp_path: Path) -> None:
    data = world.stored("lab.public")
    url = f"{world.base}/sha1/{sha1_of(data)}"
    with Pages("other.example", tmp_path) as other:
        seen = other.visit(
            [
                request(url),
                request(url, headers={"Range": "bytes=5-9"}),
                request(url, headers={"Range": "bytes=-7"}),
                request(url, headers={"Range": f"bytes={SIZE}-"}),
                request(url, "HEAD"),
                request(url, headers={"If-None-Match": f'"{sha1_of(data)}"'}),
            ]
        )
    whole(seen[0], data)
    part(seen[1], data, 5, 9)
    part(seen[2], data, SIZE - 7, SIZE - 1)
    assert (seen[3].status, seen[3].header("content-range")) == (416, f"bytes */{SIZE}")
    assert (seen[4].status, seen[4].header("content-length"), seen[4].body) == (200, str(SIZE), b"")
    assert seen[5].status == 304
    # A range from the end is not among the headers that a page may send without asking.
    path = f"/sha1/{sha1_of(data)}"
    answered = [(method, status) for method, _, status in world.answered(path)]
    assert answered.count(("OPTIONS", 204)) >= 1
    assert [one for one in answered if one[0] != "OPTIONS"] == [
        *(("GET", 200), ("GET", 206), ("GET", 206), ("GET", 416), ("HEAD", 200), ("GET", 304))
    ]


def test_a_private_file(world: World, tmp_path: Path) -> None:
    data, secret = world.stored("lab.private"), world.stored("lab.private")
    url, signed = f"{world.base}/sha1/{sha1_of(data)}", world.address(data, "lab.private")
    assert "ticket=" in signed
    ticket = signed.partition("?")[2]
    bearer = {"Authorization": f"Bearer {world.ann}"}
    with Pages("other.example", tmp_path) as other:
        seen = other.visit(
            [
                request(url),
                request(signed),
                request(signed, headers={"Range": "bytes=5-9"}),
                request(f"{world.base}/sha1/{sha1_of(secret)}?{ticket}"),
                request(url, headers=bearer),
                request(url, headers={**bearer, "Range": "bytes=10-"}),
                request(url, headers={"Authorization": "Bearer klk_" + "a" * 32}),
                request(url, credentials="include"),
            ]
        )
    # A refusal says so: the page can tell it from a server that is down.
    assert (seen[0].error, seen[0].status) == (None, 404)
    assert data not in seen[0].body
    whole(seen[1], data)
    part(seen[2], data, 5, 9)
    assert (seen[3].error, seen[3].status) == (None, 403)
    whole(seen[4], data)
    part(seen[5], data, 10, SIZE - 1)
    assert (seen[6].error, seen[6].status) == (None, 401)
    # `*` does not cover cookies and passwords that a browser keeps; this server knows none.
    assert seen[7].unreadable
    answered = [(method, status) for method, _, status in world.answered(f"/sha1/{sha1_of(data)}")]
    # The page that sent a credential asked before, without it.
    assert answered.index(("OPTIONS", 204)) < answered.index(("GET", 401))
    assert [one for one in answered if one[0] != "OPTIONS"] == [
        *(("GET", 404), ("GET", 200), ("GET", 206), ("GET", 200), ("GET", 206), ("GET", 401), ("GET", 404))
    ]


def test_an_upload(world: World, tmp_path: Path) -> None:
    data = os.urandom(SIZE)
    url = world.upload_url(data, "lab.private")
    with Pages("other.example", tmp_path) as other:
        wrong, right = other.visit([request(url, "PUT", data[:-1] + b"?"), request(url, "PUT", data)])
    assert (wrong.error, wrong.status) == (None, 422)
    assert (right.error, right.status) == (None, 200)
    world.finish(data, "lab.private")
    signed = world.address(data, "lab.private").removeprefix(world.base)
    assert world.node.request("GET", signed, auth=False).body == data


def test_everything_else_is_for_listed_pages(world: World, pages: Pages, tmp_path: Path) -> None:
    url = f"{world.base}/api/v1/info"
    (read,) = pages.visit([request(url)])
    assert (read.error, read.status) == (None, 200)
    assert "nodeId" in json.loads(read.body)
    with Pages("other.example", tmp_path) as other:
        plain, asked = other.visit([request(url), request(url, headers={"Authorization": f"Bearer {world.ann}"})])
    assert plain.unreadable
    assert asked.unreadable
    # It was answered, and the browser kept the answer from the page; the one with a credential was not even sent.
    answered = [(method, status) for method, _, status in world.answered("/api/v1/info")]
    assert answered == [("GET", 200), ("GET", 200), ("OPTIONS", 204)]


def test_the_port_for_figurl(world: World, tmp_path: Path) -> None:
    data, new = world.stored("default"), os.urandom(SIZE)
    url = f"{world.figurl}/sha1/{sha1_of(data)}"
    requests = [
        request(f"{world.figurl}/probe"),
        request(url, "HEAD"),
        request(url),
        request(url, headers={"Range": "bytes=5-9"}),
        request(f"{world.figurl}/upload/sha1/{sha1_of(new)}", "POST", new),
        request(f"{world.figurl}/sha1/{sha1_of(new)}"),
        request(f"{world.figurl}/sha1/{'0' * 40}", "HEAD"),
    ]
    with Pages(FIGURL, tmp_path, tls=True) as figurl:
        seen = figurl.visit(requests, public=True, allowed=True)
    assert [(one.error, one.status) for one in seen] == [
        (None, status) for status in (200, 200, 200, 206, 200, 200, 404)
    ]
    assert seen[1].header("content-length") == str(SIZE)
    whole(seen[2], data)
    part(seen[3], data, 5, 9)
    whole(seen[5], new)
    assert world.address(new, "default")


def test_the_browser_asks_its_user_first(world: World, tmp_path: Path) -> None:
    """A page from the internet reaches programs on the same computer only when the person allowed it."""
    path = f"/sha1/{os.urandom(20).hex()}"
    with Pages(FIGURL, tmp_path, tls=True) as figurl:
        (seen,) = figurl.visit([request(world.figurl + path)], public=True)
        assert seen.unreadable
        assert world.answered(path) == []
        (seen,) = figurl.visit([request(world.figurl + path)], public=True, allowed=True)
    assert (seen.error, seen.status) == (None, 404)
    assert world.answered(path) == [("GET", path, 404)]


def test_other_pages_at_the_port_for_figurl(world: World, tmp_path: Path) -> None:
    data, new = world.stored("default"), os.urandom(SIZE)
    path, upload = f"/sha1/{sha1_of(data)}", f"/upload/sha1/{sha1_of(new)}"
    with Pages("evil.example", tmp_path, tls=True) as evil:
        seen = evil.visit(
            [
                request(world.figurl + path),
                request(world.figurl + path, mode="no-cors"),
                request(world.figurl + upload, "POST", new),
                request(world.figurl + upload, "POST", new, mode="no-cors"),
            ],
            public=True,
            allowed=True,
        )
    assert [one.unreadable for one in seen] == [True, False, True, False]
    for blind in (seen[1], seen[3]):
        assert (blind.type, blind.status, blind.body) == ("opaque", 0, b"")
    # Every one was refused by the server, and nothing was stored.
    assert world.answered(path, upload) == [
        *(("GET", path, 403), ("GET", path, 403), ("POST", upload, 403), ("POST", upload, 403))
    ]
    assert world.call("findFile", new, "default")["found"] is False
