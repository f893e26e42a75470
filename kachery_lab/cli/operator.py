"""How a command reaches the node: through the admin socket of the running server, else by opening the node itself."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from kachery_lab.blobs.layout import MetadataLayout, StorageLayout
from kachery_lab.client.operator import OperatorClient
from kachery_lab.node import Node, with_node
from kachery_lab.settings import Settings

T = TypeVar("T")


def metadata_of(settings: Settings) -> MetadataLayout:
    """Where the metadata is, without opening it."""
    return MetadataLayout(settings.metadata_dir or StorageLayout(settings.storage_dir).default_metadata)


def run_operation(
    settings: Settings,
    remote: Callable[[OperatorClient], Awaitable[T]],
    local: Callable[[Node], Awaitable[T]],
    *,
    rebuild: bool = False,
) -> T:
    """Ask the running server if there is one; else do it here. Raises StartRefused and KacheryLabError."""
    os.umask(0o022)
    path = metadata_of(settings).admin_socket

    async def run() -> Any:
        if path.is_socket():
            async with OperatorClient(path) as client:
                if await client.answers():
                    return await remote(client)

        async def work(node: Node) -> T:
            return await local(node)

        return await with_node(settings, work, rebuild=rebuild)

    result: T = asyncio.run(run())
    return result
