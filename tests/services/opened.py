"""A node in the test's own process, and people who may do this and that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from kachery_lab.core.ids import ChannelName, NodeId, NodeLabel, UserName
from kachery_lab.core.keys import PrivateKey
from kachery_lab.node import Node, open_node
from kachery_lab.services.principals import Principal
from kachery_lab.settings import load_settings

T = TypeVar("T")

ADMIN = Principal("user", "boss", frozenset({"admin"}))
ANN = Principal("user", "ann", frozenset({"channel-owner"}), peer="192.0.2.7")
BEN = Principal("user", "ben", frozenset({"channel-owner"}))
READER = Principal("user", "ann", frozenset({"read"}))
LOCAL = Principal("local", "local", frozenset({"client"}))
NARROW = Principal("user", "ann", frozenset({"channel-owner"}), channels=frozenset({"recordings"}))

NODE = NodeId(PrivateKey.from_seed("01" * 32).public_hex)
OTHER = NodeId(PrivateKey.from_seed("02" * 32).public_hex)
RECORDINGS, TRACKING = ChannelName("recordings"), ChannelName("tracking")


def run_on(root: Path, work: Callable[[Node], Awaitable[T]], *, start: bool = True, **flags: Any) -> T:
    """Open the node below `root`, run `work` on it, close it."""

    async def run() -> T:
        for name in ("storage", "metadata"):
            (root / name).mkdir(parents=True, exist_ok=True)
        rebuild = flags.pop("rebuild", False)
        given = {"storage_dir": str(root / "storage"), "metadata_dir": str(root / "metadata"), **flags}
        node = open_node(load_settings(given), rebuild=rebuild)
        if start:
            await node.start()
        try:
            return await work(node)
        finally:
            await node.close()

    return asyncio.run(run())


async def furnish(node: Node) -> None:
    """ann owns `recordings` and NODE, ben owns `tracking` and OTHER."""
    await node.channels.create(ANN, RECORDINGS)
    await node.channels.create(BEN, TRACKING)
    await node.nodes.add(ANN, NODE, UserName("ann"), NodeLabel("rig-1"))
    await node.nodes.add(BEN, OTHER, UserName("ben"), NodeLabel("rig-2"))


async def outcomes(node: Node, action: str) -> list[tuple[str, str, str]]:
    """(Principal, object, outcome) of an action's audit entries, the oldest first."""
    found = await node.audit.list(None, 1000, action=action)
    return [(entry.principal, entry.object, entry.outcome) for entry in reversed(found)]
