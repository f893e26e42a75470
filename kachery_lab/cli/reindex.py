"""`kachery-lab reindex`: build the index from the volume."""

from __future__ import annotations

import json
from typing import Any

import click

from kachery_lab.cli.operator import run_operation
from kachery_lab.cli.options import storage_options
from kachery_lab.client.operator import OperatorClient
from kachery_lab.maintenance import reindex as maintenance
from kachery_lab.node import Node
from kachery_lab.settings import load_settings


@click.command()
@click.option("--dry-run", is_flag=True, help="Only report what would change")
@storage_options
def reindex(dry_run: bool, **flags: Any) -> None:
    """Verify what the volume holds and make the database agree with it. Prints the report as JSON."""

    async def local(node: Node) -> dict[str, Any]:
        report = await maintenance.reindex(node, dry_run)
        if not dry_run:
            await node.acknowledge_volume()
        return report.to_json()

    async def remote(client: OperatorClient) -> dict[str, Any]:
        return await client.post(f"/api/admin/v1/reindex?dry_run={'true' if dry_run else 'false'}", {})

    report = run_operation(load_settings(flags), remote, local, rebuild=True)
    click.echo(json.dumps(report, indent=2))
    if report["failed"]:
        raise SystemExit(1)
