"""What a server and its commands import, and what the first migration works out, before the first of them is forked.

Imported by the process that `tests.commands` forks. Whatever is missing here is imported by each process itself.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import uvloop  # noqa: F401 (for `kachery-lab start`)

import kachery_lab.app  # noqa: F401 (for commands that open the node themselves)
from kachery_lab.cli import cli
from kachery_lab.db.migrate import migrate

for _name in cli.list_commands(click.Context(cli)):
    cli.get_command(click.Context(cli), _name)

with tempfile.TemporaryDirectory() as _place:
    migrate(Path(_place, "database"), backup_dir=Path(_place, "backups"))
