"""Options that several commands share; each is a setting, and beats the environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from kachery_lab.core.roles import NAMES

Command = Callable[..., Any]

_OPTIONS = [
    click.option("--storage-dir", metavar="DIR", help="Storage directory (KACHERY_STORAGE_DIR)"),
    click.option("--metadata-dir", metavar="DIR", help="Directory of the database, on a local disk"),
]
_REMOTE = [
    click.option("--server", metavar="URL", help="Server to talk to (KACHERY_LAB_SERVER); default: the node here"),
    click.option(
        "--token", metavar="TOKEN", help="Token for it; better in KACHERY_LAB_TOKEN or KACHERY_LAB_TOKEN_FILE"
    ),
]
_SERVER = [
    click.option("--port", type=int, metavar="PORT", help="TCP port (KACHERY_DAEMON_PORT)"),
    click.option("--bind", metavar="ADDRESSES", help="Addresses to listen on, separated by commas"),
    click.option("--label", metavar="LABEL", help="Name of this node"),
    click.option("--owner", metavar="USER", help="User who owns this node"),
    click.option("--auth-group", metavar="GROUP", help="Group whose members may use this node"),
    click.option("--log-format", type=click.Choice(["json", "console"]), help="Form of the log"),
]
roles_option = click.option(
    "--role", "roles", multiple=True, required=True, type=click.Choice([*NAMES, "all"]), help="Repeatable"
)


def _apply(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def storage_options(command: Command) -> Command:
    """Where the storage and the database are."""
    return _apply(_OPTIONS, command)


def remote_options(command: Command) -> Command:
    """Which server to talk to."""
    return _apply(_REMOTE, command)


def admin_options(command: Command) -> Command:
    """Which server to administer."""
    return _apply([*_REMOTE, *_OPTIONS], command)


def server_options(command: Command) -> Command:
    """What a running server needs as well."""
    return _apply([*_OPTIONS, *_SERVER], command)
