"""Bounds: memory under large uploads, time to start."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator

from sqlalchemy import Connection, insert

from kachery_lab.db.engine import Database
from kachery_lab.db.models import blobs
from tests.bench import load
from tests.bench.place import GIB, MIB, Memory, Place, head
from tests.bench.table import Row
from tests.servers import RunningNode, blob_path

BLOBS = 1_000_000
BATCH = 50_000


def upload_memory(place: Place) -> Iterator[Row]:
    """Eight uploads of 1 GiB at once, other bytes each, to a server that has just started."""
    path = place.file(GIB)
    peaks, rates = [], []
    for _ in range(2):
        with place.node() as node:
            assert node.process is not None
            memory = Memory(node.process.pid)
            found = load.run(
                "upload",
                port=node.port,
                path=str(path),
                head=head(node, "POST", "/store", GIB),
                prefixes=[os.urandom(32).hex() for _ in range(8)],
            )
            peaks.append(memory.added())
            rates.append(8 * GIB / found["seconds"])
            for answer in found["answers"]:
                if blob_path(node.storage, answer["sha1"]).stat().st_size != GIB:
                    raise RuntimeError(f"a wrong answer: {answer}")
    text = f"{max(rates) / 1e9:.2f} GB/s together"
    yield Row("memory for eight uploads of 1 GiB at once", text, "", max(peaks) / MIB, 64, "MiB", at_most=True)


def start(place: Place) -> Iterator[Row]:
    """From starting the process to the first 200 of `/readyz`, with a million blobs in the index."""
    root = place.directory()
    node = RunningNode(root / "data", root / "meta", fresh=True)
    found = []
    try:
        node.start()
        node.terminate()
        _fill(node)
        for _ in range(place.rounds):
            begun = time.perf_counter()
            node.launch()
            _await_ready(node)
            found.append(time.perf_counter() - begun)
            node.terminate()
    finally:
        node.kill()
        shutil.rmtree(root, ignore_errors=True)
    yield Row("start with 1,000,000 blobs", f"{min(found):.2f} s", "", min(found), 2, "s", at_most=True)


def _await_ready(node: RunningNode) -> None:
    """As `RunningNode.wait_ready`, looking more often."""
    assert node.process is not None
    while node.process.poll() is None:
        try:
            if node.request("GET", "/readyz", auth=False, timeout=10).status == 200:
                return
        except OSError:
            pass
        time.sleep(0.005)
    raise RuntimeError(f"the server ended:\n{node.log[-2000:]}")


def _fill(node: RunningNode) -> None:
    """Rows as stores would have left them, in the index of a stopped server."""
    database = Database.open(node.metadata / "kachery-lab.db")
    try:
        for first in range(0, BLOBS, BATCH):
            rows = [_row(number) for number in range(first, first + BATCH)]

            def add(conn: Connection, rows: list[dict[str, object]] = rows) -> None:
                conn.execute(insert(blobs), rows)

            database.write_sync(add)
    finally:
        database.close()


def _row(number: int) -> dict[str, object]:
    data = number.to_bytes(8, "big")
    return {
        "sha1": hashlib.sha1(data, usedforsecurity=False).hexdigest(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": 4096,
        "stored_at": 1_700_000_000_000 + number,
        "stored_by": "local",
        "stored_from": "127.0.0.1",
        "origin": "local",
        "mtime_ns": 1_700_000_000_000_000_000 + number,
        "ctime_ns": 1_700_000_000_000_000_000 + number,
        "inode": number,
        "verified_at": 1_700_000_000_000 + number,
    }
