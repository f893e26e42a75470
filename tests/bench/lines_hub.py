"""The hub: a file out of another server's bucket, into and out of a bucket, and decisions on rights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from kachery_lab.core.roles import Role
from kachery_lab.node import open_node
from kachery_lab.services.access_data import Channel, Membership, NodeRecord
from kachery_lab.services.subjects import Subject
from kachery_lab.settings import load_settings
from tests.bench import load, reference_nginx, reference_sha1
from tests.bench.place import GIB, Place, best, head
from tests.bench.table import Row, ratio
from tests.servers import RunningNode, blob_path, free_port

CHANNEL = "bench"
DECISIONS = 200_000


def _admin(node: RunningNode, method: str, path: str, body: Any = None) -> Any:
    headers = {} if body is None else {"Content-Type": "application/json"}
    data = None if body is None else json.dumps(body)
    answer = node.request(method, f"/api/admin/v1{path}", data, headers, auth=node.admin_token)
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {answer.body!r}")
    return answer.json() if answer.body else None


def _open_channel(hub: RunningNode, *nodes: RunningNode) -> None:
    """A public channel in which these nodes have every role."""
    _admin(hub, "POST", "/channels", {"name": CHANNEL, "public": True})
    for node in nodes:
        node_id = (node.storage / "kachery-node-id").read_text()
        if node is not hub:
            until = time.monotonic() + 10
            while all(row["nodeId"] != node_id for row in _admin(hub, "GET", "/nodes")["nodes"]):
                if time.monotonic() > until:
                    raise RuntimeError("the node did not report itself")
                time.sleep(0.1)
            _admin(hub, "PATCH", f"/nodes/{node_id}", {"approved": True})
        _admin(hub, "PUT", f"/channels/{CHANNEL}/memberships/{node_id}", {})
        _admin(hub, "PUT", f"/channels/{CHANNEL}/authorizations/node/{node_id}", {"roles": ["all"]})


def _stored(place: Place, node: RunningNode) -> str:
    found = load.run(
        "upload", port=node.port, path=str(place.file(GIB)), head=head(node, "POST", "/store", GIB), prefixes=[""]
    )
    sha1 = str(found["answers"][0]["sha1"])
    answer = node.post("/uploadFile", {"sha1": sha1, "channel": CHANNEL})
    if answer.status != 200:
        raise RuntimeError(f"uploadFile: {answer.status} {answer.body!r}")
    return sha1


def _bucket_path(sha1: str) -> str:
    return f"/bucket/{CHANNEL}/sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"


def load_from_hub(place: Place) -> Iterator[Row]:
    """1 GiB by `/loadFile` from another server's bucket, against `curl -o FILE` and `sync` of the same bytes."""
    with place.node() as hub, place.node(KACHERY_LAB_HUB_URL=f"http://127.0.0.1:{hub.port}") as member:
        _open_channel(hub, hub, member)
        sha1 = _stored(place, hub)
        target = place.directory()

        def curl() -> float:
            begun = time.monotonic()
            url = f"http://127.0.0.1:{hub.port}{_bucket_path(sha1)}"
            subprocess.run(["curl", "-sS", "-f", "-o", str(target), url], check=True)
            subprocess.run(["sync", str(target)], check=True)
            seconds = time.monotonic() - begun
            target.unlink()
            return GIB / seconds

        def ours() -> float:
            begun = time.monotonic()
            answer = member.post("/loadFile", {"fileKey": {"sha1": sha1}, "channelName": CHANNEL}, timeout=300)
            seconds = time.monotonic() - begun
            if b'"finished"' not in answer.body:
                raise RuntimeError(f"loadFile: {answer.status} {answer.body[-300:]!r}")
            blob_path(member.storage, sha1).unlink()
            return GIB / seconds

        base, own = best(place.rounds, curl, ours)
    yield ratio("1 GiB from another server's bucket : `curl -o` and `sync`", own, base, 0.5, "GB/s", 1e9)


def bucket_large(place: Place) -> Iterator[Row]:
    """1 GiB into a bucket against SHA-1 of it; out of a bucket against nginx with sendfile."""
    path = place.file(GIB)
    with place.node() as hub:
        _open_channel(hub, hub)
        rounds = iter([os.urandom(32).hex() for _ in range(place.rounds)])
        current: list[str] = []

        def reference() -> float:
            prefix = next(rounds)
            seconds, sha1 = reference_sha1.measure(path, prefix.encode())
            current[:] = [prefix, sha1]
            return GIB / seconds

        def put() -> float:
            prefix, sha1 = current
            asked = {"channelName": CHANNEL, "sha1": sha1, "size": GIB}
            url = str(hub.post("/createSignedFileUploadUrl", asked).json()["signedUrl"])
            target = url.partition(f":{hub.port}")[2]
            request = head(hub, "PUT", target, GIB)
            seconds = float(
                load.run("upload", port=hub.port, path=str(path), head=request, prefixes=[prefix])["seconds"]
            )
            blob_path(hub.storage, sha1).unlink()
            return GIB / seconds

        base, own = best(place.rounds, reference, put)
        yield ratio("bucket PUT of 1 GiB : SHA-1 of it", own, base, 0.2, "GB/s", 1e9)
        sha1 = _stored(place, hub)
        port, root = free_port(), place.directory()
        root.mkdir()
        os.link(blob_path(hub.storage, sha1), root / "blob")

        def get(to: int, target: str) -> float:
            request = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{to}\r\n\r\n"
            return GIB / float(load.run("download", port=to, request=request)["seconds"])

        with reference_nginx.running(root, place.directory(), port):
            base, own = best(place.rounds, lambda: get(port, "/blob"), lambda: get(hub.port, _bucket_path(sha1)))
        (root / "blob").unlink()
    yield ratio("bucket GET of 1 GiB : nginx with sendfile", own, base, 0.9, "GB/s", 1e9)


def decisions(place: Place) -> Iterator[Row]:
    """Effective roles of nodes in channels, in process: 200 nodes, 200 channels."""
    root = place.directory()
    for name in ("data", "meta"):
        (root / name).mkdir(parents=True)
    node = open_node(load_settings({"storage_dir": root / "data", "metadata_dir": root / "meta"}))
    try:
        _fill(node)
        subjects = [Subject("node", _node_id(number)) for number in range(200)]

        def ours() -> float:
            begun = time.perf_counter()
            for number in range(DECISIONS):
                node.roles.require(subjects[number % 200], f"channel{number // 200 % 200}", Role.REQUEST_FILES)
            return DECISIONS / (time.perf_counter() - begun)

        (found,) = best(place.rounds, ours)
    finally:
        node.release()
    yield Row("decisions on rights, in process", f"{found:,.0f} /s", "", found, 20_000, "/s")


def _node_id(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def _fill(node: Any) -> None:
    data = node.data
    for number in range(200):
        data.nodes[_node_id(number)] = NodeRecord(_node_id(number), "ann", "n", 0, 1, None)
        name = f"channel{number}"
        data.channels[name] = Channel(name, "ann", False, False, 0, None, None, None, "", b"", 1)
        for other in range(200):
            data.memberships[name, _node_id(other)] = Membership(name, _node_id(other), Role.ALL, "local", 0)
            data.authorizations[name, "node", _node_id(other)] = Role.ALL
