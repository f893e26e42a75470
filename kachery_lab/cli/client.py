"""`kachery-lab client`: the keys with which the newer clients prove who asks."""

from __future__ import annotations

import time
from typing import Any

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options
from kachery_lab.cli.output import fields, table


@click.group()
def client() -> None:
    """Register, list, approve, change and remove client keys."""


@client.command()
@click.argument("client_id")
@click.option("--label", default="", help="Name of the machine or job that holds the key")
@click.option("--user", required=True, help="User whose roles it has")
@admin_options
def add(client_id: str, label: str, user: str, **flags: Any) -> None:
    """Register a client key."""
    admin(flags, "POST", "clients", body={"clientId": client_id, "user": user, "label": label})
    click.echo(f"added {client_id}")


@client.command("list")
@admin_options
def list_clients(**flags: Any) -> None:
    """List client keys; one without a time under APPROVED waits."""
    columns = {"ASKED_AS": "askedAs", "ASKED_FROM": "askedFrom", "CREATED": "createdAt", "APPROVED": "approvedAt"}
    table(admin(flags, "GET", "clients")["clients"], LABEL="label", USER="user", **columns, CLIENT="clientId")


@client.command()
@click.argument("client_id")
@click.option("--user", help="User whose roles it gets; default: who its holder said to be")
@admin_options
def approve(client_id: str, user: str | None, **flags: Any) -> None:
    """Let a client key in whose holder opened its registration link."""
    body: dict[str, Any] = {"approved": True} | ({} if user is None else {"user": user})
    found = admin(flags, "PATCH", "clients", client_id, body=body)
    click.echo(f"approved {client_id} for {found['user']}")


@client.command()
@click.argument("client_id")
@admin_options
def show(client_id: str, **flags: Any) -> None:
    """Show a client key."""
    fields(admin(flags, "GET", "clients", client_id))


@client.command()
@click.argument("client_id")
@click.option("--label", required=True, help="Another name of the machine or job that holds the key")
@admin_options
def update(client_id: str, label: str, **flags: Any) -> None:
    """Give a client key another label."""
    fields(admin(flags, "PATCH", "clients", client_id, body={"label": label}))


@client.command()
@click.argument("client_id")
@admin_options
def remove(client_id: str, **flags: Any) -> None:
    """End a client key; what it uploaded stays."""
    admin(flags, "DELETE", "clients", client_id)
    click.echo(f"removed {client_id}")


@client.group()
def code() -> None:
    """Make, list and remove enrolment codes."""


@code.command("add")
@click.option("--user", required=True, help="User whose keys it registers")
@click.option("--label", default="", help="What it is for")
@click.option("--uses", type=click.IntRange(1), default=1, show_default=True, help="How many keys it registers")
@click.option("--hours", type=click.IntRange(1, 90 * 24), default=24, show_default=True, help="How long it is good")
@admin_options
def add_code(user: str, label: str, uses: int, hours: int, **flags: Any) -> None:
    """Print a new enrolment code; it is shown this once."""
    # A minute less than asked: the server allows 90 days from its own time.
    until = int(time.time() * 1000) + hours * 3_600_000 - 60_000
    body = {"user": user, "label": label, "uses": uses, "expiresAt": until}
    click.echo(admin(flags, "POST", "enrolment-codes", body=body)["code"])


@code.command("list")
@admin_options
def list_codes(**flags: Any) -> None:
    """List enrolment codes, without their texts."""
    columns = {"USES_LEFT": "usesLeft", "CREATED": "createdAt", "EXPIRES": "expiresAt"}
    table(admin(flags, "GET", "enrolment-codes")["codes"], ID="id", USER="user", LABEL="label", **columns)


@code.command("remove")
@click.argument("code_id")
@admin_options
def remove_code(code_id: str, **flags: Any) -> None:
    """End an enrolment code; the keys that it registered stay."""
    admin(flags, "DELETE", "enrolment-codes", code_id)
    click.echo(f"removed {code_id}")
