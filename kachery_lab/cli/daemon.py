"""What users of the older daemon type: `kachery-daemon-start` and `kachery-daemon-info`."""

from __future__ import annotations

from typing import Any

import click

from kachery_lab.cli import run
from kachery_lab.cli.info import node_id
from kachery_lab.cli.options import server_options
from kachery_lab.settings import load_settings


@click.command("kachery-daemon-start")
@server_options
@click.option("--verbose", type=int, hidden=True, help="Accepted for old scripts; see --log-format")
def _start(verbose: int | None, **flags: Any) -> None:
    """Start this node."""
    # Only here: `kachery-daemon-info` has no use for a server.
    from kachery_lab.cli.start import run_server

    if verbose is not None:
        click.echo("--verbose does nothing here; KACHERY_LAB_LOG_LEVEL does", err=True)
    run_server(load_settings(flags))


@click.command("kachery-daemon-info")
def _info() -> None:
    """Print the node id."""
    click.echo(node_id(load_settings()))


def start() -> None:
    """Entry point."""
    run(_start)


def info() -> None:
    """Entry point."""
    run(_info)
