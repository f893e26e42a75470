"""`kachery-lab quota`: what users, nodes and client keys may have in all channels together."""

from __future__ import annotations

from typing import Any

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options
from kachery_lab.cli.output import fields, table
from kachery_lab.settings import parse_size

SUBJECT = "user:NAME|node:ID|client:ID"


@click.group()
def quota() -> None:
    """Limit what one user, node or client key may store."""


def _size(_context: click.Context, _option: click.Parameter, value: str | None) -> int | None:
    try:
        return None if value is None else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@quota.command("set")
@click.argument("subject", metavar=SUBJECT)
@click.option("--max-bytes", callback=_size, metavar="SIZE", help="Bytes in all channels, like 2TB; default: no limit")
@click.option("--max-objects", type=click.IntRange(0), help="Objects in all channels; default: no limit")
@admin_options
def set_quota(subject: str, max_bytes: int | None, max_objects: int | None, **flags: Any) -> None:
    """Set a quota, in place of what it was. What is over it stays."""
    fields(admin(flags, "PUT", "quotas", subject, body={"maxBytes": max_bytes, "maxObjects": max_objects}))


@quota.command("list")
@admin_options
def list_quotas(**flags: Any) -> None:
    """List quotas."""
    table(admin(flags, "GET", "quotas")["quotas"], SUBJECT="subject", BYTES="maxBytes", OBJECTS="maxObjects")


@quota.command()
@click.argument("subject", metavar=SUBJECT)
@admin_options
def show(subject: str, **flags: Any) -> None:
    """Show a quota and what counts towards it."""
    fields(admin(flags, "GET", "quotas", subject))


@quota.command()
@click.argument("subject", metavar=SUBJECT)
@admin_options
def remove(subject: str, **flags: Any) -> None:
    """Remove a quota: no limit any more."""
    admin(flags, "DELETE", "quotas", subject)
    click.echo(f"{subject} has no quota")
