"""`kachery-lab upload` and `kachery-lab usage`: who put what into channels, and what was moved on each day."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options
from kachery_lab.cli.output import table

limit_option = click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Rows to show")


def _query(flags: dict[str, Any], *names: str) -> str:
    return "?" + urlencode({name: value for name in names if (value := flags.pop(name)) is not None})


@click.group()
def upload() -> None:
    """Look at what was put into channels."""


@upload.command("list")
@click.option("--channel", help="Only into this channel")
@click.option("--principal", help="Only by this one, like user:ann")
@click.option("--label", help="Only with a label that contains this")
@click.option("--sha1", help="Only this file")
@limit_option
@admin_options
def list_uploads(**flags: Any) -> None:
    """List uploads, the newest first."""
    rows = admin(flags, "GET", "uploads", query=_query(flags, "channel", "principal", "label", "sha1", "limit"))
    columns = {"PRINCIPAL": "principal", "SIZE": "size", "LABEL": "label", "SHA1": "sha1"}
    table(rows["uploads"], TIME="storedAt", CHANNEL="channel", **columns)


@click.command()
@click.option("--channel", help="Only of this channel")
@click.option("--principal", help="Only of this one, like user:ann")
@click.option("--since", metavar="DAY", help="First day, like 2026-01-31")
@click.option("--until", metavar="DAY", help="Last day")
@limit_option
@admin_options
def usage(**flags: Any) -> None:
    """Show what was uploaded and downloaded, by day (UTC), channel and principal."""
    rows = admin(flags, "GET", "usage", query=_query(flags, "channel", "principal", "since", "until", "limit"))
    columns = {"UPLOADS": "uploads", "BYTES_UP": "bytesUploaded", "DOWNLOADS": "downloads"}
    table(rows["usage"], DAY="day", CHANNEL="channel", PRINCIPAL="principal", **columns, BYTES_DOWN="bytesDownloaded")
