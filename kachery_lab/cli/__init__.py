"""The command `kachery-lab`: one thin file per noun."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from kachery_lab import __version__
from kachery_lab.errors import KacheryLabError, StartRefused

_FILES = {
    "audit": "audit",
    "channel": "channel",
    "client": "client",
    "config": "config",
    "function": "function",
    "info": "info",
    "node": "node",
    "quota": "quota",
    "reindex": "reindex",
    "start": "start",
    "token": "token",
    "upload": "upload",
    "usage": "upload",
    "user": "user",
}
"""Command -> file of this directory that has it."""


class Commands(click.Group):
    """Imports a command's file when the command is asked for: most have no use for a server and its libraries."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted(_FILES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name; None when there is none."""
        if cmd_name not in _FILES:
            return None
        command: click.Command = getattr(import_module(f"{__name__}.{_FILES[cmd_name]}"), cmd_name)
        return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kachery-lab")
def cli() -> None:
    """The lab server that every kachery client can use."""


def main() -> None:
    """Run a command; refusals are told in two lines, without a traceback, with exit code 1."""
    run(cli)


def run(command: click.Command) -> None:
    """Run one command as a program."""
    try:
        command()
    except (StartRefused, KacheryLabError) as error:
        click.echo(f"kachery-lab: {error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        sys.exit(1)
