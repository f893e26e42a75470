"""`kachery-lab channel passcode`: roles for everybody who knows a text."""

from __future__ import annotations

from typing import Any

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options, roles_option
from kachery_lab.cli.output import table


@click.group()
def passcode() -> None:
    """Make, list and end passcodes of a channel."""


@passcode.command()
@click.argument("channel")
@roles_option
@click.option("--label", default="", help="Whom it is for")
@click.option("--passcode", "text", help="6 to 40 characters; made, if not given")
@admin_options
def add(channel: str, roles: tuple[str, ...], label: str, text: str | None, **flags: Any) -> None:
    """Make a passcode and print it, this once."""
    body = {"roles": list(roles), "label": label} | ({} if text is None else {"passcode": text})
    click.echo(admin(flags, "POST", "channels", channel, "passcodes", body=body)["passcode"])


@passcode.command("list")
@click.argument("channel")
@admin_options
def list_passcodes(channel: str, **flags: Any) -> None:
    """List passcodes, without their texts."""
    rows = admin(flags, "GET", "channels", channel, "passcodes")["passcodes"]
    table(rows, ID="id", CREATED="createdAt", ROLES="roles", LABEL="label")


@passcode.command()
@click.argument("channel")
@click.argument("passcode_id", metavar="ID")
@admin_options
def remove(channel: str, passcode_id: str, **flags: Any) -> None:
    """End a passcode for everybody who shows it."""
    admin(flags, "DELETE", "channels", channel, "passcodes", passcode_id)
    click.echo(f"removed {passcode_id}")
