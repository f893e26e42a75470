"""`kachery-lab upload` and `kachery-lab usage`: who put what into channels, and what was moved on each day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options
from kachery_lab.cli.output import more, table

limit_option = click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Rows to show")


def _query(flags: dict[str, Any], *names: str) -> str:
    return "?" + urlencode({name: value for name in names if (value := flags.pop(name)) is not None})


def _midnight(_context: click.Context, _option: click.Parameter, value: str | None) -> datetime | None:
    try:
        return None if value is None else datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise click.BadParameter("expected a day like 2026-01-31") from None


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


@click.group()
def upload() -> None:
    """Look at what was put into channels."""


@upload.command("list")
@click.option("--channel", help="Only into this channel")
@click.option("--principal", help="Only by this one, like user:ann")
@click.option("--label", help="Only with a label that contains this")
@click.option("--sha1", help="Only this file")
@click.option("--since", callback=_midnight, metavar="DAY", help="First day (UTC), like 2026-01-31")
@click.option("--until", callback=_midnight, metavar="DAY", help="Last day")
@click.option("--before", metavar="PLACE", help="Go on where an earlier list ended, which says this place")
@limit_option
@admin_options
def list_uploads(since: datetime | None, until: datetime | None, **flags: Any) -> None:
    """List uploads, the newest first."""
    flags["since"] = None if since is None else _ms(since)
    flags["until"] = None if until is None else _ms(until + timedelta(days=1)) - 1
    names = ("channel", "principal", "label", "sha1", "since", "until", "before", "limit")
    rows = admin(flags, "GET", "uploads", query=_query(flags, *names))
    columns = {"PRINCIPAL": "principal", "SIZE": "size", "LABEL": "label", "SHA1": "sha1"}
    table(rows["uploads"], TIME="storedAt", CHANNEL="channel", **columns)
    more("--before", rows["next"])


@click.command()
@click.option("--channel", help="Only of this channel")
@click.option("--principal", help="Only of this one, like user:ann")
@click.option("--since", metavar="DAY", help="First day, like 2026-01-31")
@click.option("--until", metavar="DAY", help="Last day")
@click.option("--after", metavar="PLACE", help="Go on where an earlier list ended, which says this place")
@limit_option
@admin_options
def usage(**flags: Any) -> None:
    """Show what was uploaded and downloaded, by day (UTC), channel and principal."""
    names = ("channel", "principal", "since", "until", "after", "limit")
    rows = admin(flags, "GET", "usage", query=_query(flags, *names))
    columns = {"UPLOADS": "uploads", "BYTES_UP": "bytesUploaded", "DOWNLOADS": "downloads"}
    table(rows["usage"], DAY="day", CHANNEL="channel", PRINCIPAL="principal", **columns, BYTES_DOWN="bytesDownloaded")
    more("--after", rows["next"])
