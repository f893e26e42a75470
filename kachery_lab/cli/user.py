"""`kachery-lab user`: who owns tokens, nodes and channels."""

from __future__ import annotations

from typing import Any

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options
from kachery_lab.cli.output import fields, table


@click.group()
def user() -> None:
    """Make, list, show and remove users."""


@user.command()
@click.argument("name")
@admin_options
def add(name: str, **flags: Any) -> None:
    """Make a user."""
    admin(flags, "POST", "users", body={"name": name})
    click.echo(f"added {name}")


@user.command("list")
@admin_options
def list_users(**flags: Any) -> None:
    """List users."""
    table(admin(flags, "GET", "users")["users"], NAME="name", CREATED="createdAt")


@user.command()
@click.argument("name")
@admin_options
def show(name: str, **flags: Any) -> None:
    """Show a user."""
    fields(admin(flags, "GET", "users", name))


@user.command()
@click.argument("name")
@admin_options
def remove(name: str, **flags: Any) -> None:
    """Remove a user who owns nothing, with tokens and authorizations."""
    admin(flags, "DELETE", "users", name)
    click.echo(f"removed {name}")
