"""The command `kachery-lab`: one thin file per noun."""

from __future__ import annotations

import sys

import click

from kachery_lab import __version__
from kachery_lab.cli import (
    audit,
    channel,
    client,
    config,
    function,
    info,
    node,
    passcode,
    quota,
    reindex,
    start,
    token,
    upload,
    user,
)
from kachery_lab.errors import KacheryLabError, StartRefused


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kachery-lab")
def cli() -> None:
    """The lab server that every kachery client can use."""


cli.add_command(start.start)
cli.add_command(info.info)
cli.add_command(config.config)
cli.add_command(user.user)
cli.add_command(token.token)
cli.add_command(node.node)
cli.add_command(client.client)
cli.add_command(channel.channel)
channel.channel.add_command(passcode.passcode)
cli.add_command(function.function)
cli.add_command(upload.upload)
cli.add_command(upload.usage)
cli.add_command(quota.quota)
cli.add_command(audit.audit)
cli.add_command(reindex.reindex)


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
