"""How a command reaches a server: by URL and token, else through the admin socket of the one that runs here, else by
opening the node in this process. In each case it sends the same request to the same endpoint."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import click

from kachery_lab.blobs.layout import MetadataLayout, StorageLayout
from kachery_lab.client.operator import OperatorClient
from kachery_lab.settings import Settings, load_settings

ROOT = "/api/admin/v1/"


def metadata_of(settings: Settings) -> MetadataLayout:
    """Where the metadata is, without opening it."""
    return MetadataLayout(settings.metadata_dir or StorageLayout(settings.storage_dir).default_metadata)


def admin(
    flags: Mapping[str, Any], method: str, *path: str, body: object = None, query: str = "", rebuild: bool = False
) -> dict[str, Any]:
    """The answer of an admin endpoint. `path`: its parts, not quoted. `rebuild`: a node that is opened here may have
    an empty database. Raises StartRefused and KacheryLabError."""
    target = ROOT + "/".join(quote(part, safe="") for part in path) + query
    return ask(flags, method, target, body, rebuild=rebuild)


def ask(
    flags: Mapping[str, Any], method: str, path: str, body: object = None, *, rebuild: bool = False
) -> dict[str, Any]:
    """The answer of any endpoint."""
    settings = load_settings(flags)
    if settings.server is not None:
        _warn_of_plain_text(settings)
        token = None if settings.token is None else settings.token.get_secret_value()
        return asyncio.run(_send(OperatorClient.to_server(settings.server, token), method, path, body))
    os.umask(0o022)
    return asyncio.run(_here(settings, method, path, body, rebuild))


async def _here(settings: Settings, method: str, path: str, body: object, rebuild: bool) -> dict[str, Any]:
    socket = metadata_of(settings).admin_socket
    if socket.is_socket():
        async with OperatorClient.over_socket(socket) as client:
            if await client.answers():
                return await client.request(method, path, body)

    return await _in_process(settings, method, path, body, rebuild)


async def _in_process(settings: Settings, method: str, path: str, body: object, rebuild: bool) -> dict[str, Any]:
    # Only here: importing the whole server takes longer than a request to one that runs.
    from kachery_lab.app import AdminSocket, create_app
    from kachery_lab.node import Node, with_node
    from kachery_lab.observability import logging

    # Standard output is the command's own.
    logging.configure(settings.log_format, "warning", descriptor=2)

    async def work(node: Node) -> dict[str, Any]:
        return await _send(OperatorClient.in_process(AdminSocket(create_app(node))), method, path, body)

    answer: dict[str, Any] = await with_node(settings, work, rebuild=rebuild)
    return answer


async def _send(client: OperatorClient, method: str, path: str, body: object) -> dict[str, Any]:
    async with client:
        return await client.request(method, path, body)


def _warn_of_plain_text(settings: Settings) -> None:
    url = urlsplit(settings.server or "")
    if url.scheme == "http" and settings.token is not None and not _is_here(url.hostname or ""):
        click.echo(f"kachery-lab: the token travels to {url.hostname} in plain text; use https", err=True)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
