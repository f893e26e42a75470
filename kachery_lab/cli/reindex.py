"""`kachery-lab reindex`: build the index from the volume."""

from __future__ import annotations

import json
from typing import Any

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options


@click.command()
@click.option("--dry-run", is_flag=True, help="Only report what would change")
@admin_options
def reindex(dry_run: bool, **flags: Any) -> None:
    """Verify what the volume holds and make the database agree with it. Prints the report as JSON."""
    report = admin(flags, "POST", "reindex", query=f"?dry_run={'true' if dry_run else 'false'}", rebuild=True)
    click.echo(json.dumps(report, indent=2))
    if report["failed"]:
        raise SystemExit(1)
