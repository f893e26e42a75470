"""`kachery-lab info`: what this node is, from its files; and whether its server runs."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from kachery_lab.blobs.layout import StorageLayout
from kachery_lab.cli.operator import metadata_of
from kachery_lab.cli.options import storage_options
from kachery_lab.client.operator import OperatorClient
from kachery_lab.errors import StartRefused
from kachery_lab.settings import Settings, load_settings


@click.command()
@storage_options
def info(**flags: Any) -> None:
    """Show node id, places, and whether the server runs."""
    settings = load_settings(flags)
    metadata = metadata_of(settings)
    click.echo(f"node id   {node_id(settings)}")
    click.echo(f"storage   {settings.storage_dir}")
    click.echo(f"metadata  {metadata.root}")
    click.echo(f"address   {settings.public_url or 'whichever a caller uses: KACHERY_LAB_PUBLIC_URL is not set'}")

    async def running() -> bool:
        if not metadata.admin_socket.is_socket():
            return False
        async with OperatorClient.over_socket(metadata.admin_socket) as client:
            return await client.answers()

    click.echo(f"server    {'running' if asyncio.run(running()) else 'not running'}")


def node_id(settings: Settings) -> str:
    """The node id that the storage directory publishes. Raises StartRefused when it publishes none."""
    try:
        return StorageLayout(settings.storage_dir).node_id.read_text(encoding="ascii").strip()
    except OSError as error:
        raise StartRefused(
            f"{settings.storage_dir} holds no node: {error.strerror}", hint="Start one: kachery-lab start"
        ) from None
