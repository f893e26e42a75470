"""`kachery-lab config`: the effective settings and where each came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import remote_options, server_options
from kachery_lab.cli.output import words
from kachery_lab.settings import Settings, load_settings, shown, variable


@click.command()
@click.option("--explain", is_flag=True, help="Add what each setting means")
@click.option("--running", is_flag=True, help="Ask the server that runs, here or at --server, for those it works with")
@remote_options
@server_options
def config(explain: bool, running: bool, **flags: Any) -> None:
    """Print the effective settings; secrets are masked."""
    for name, value, origin, meaning in _at_server(flags) if running else _here(flags):
        click.echo(f"{name}={value}  # {origin}")
        if explain:
            click.echo(f"    {meaning}")


def _here(flags: dict[str, Any]) -> Iterator[tuple[str, str, str, str | None]]:
    """(Variable, value, where it came from, what it means), as a server that starts now would have them."""
    settings = load_settings(flags)
    for name, field in Settings.model_fields.items():
        yield variable(name), shown(settings, name), settings.origin(name), field.description


def _at_server(flags: dict[str, Any]) -> Iterator[tuple[str, str, str, str | None]]:
    for one in admin(flags, "GET", "settings")["settings"]:
        value = words(one["value"]) if one["value"] else ""
        yield words(one["variable"]), value, words(one["origin"]), words(one["description"])
