"""`kachery-lab node`: the nodes that may take part in channels."""

from __future__ import annotations

from typing import Any

import click

from kachery_lab.cli.operator import admin
from kachery_lab.cli.options import admin_options
from kachery_lab.cli.output import fields, table


@click.group()
def node() -> None:
    """Register, list, approve, change and remove nodes."""


@node.command()
@click.argument("node_id")
@click.option("--label", required=True, help="Name of the node")
@click.option("--owner", help="User who owns it; default: the caller")
@admin_options
def add(node_id: str, label: str, owner: str | None, **flags: Any) -> None:
    """Register a node, approved."""
    body = {"nodeId": node_id, "label": label} | ({} if owner is None else {"owner": owner})
    admin(flags, "POST", "nodes", body=body)
    click.echo(f"added {node_id}")


@node.command("list")
@admin_options
def list_nodes(**flags: Any) -> None:
    """List nodes; one without a time under APPROVED waits, one with a time under CONNECTED hears us since then."""
    columns = {"APPROVED": "approvedAt", "REPORTED": "reportedAt", "CONNECTED": "connectedAt", "NODE": "nodeId"}
    table(admin(flags, "GET", "nodes")["nodes"], LABEL="label", OWNER="owner", **columns)


@node.command()
@click.argument("node_id")
@admin_options
def show(node_id: str, **flags: Any) -> None:
    """Show a node."""
    fields(admin(flags, "GET", "nodes", node_id))


@node.command()
@click.argument("node_id")
@admin_options
def channels(node_id: str, **flags: Any) -> None:
    """List the channels that a node joined, and what it may do there."""
    rows = admin(flags, "GET", "nodes", node_id, "memberships")["memberships"]
    columns = {"ASKED": "asked", "GRANTED": "granted", "EFFECTIVE": "effective", "OFFER": "offer"}
    table(rows, CHANNEL="channel", JOINED="createdAt", **columns)


@node.command()
@click.argument("node_id")
@click.option("--label", help="Another name of the node")
@click.option("--owner", help="Another user who owns it; an admin says so")
@admin_options
def update(node_id: str, label: str | None, owner: str | None, **flags: Any) -> None:
    """Give a node another label or owner."""
    given = {"label": label, "owner": owner}
    body = {key: value for key, value in given.items() if value is not None}
    fields(admin(flags, "PATCH", "nodes", node_id, body=body))


@node.command()
@click.argument("node_id")
@admin_options
def approve(node_id: str, **flags: Any) -> None:
    """Let a node in that reported itself."""
    admin(flags, "PATCH", "nodes", node_id, body={"approved": True})
    click.echo(f"approved {node_id}")


@node.command()
@click.argument("node_id")
@admin_options
def remove(node_id: str, **flags: Any) -> None:
    """Remove a node with its memberships and authorizations."""
    admin(flags, "DELETE", "nodes", node_id)
    click.echo(f"removed {node_id}")
