"""Blobs: one gibibyte in, one gibibyte out, and small ones."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator

from tests.bench import load, reference_fsync, reference_nginx, reference_sha1, reference_starlette
from tests.bench.place import GIB, Place, best, head
from tests.bench.table import Row, ratio
from tests.servers import RunningNode, blob_path, free_port

SMALL = 4096
DISTINCT = 256


def store_large(place: Place) -> Iterator[Row]:
    """1 GiB to `/store`, with its manifest, against SHA-1 alone of the same bytes."""
    path = place.file(GIB)
    with place.node() as node:
        prefixes = iter([os.urandom(32).hex() for _ in range(place.rounds)])
        sums: list[str] = []

        def reference() -> float:
            prefix = next(prefixes)
            seconds, sha1 = reference_sha1.measure(path, prefix.encode())
            sums[:] = [prefix, sha1]
            return GIB / seconds

        def ours() -> float:
            prefix, sha1 = sums
            found = load.run(
                "upload", port=node.port, path=str(path), head=head(node, "POST", "/store", GIB), prefixes=[prefix]
            )
            answer = found["answers"][0]
            if answer["sha1"] != sha1 or not answer["manifestSha1"]:
                raise RuntimeError(f"a wrong answer: {answer}")
            blob_path(node.storage, sha1).unlink()
            return GIB / float(found["seconds"])

        base, own = best(place.rounds, reference, ours)
    yield ratio("`/store` of 1 GiB with manifest : SHA-1 of it", own, base, 0.2, "GB/s", 1e9)


def read_large(place: Place) -> Iterator[Row]:
    """1 GiB by both addresses, against nginx with sendfile of the same file."""
    with place.node() as node:
        path = place.file(GIB)
        stored = load.run(
            "upload", port=node.port, path=str(path), head=head(node, "POST", "/store", GIB), prefixes=[""]
        )
        sha1 = stored["answers"][0]["sha1"]
        body = json.dumps({"fileKey": {"sha1": sha1}})
        daemon = head(node, "POST", "/downloadFileData", len(body), "application/json") + body
        own = head(node, "GET", f"/api/v1/blobs/{sha1}")
        if reference_nginx.program() is None:
            raise RuntimeError("nginx is not installed (Debian: nginx-light)")
        port = free_port()
        # nginx serves the very file, below a directory of its own: the volume is for its user alone to list.
        root = place.directory()
        root.mkdir()
        os.link(blob_path(node.storage, sha1), root / "blob")

        def get(to: int, request: str) -> float:
            found = load.run("download", port=to, request=request)
            if found["size"] != GIB:
                raise RuntimeError(f"{found['size']} bytes came")
            return GIB / float(found["seconds"])

        with reference_nginx.running(root, place.directory(), port):
            base, first, second = best(
                place.rounds,
                lambda: get(port, f"GET /blob HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"),
                lambda: get(node.port, daemon),
                lambda: get(node.port, own),
            )
        (root / "blob").unlink()
    yield ratio("1 GiB by `/downloadFileData` : nginx with sendfile", first, base, 0.9, "GB/s", 1e9)
    yield ratio("1 GiB by `/api/v1/blobs/{sha1}` : nginx with sendfile", second, base, 0.9, "GB/s", 1e9)


def store_small(place: Place) -> Iterator[Row]:
    """Durable stores of 4 KiB by 8 clients, against the bare loop of system calls."""
    each = place.count(1000)
    with place.node() as node:

        def ours() -> float:
            template = head(node, "POST", "/store", SMALL) + "%UNIQUE%".ljust(SMALL - 24, ".")
            return _requests(node, 8, each, template)

        base, own = best(place.rounds, lambda: reference_fsync.measure(place.directory(), 8, each), ours)
    yield ratio("4 KiB to `/store`, 8 clients : create, fsync, rename, fsync", own, base, 0.15, "/s")


def read_small(place: Place) -> Iterator[Row]:
    """GET of 4 KiB on 16 kept connections, against a route that answers `ok`."""
    each = place.count(1200)
    port = free_port()
    with place.node() as node, reference_starlette.running(port):
        names = []
        for _ in range(DISTINCT):
            data = os.urandom(SMALL)
            names.append(hashlib.sha1(data, usedforsecurity=False).hexdigest())
            if node.store(data).json()["sha1"] != names[-1]:
                raise RuntimeError("a wrong answer")
        template = f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"

        def reference() -> float:
            found = load.run("requests", port=port, clients=16, each=each, warm=50, template=template, values=[])
            return float(found["per_second"])

        def ours() -> float:
            return _requests(node, 16, each, head(node, "GET", "/api/v1/blobs/%VALUE%"), names)

        base, own = best(place.rounds, reference, ours)
    yield ratio("GET of 4 KiB, 16 connections : bare Starlette's `ok`", own, base, 0.25, "/s")


def _requests(
    node: RunningNode, clients: int, each: int, template: str, values: list[str] | None = None, warm: int = 50
) -> float:
    found = load.run(
        "requests", port=node.port, clients=clients, each=each, warm=warm, template=template, values=values or []
    )
    return float(found["per_second"])
