"""`kachery-lab audit`: who changed what, and who was refused."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options
from kachery_lab.cli.output import more, table


@click.group()
def audit() -> None:
    """Look at changes and refusals."""


@audit.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Entries to show")
@click.option("--before", type=click.IntRange(1), help="Only entries older than the one with this ID")
@click.option("--principal", help="Only what this caller did, like user:ann")
@click.option("--action", help="Only this action, like channel.create")
@click.option("--object", help="Only what was done to this, like a channel's name")
@click.option("--outcome", help="`done`, or the code of a refusal, like `forbidden`")
@admin_options
def list_entries(**flags: Any) -> None:
    """List entries, the newest first."""
    names = ("limit", "before", "principal", "action", "object", "outcome")
    given = {name: value for name in names if (value := flags.pop(name)) is not None}
    found = admin(flags, "GET", "audit", query="?" + urlencode(given))
    columns = {"ACTION": "action", "OBJECT": "object", "OUTCOME": "outcome", "DETAIL": "detail"}
    table(found["entries"], ID="id", TIME="at", PRINCIPAL="principal", PEER="peer", **columns)
    more("--before", found["next"])
