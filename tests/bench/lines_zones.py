"""Zones, as the newer clients use them: looking for small files, reading and storing them, and parts of a large one."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.bench import load, reference_nginx, reference_sha1, reference_starlette
from tests.bench.place import GIB, Place, best, head
from tests.bench.table import Row, ratio
from tests.servers import RunningNode, blob_path, free_port

ZONE = "bench"
SMALL = 4096
DISTINCT = 256
CONNECTIONS = 16
LARGE = 10 * GIB
PART = 64 * 1024
PLACES = 4096


def _admin(node: RunningNode, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body)
    answer = node.request(method, f"/api/admin/v1{path}", data, auth=node.admin_token)
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {answer.body!r}")
    return answer.json() if answer.body else None


def _zone(node: RunningNode) -> str:
    """A private zone of `ann`; her API key."""
    key = str(_admin(node, "POST", "/tokens", {"user": "ann", "scopes": ["read", "write"]})["token"])
    _admin(node, "POST", "/channels", {"name": ZONE, "owner": "ann"})
    return key


def _ask(node: RunningNode, key: str, kind: str, **fields: Any) -> Any:
    body = {"type": f"{kind}Request", "hashAlg": "sha1", "zoneName": ZONE, **fields}
    # Before 10 GiB are found they are hashed.
    answer = node.request("POST", f"/api/{kind}", json.dumps(body), auth=key, timeout=600)
    if answer.status != 200:
        raise RuntimeError(f"{kind}: {answer.status} {answer.body!r}")
    return answer.json()


def _upload(node: RunningNode, key: str, data: bytes) -> str:
    """A file of the zone; the address, with its ticket, where it is read."""
    file = {"hash": hashlib.sha1(data, usedforsecurity=False).hexdigest(), "size": len(data)}
    made = _ask(node, key, "initiateFileUpload", workToken="", **file)
    url = urlsplit(made["signedUploadUrl"])
    if node.request("PUT", url.path, data, auth=False).status != 200:
        raise RuntimeError("PUT")
    _ask(node, key, "finalizeFileUpload", objectKey=made["objectKey"], **file)
    return _target(node, key, file["hash"])


def _target(node: RunningNode, key: str, sha1: object) -> str:
    url = urlsplit(_ask(node, key, "findFile", hash=sha1)["url"])
    return f"{url.path}?{url.query}"


def _requests(port: int, each: int, template: str, values: list[str]) -> float:
    found = load.run("requests", port=port, clients=CONNECTIONS, each=each, warm=50, template=template, values=values)
    return float(found["per_second"])


def small(place: Place) -> Iterator[Row]:
    """`findFile`, and GET of 4 KiB by signed addresses of a private zone, against a route that answers `ok`."""
    each, port = place.count(1200), free_port()
    with place.node() as node, reference_starlette.running(port):
        key = _zone(node)
        targets = [_upload(node, key, os.urandom(SMALL)) for _ in range(DISTINCT)]
        names = [target.removeprefix("/sha1/").partition("?")[0] for target in targets]
        fields = {"type": "findFileRequest", "hashAlg": "sha1", "hash": "%VALUE%", "zoneName": ZONE}
        body = json.dumps(fields)
        host = f"Host: 127.0.0.1:{node.port}\r\n"
        find = (
            f"POST /api/findFile HTTP/1.1\r\n{host}Authorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body) + 40 - len('%VALUE%')}\r\n\r\n{body}"
        )
        base, found, read = best(
            place.rounds,
            lambda: _requests(port, each, f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n", []),
            lambda: _requests(node.port, each, find, names),
            lambda: _requests(node.port, each, f"GET %VALUE% HTTP/1.1\r\n{host}\r\n", targets),
        )
    yield ratio("`findFile`, 16 connections : bare Starlette's `ok`", found, base, 0.2, "/s")
    yield ratio("GET of 4 KiB of a zone, 16 connections : bare Starlette's `ok`", read, base, 0.2, "/s")


def uploads(place: Place) -> Iterator[Row]:
    """The three requests of one 4 KiB upload, durable, against one `/store` of 4 KiB; 16 connections each."""
    each = place.count(400)
    with place.node() as node:
        key = _zone(node)
        template = head(node, "POST", "/store", SMALL) + "%UNIQUE%".ljust(SMALL - 24, ".")

        def ours() -> float:
            given = {"zone": ZONE, "key": key, "size": SMALL}
            found = load.run("zone_uploads", port=node.port, clients=CONNECTIONS, each=each, warm=20, **given)
            return float(found["per_second"])

        base, own = best(place.rounds, lambda: _requests(node.port, each, template, []), ours)
    yield ratio("announce, PUT and finish 4 KiB, 16 connections : 4 KiB to `/store`", own, base, 0.4, "/s")


def _sparse(place: Place, node: RunningNode) -> str:
    """A file of 10 GiB of zeros without blocks on the disk, put at its place in the volume; its SHA-1."""
    path = place.directory()
    with path.open("wb") as file:
        file.truncate(LARGE)
    _, sha1 = reference_sha1.measure(path, b"")
    final = blob_path(node.storage, sha1)
    final.parent.mkdir(parents=True, exist_ok=True)
    path.chmod(0o644)
    os.link(path, final)
    path.unlink()
    return sha1


def _offered(node: RunningNode, key: str, sha1: str) -> str:
    """Let the server offer its own files in the zone, and look for one; its address."""
    own = Path(node.storage / "kachery-node-id").read_text()
    _admin(node, "PUT", f"/channels/{ZONE}/memberships/{own}", {})
    _admin(node, "PUT", f"/channels/{ZONE}/authorizations/node/{own}", {"roles": ["provideFiles"]})
    return _target(node, key, sha1)


def ranges(place: Place) -> Iterator[Row]:
    """64 KiB at random places of a file of 10 GiB, against nginx with sendfile of the same file."""
    each, port = place.count(1200), free_port()
    with place.node(KACHERY_LAB_DISK_DEADLINE="300") as node:
        key = _zone(node)
        sha1 = _sparse(place, node)
        target = _offered(node, key, sha1)
        chosen = random.Random(1)
        starts = [chosen.randrange(LARGE - PART) for _ in range(PLACES)]
        values = [f"{start}-{start + PART - 1}" for start in starts]
        root = place.directory()
        root.mkdir()
        os.link(blob_path(node.storage, sha1), root / "blob")

        def get(to: int, path: str) -> float:
            request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{to}\r\nRange: bytes=%VALUE%\r\n\r\n"
            return _requests(to, each, request, values)

        with reference_nginx.running(root, place.directory(), port, nopush=False):
            base, own = best(place.rounds, lambda: get(port, "/blob"), lambda: get(node.port, target))
        (root / "blob").unlink()
    yield ratio("64 KiB of 10 GiB, 16 connections : nginx with sendfile", own, base, 0.3, "/s")
