"""Bands: many members, steady traffic; how long messages take through the hub, and what it needs for that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kachery_lab.core.keys import PrivateKey
from tests.bench import load_bands
from tests.bench.place import MIB, Place
from tests.bench.table import Row
from tests.servers import RunningNode

NODES, CHANNELS, RATE, SECONDS = 200, 20, 20, 16


def fan_out(place: Place) -> Iterator[Row]:
    """200 nodes in 20 channels of ten, 20 messages/s each: 40,000 deliveries a second."""
    seeds = [f"{number + 1:064x}" for number in range(NODES)]
    channels = [f"bench-{number}" for number in range(CHANNELS)]
    with place.node() as hub:
        _fill(hub, seeds, channels)
        job = {
            "port": hub.port,
            "hub_id": (hub.storage / "kachery-node-id").read_text(),
            "seeds": seeds,
            "channels": channels,
            "each": place.count(RATE * SECONDS),
            "rate": RATE,
        }
        found = min((load_bands.run(**job) for _ in range(place.rounds)), key=lambda one: (one["wrong"], one["median"]))
        assert hub.process is not None
        memory = _peak(hub.process.pid)
    if found["refused"]:
        raise RuntimeError(f"refused: {found['refused']}")
    if found["late"] > 1:
        raise RuntimeError(f"the load generator was {found['late']:.1f} s late")
    what = f"{NODES} nodes in {CHANNELS} channels, {RATE} messages/s each"
    per_second = found["expected"] / found["seconds"]
    yield Row(
        f"{what}: deliveries lost", f"{per_second:,.0f} deliveries/s", "", found["wrong"], 0, "deliveries", at_most=True
    )
    times = f"p99 {found['p99'] * 1000:.0f} ms"
    yield Row(f"{what}: median fan-out", times, "", found["median"] * 1000, 50, "ms", at_most=True)
    yield Row(f"{what}: hub memory", "", "", memory / MIB, 300, "MiB", at_most=True)


def _fill(hub: RunningNode, seeds: list[str], channels: list[str]) -> None:
    size = len(seeds) // len(channels)
    for channel in channels:
        _admin(hub, "POST", "/channels", {"name": channel, "owner": "admin"})
    for number, seed in enumerate(seeds):
        node_id, channel = PrivateKey.from_seed(seed).public_hex, channels[number // size]
        _admin(hub, "POST", "/nodes", {"nodeId": node_id, "label": f"n{number}", "owner": "admin"})
        _admin(hub, "PUT", f"/channels/{channel}/memberships/{node_id}", {})
        _admin(hub, "PUT", f"/channels/{channel}/authorizations/node/{node_id}", {"roles": ["all"]})


def _admin(hub: RunningNode, method: str, path: str, body: Any) -> None:
    headers = {"Content-Type": "application/json"}
    answer = hub.request(method, f"/api/admin/v1{path}", json.dumps(body), headers, auth=hub.admin_token)
    if answer.status >= 300:
        raise RuntimeError(f"{method} {path}: {answer.status} {answer.body!r}")


def _peak(pid: int) -> int:
    """Bytes: the most that the process ever held."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
