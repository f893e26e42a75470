"""`kachery-lab token`: credentials for people and programs."""

from __future__ import annotations

import time
from typing import Any

import click

from kachery_lab.cli.operator import run_operation
from kachery_lab.cli.options import storage_options
from kachery_lab.client.operator import OperatorClient
from kachery_lab.core.ids import UserName
from kachery_lab.node import Node
from kachery_lab.services.principals import SCOPES
from kachery_lab.services.tokens import Token
from kachery_lab.settings import load_settings


@click.group()
def token() -> None:
    """Make, list and revoke access tokens."""


def _time(ms: int | None) -> str:
    return "-" if ms is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(ms / 1000))


def _shown(found: Token) -> dict[str, Any]:
    return {
        "id": found.id,
        "user": found.user,
        "label": found.label,
        "scopes": list(found.scopes),
        "createdAt": found.created_at,
        "expiresAt": found.expires_at,
        "revokedAt": found.revoked_at,
    }


@token.command()
@click.argument("user")
@click.option(
    "--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES), help="What it may do; repeatable"
)
@click.option("--label", default="", help="What it is for")
@click.option("--days", type=click.IntRange(1), help="Days until it expires; never, if not given")
@storage_options
def create(user: str, scopes: tuple[str, ...], label: str, days: int | None, **flags: Any) -> None:
    """Make a token for USER and print it, this once."""
    name = UserName.parse(user, "USER")
    expires_at = None if days is None else int((time.time() + days * 86400) * 1000)

    async def local(node: Node) -> str:
        return (await node.tokens.create(name, scopes, label, expires_at))[1]

    async def remote(client: OperatorClient) -> str:
        body = {"user": name, "scopes": list(scopes), "label": label, "expiresAt": expires_at}
        return str((await client.post("/api/admin/v1/tokens", body))["token"])

    click.echo(run_operation(load_settings(flags), remote, local))


@token.command("list")
@storage_options
def list_tokens(**flags: Any) -> None:
    """List tokens, without their secrets."""

    async def local(node: Node) -> list[dict[str, Any]]:
        return [_shown(found) for found in await node.tokens.list()]

    async def remote(client: OperatorClient) -> list[dict[str, Any]]:
        return list((await client.get("/api/admin/v1/tokens"))["tokens"])

    click.echo(f"{'ID':10}{'USER':20}{'CREATED':18}{'EXPIRES':18}{'REVOKED':18}SCOPES  LABEL")
    for row in run_operation(load_settings(flags), remote, local):
        times = "".join(f"{_time(row[key]):18}" for key in ("createdAt", "expiresAt", "revokedAt"))
        click.echo(f"{row['id']:10}{row['user']:20}{times}{' '.join(row['scopes'])}  {row['label']}")


@token.command()
@click.argument("token_id", metavar="ID")
@storage_options
def revoke(token_id: str, **flags: Any) -> None:
    """End a token now."""

    async def local(node: Node) -> None:
        await node.tokens.revoke(token_id)

    async def remote(client: OperatorClient) -> None:
        await client.delete(f"/api/admin/v1/tokens/{token_id}")

    run_operation(load_settings(flags), remote, local)
    click.echo(f"revoked {token_id}")
