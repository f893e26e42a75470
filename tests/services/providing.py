"""A node that provides files to a bucket that the test controls, or to its own."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kachery_lab.core.ids import ChannelName, ChunkOf, FileKey, NodeId, Sha1
from kachery_lab.core.roles import Role
from kachery_lab.node import Node
from kachery_lab.services.bands import BandHandlers, BandMessage
from kachery_lab.services.blobs import Claim, StoredBlob
from kachery_lab.services.file_providers import FileProviders, Found, Terms
from kachery_lab.services.principals import Principal
from kachery_lab.services.shelves import OwnShelf
from tests.services.opened import LOCAL, NODE, run_on

T = TypeVar("T")

CHANNEL = ChannelName("recordings")


CHANNELS = Principal("operator", "channel")
"""Who stores what comes through a channel."""


class Bands:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, str]] = []

    async def publish(self, channel: str, body: dict[str, Any]) -> None:
        self.said.append((channel, body["fileKey"]["sha1"], body["status"]))

    def channels(self) -> Mapping[str, Role]:
        return {}

    def statuses(self, sha1: str) -> list[str]:
        return [status for _, name, status in self.said if name == sha1]


class Shelf:
    """Somebody else's bucket: a dictionary that can be slow, or refuse."""

    def __init__(self) -> None:
        self.bucket: dict[str, bytes] = {}
        self.terms_now: Terms | None = Terms("hub/recordings", True)
        self.puts: list[str] = []
        self.running = self.most = 0
        self.seconds = 0.0
        self.gate: asyncio.Event | None = None
        self.fails: Exception | None = None

    async def terms(self, channel: str, asker: NodeId) -> Terms | None:
        return self.terms_now

    async def shows(self, channel: str, sha1: Sha1) -> bool:
        return sha1 in self.bucket

    async def put(self, channel: str, key: FileKey, found: Found) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
            if self.gate is not None:
                await self.gate.wait()
            if self.fails is not None:
                raise self.fails
            self.puts.append(key.sha1)
            self.bucket[key.sha1] = b"".join([piece async for piece in found.content.read(found.start, found.end)])
        finally:
            self.running -= 1


class World:
    """A node with files, and providers of its own with a shelf."""

    def __init__(self, node: Node, shelf: Shelf | OwnShelf | None = None) -> None:
        self.node = node
        self.handlers = BandHandlers()
        self.bands = Bands()
        self.shelf = Shelf()
        self.providers = FileProviders(
            self.handlers, node.blobs, node.files, node.origins, NodeId(node.identity.node_id)
        )
        self.providers.serve(self.bands, shelf or self.shelf)

    async def store(self, data: bytes) -> Sha1:
        """A file of this node's own people."""
        return (await self.received(data, LOCAL)).sha1

    async def received(self, data: bytes, principal: Principal = CHANNELS) -> StoredBlob:
        """A file that came, as its origins say, if nothing else is said."""

        async def stream() -> Any:
            yield data

        return await self.node.blobs.store(stream(), Claim(size=len(data)), principal)

    async def request(self, key: FileKey | Sha1, sender: NodeId = NODE, channel: str = CHANNEL) -> None:
        """Hand a request in, without waiting for what comes of it."""
        key = key if isinstance(key, FileKey) else FileKey(key)
        message = BandMessage(channel, "requestFiles", sender, {"type": "requestFile", "fileKey": key.to_json()})
        for handler in self.handlers.of("requestFile"):
            await handler(message, self.bands)

    async def idle(self) -> None:
        """Until nothing is being worked on."""
        while self.providers._jobs:
            await asyncio.sleep(0.005)

    async def running(self, count: int) -> None:
        """Until so many uploads run. Raises TimeoutError."""
        async with asyncio.timeout(60):
            while self.shelf.running < count:
                await asyncio.sleep(0.005)

    async def ask(self, key: FileKey | Sha1, **more: Any) -> list[str]:
        """Statuses that one request brings."""
        before = len(self.bands.said)
        await self.request(key, **more)
        await self.idle()
        return [status for _, _, status in self.bands.said[before:]]


def in_world(root: Path, work: Callable[[World], Awaitable[T]]) -> T:
    async def run(node: Node) -> T:
        world = World(node)
        try:
            return await work(world)
        finally:
            await world.providers.close()

    return run_on(root, run)


def sha1_of(data: bytes) -> Sha1:
    return Sha1(hashlib.sha1(data).hexdigest())


def chunk_key(data: bytes, parent: Sha1, start: int, end: int) -> FileKey:
    return FileKey(sha1_of(data), None, ChunkOf(FileKey(parent), start, end))
