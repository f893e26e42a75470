"""`kachery-lab function`: single task functions of a channel."""

from __future__ import annotations

import re
from typing import Any

import click

from kachery_lab.cli.channel import subject_of
from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options
from kachery_lab.cli.output import table

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.group()
def function() -> None:
    """Say who may use single task functions of a channel, and for how long they may run."""


def _seconds(_context: click.Context, _option: click.Parameter, value: str) -> int | None:
    if value == "none":
        return None
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", value)
    if match is None:
        raise click.BadParameter("expected a number of seconds, or one with s, m, h or d at its end, or none")
    return int(match[1]) * _UNITS[match[2] or "s"]


@function.command("list")
@click.argument("channel")
@admin_options
def list_functions(channel: str, **flags: Any) -> None:
    """List the functions of a channel for which something is set."""
    found = admin(flags, "GET", "channels", channel, "functions")["functions"]
    rows = [
        {**one, **grant}
        for one in found
        for grant in (one["grants"] or [{"kind": None, "subject": None, "roles": None}])
    ]
    table(rows, FUNCTION="functionId", SECONDS="maxRunSeconds", KIND="kind", SUBJECT="subject", ROLES="roles")


@function.command()
@click.argument("channel")
@click.argument("name", metavar="FUNCTION|*")
@click.argument("limit", callback=_seconds, metavar="TIME|none")
@admin_options
def limit(channel: str, name: str, limit: int | None, **flags: Any) -> None:
    """Set for how long a backend may keep a task of a function, like 90m; `*`: of all others."""
    admin(flags, "PUT", "channels", channel, "functions", name, body={"maxRunSeconds": limit})
    click.echo(f"{name} in {channel}: {'no limit of its own' if limit is None else f'{limit} s'}")


@function.command()
@click.argument("channel")
@click.argument("name", metavar="FUNCTION")
@click.argument("subject", metavar="user:NAME|node:ID|client:ID")
@click.option(
    "--role",
    "roles",
    multiple=True,
    required=True,
    type=click.Choice(["requestTasks", "provideTasks"]),
    help="Repeatable",
)
@admin_options
def grant(channel: str, name: str, subject: str, roles: tuple[str, ...], **flags: Any) -> None:
    """Let a user, a node or a client key use a function; others then may not."""
    path = ("channels", channel, "functions", name, "grants", *subject_of(subject))
    admin(flags, "PUT", *path, body={"roles": list(roles)})
    click.echo(f"{subject} has {' '.join(roles)} for {name} in {channel}")


@function.command()
@click.argument("channel")
@click.argument("name", metavar="FUNCTION")
@click.argument("subject", metavar="user:NAME|node:ID|client:ID")
@admin_options
def revoke(channel: str, name: str, subject: str, **flags: Any) -> None:
    """Remove an entry; without any the roles in the channel decide."""
    admin(flags, "DELETE", "channels", channel, "functions", name, "grants", *subject_of(subject))
    click.echo(f"{subject} has no entry for {name} in {channel}")
