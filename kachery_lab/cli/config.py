"""`kachery-lab config`: the effective settings and where each came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kachery_lab.cli.options import server_options
from kachery_lab.settings import Settings, is_secret, load_settings, origin, variable


@click.command()
@click.option("--explain", is_flag=True, help="Add what each setting means")
@server_options
def config(explain: bool, **flags: Any) -> None:
    """Print the effective settings; secrets are masked."""
    settings = load_settings(flags)
    for name, field in Settings.model_fields.items():
        click.echo(f"{variable(name)}={_text(name, getattr(settings, name))}  # {origin(name, flags)}")
        if explain:
            click.echo(f"    {field.description}")


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if is_secret(name):
        return "********"
    if isinstance(value, tuple):
        return (":" if value and isinstance(value[0], Path) else ",").join(str(part) for part in value)
    if isinstance(value, dict):
        return ",".join(f"{host}={container}" for host, container in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)
