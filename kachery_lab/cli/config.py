"""`kachery-lab config`: the effective settings and where each came from."""

from __future__ import annotations

from typing import Any

import click

from kachery_lab.cli.options import server_options
from kachery_lab.settings import Settings, load_settings, shown, variable


@click.command()
@click.option("--explain", is_flag=True, help="Add what each setting means")
@server_options
def config(explain: bool, **flags: Any) -> None:
    """Print the effective settings; secrets are masked."""
    settings = load_settings(flags)
    for name, field in Settings.model_fields.items():
        click.echo(f"{variable(name)}={shown(settings, name)}  # {settings.origin(name)}")
        if explain:
            click.echo(f"    {field.description}")
