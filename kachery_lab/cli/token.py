"""`kachery-lab token`: credentials for people and programs."""

from __future__ import annotations

import time
from typing import Any

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options
from kachery_lab.cli.output import fields, table
from kachery_lab.services.principals import SCOPES


@click.group()
def token() -> None:
    """Make, list, show and revoke access tokens."""


@token.command()
@click.argument("user")
@click.option(
    "--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES), help="What it may do; repeatable"
)
@click.option("--channel", "channels", multiple=True, help="The only channel that it reaches; repeatable")
@click.option("--label", default="", help="What it is for")
@click.option("--days", type=click.IntRange(1, 36_500), help="Days until it expires; never, if not given")
@admin_options
def create(
    user: str, scopes: tuple[str, ...], channels: tuple[str, ...], label: str, days: int | None, **flags: Any
) -> None:
    """Make a token for USER and print it, this once."""
    expires_at = None if days is None else int((time.time() + days * 86400) * 1000)
    body = {"user": user, "scopes": list(scopes), "label": label, "expiresAt": expires_at}
    click.echo(admin(flags, "POST", "tokens", body={**body, "channels": list(channels) or None})["token"])


@token.command("list")
@admin_options
def list_tokens(**flags: Any) -> None:
    """List tokens, without their secrets."""
    columns = {"CREATED": "createdAt", "EXPIRES": "expiresAt", "REVOKED": "revokedAt", "SCOPES": "scopes"}
    rows = admin(flags, "GET", "tokens")["tokens"]
    table(rows, ID="id", USER="user", **columns, CHANNELS="channels", LABEL="label")


@token.command()
@click.argument("token_id", metavar="ID")
@admin_options
def show(token_id: str, **flags: Any) -> None:
    """Show a token, without its secret."""
    fields(admin(flags, "GET", "tokens", token_id))


@token.command()
@click.argument("token_id", metavar="ID")
@admin_options
def revoke(token_id: str, **flags: Any) -> None:
    """End a token now."""
    admin(flags, "DELETE", "tokens", token_id)
    click.echo(f"revoked {token_id}")
