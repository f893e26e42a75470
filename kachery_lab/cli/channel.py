"""`kachery-lab channel`: channels, their members and what these may do."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import click

from kachery_lab.cli.operator import admin, ask
from kachery_lab.cli.options import Command, admin_options, roles_option
from kachery_lab.cli.output import fields, more, table
from kachery_lab.cli.passcode import passcode
from kachery_lab.core.ids import Sha1
from kachery_lab.core.objects import file_path
from kachery_lab.core.roles import NAMES
from kachery_lab.errors import InvalidInput
from kachery_lab.settings import parse_size

LIMITS = {
    "max_bytes": "maxBytes",
    "max_object_bytes": "maxObjectBytes",
    "max_objects": "maxObjects",
    "retention_days": "retentionDays",
}
_COUNTS = ("max_objects", "retention_days")


@click.group()
def channel() -> None:
    """Make channels, join them, grant roles in them."""


channel.add_command(passcode)


def _limit(_context: click.Context, option: click.Parameter, value: str | None) -> int | str | None:
    if value is None or value == "none":
        return value
    try:
        return int(value) if option.name in _COUNTS else parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _options(command: Command) -> Command:
    for name, words in reversed(
        {
            "--max-bytes": "Bytes that all objects may have, like 2TB, or none",
            "--max-object-bytes": "Bytes that one object may have, like 50GB, or none",
            "--max-objects": "How many objects there may be, or none",
            "--retention-days": "Days that an object stays, or none",
        }.items()
    ):
        command = click.option(name, callback=_limit, metavar="LIMIT", help=words)(command)
    return click.option("--owner", help="User who owns it")(command)


def _body(owner: str | None, limits: dict[str, Any]) -> dict[str, Any]:
    given = {LIMITS[name]: None if value == "none" else value for name, value in limits.items() if value is not None}
    return given if owner is None else {"owner": owner, **given}


def _split(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: flags.pop(name) for name in LIMITS}


@channel.command()
@click.argument("name")
@click.option("--public", is_flag=True, help="Anybody may read it")
@_options
@admin_options
def create(name: str, public: bool, owner: str | None, **flags: Any) -> None:
    """Make a channel, private unless said."""
    admin(flags, "POST", "channels", body={"name": name, "public": public, **_body(owner, _split(flags))})
    click.echo(f"created {name}")


@channel.command("list")
@admin_options
def list_channels(**flags: Any) -> None:
    """List channels: all for an admin, their own for others."""
    rows = admin(flags, "GET", "channels")["channels"]
    table(rows, NAME="name", OWNER="owner", PUBLIC="public", BYTES="maxBytes", DAYS="retentionDays")


@channel.command()
@click.argument("name")
@admin_options
def show(name: str, **flags: Any) -> None:
    """Show a channel and how many bytes it holds."""
    fields(admin(flags, "GET", "channels", name))


@channel.command()
@click.argument("name")
@click.option("--public/--private", default=None, help="Whether anybody may read it")
@click.option("--public-local", is_flag=True, default=None, help="Members go on offering their local files in it")
@_options
@admin_options
def update(name: str, public: bool | None, public_local: bool | None, owner: str | None, **flags: Any) -> None:
    """Change a channel."""
    given = {"public": public, "publicLocal": public_local}
    body = {key: value for key, value in given.items() if value is not None} | _body(owner, _split(flags))
    fields(admin(flags, "PATCH", "channels", name, body=body))


@channel.command()
@click.argument("name")
@admin_options
def remove(name: str, **flags: Any) -> None:
    """Remove a channel with memberships, rights and references."""
    admin(flags, "DELETE", "channels", name)
    click.echo(f"removed {name}")


@channel.command()
@click.argument("name")
@click.option("--node", "node_id", help="Node that joins; default: the server's own")
@click.option("--role", "roles", multiple=True, type=click.Choice([*NAMES, "all"]), help="What to ask for; default all")
@click.option("--offer", type=click.Choice(["local", "uploaded"]), help="Which of its files it offers")
@click.option("--public-local", is_flag=True, help="Offer local files in a public channel all the same")
@click.option("--passcode", "passcodes", multiple=True, help="A passcode of the channel; repeatable")
@admin_options
def join(name: str, node_id: str | None, roles: tuple[str, ...], offer: str | None, **flags: Any) -> None:
    """Let a node ask for roles in a channel. It has those that the channel's owner grants."""
    body: dict[str, Any] = {"asked": list(roles) or ["all"], "publicLocal": flags.pop("public_local")}
    body |= {"passcodes": list(flags.pop("passcodes"))} | ({} if offer is None else {"offer": offer})
    found = admin(flags, "PUT", "channels", name, "memberships", node_id or _own_node(flags), body=body)
    fields({key: found[key] for key in ("nodeId", "asked", "granted", "effective", "offer")})


@channel.command()
@click.argument("name")
@click.option("--node", "node_id", help="Node that leaves; default: the server's own")
@admin_options
def leave(name: str, node_id: str | None, **flags: Any) -> None:
    """End a node's membership."""
    admin(flags, "DELETE", "channels", name, "memberships", node_id or _own_node(flags))
    click.echo(f"left {name}")


def _own_node(flags: dict[str, Any]) -> str:
    return str(ask(flags, "GET", "/api/v1/info")["nodeId"])


def subject_of(text: str) -> tuple[str, str]:
    """Kind and name of `kind:name`. Raises InvalidInput."""
    kind, _, name = text.partition(":")
    if not name:
        raise InvalidInput(f"{text!r}: expected user:NAME, node:ID or client:ID")
    return kind, name


@channel.command()
@click.argument("name")
@click.argument("subject", metavar="user:NAME|node:ID|client:ID")
@roles_option
@admin_options
def grant(name: str, subject: str, roles: tuple[str, ...], **flags: Any) -> None:
    """Set what a user, a node or a client key is granted, in place of what it was."""
    found = admin(flags, "PUT", "channels", name, "authorizations", *subject_of(subject), body={"roles": list(roles)})
    click.echo(f"{subject} has {' '.join(found['roles'])} in {name}")


@channel.command()
@click.argument("name")
@click.argument("subject", metavar="user:NAME|node:ID|client:ID")
@admin_options
def revoke(name: str, subject: str, **flags: Any) -> None:
    """Take away what was granted."""
    admin(flags, "DELETE", "channels", name, "authorizations", *subject_of(subject))
    click.echo(f"{subject} has nothing in {name}")


@channel.command()
@click.argument("name")
@admin_options
def members(name: str, **flags: Any) -> None:
    """List the nodes that joined, and what users, nodes and client keys are granted."""
    rows = admin(flags, "GET", "channels", name, "memberships")["memberships"]
    table(rows, NODE="nodeId", ASKED="asked", GRANTED="granted", EFFECTIVE="effective", OFFER="offer")
    click.echo()
    rows = admin(flags, "GET", "channels", name, "authorizations")["authorizations"]
    table(rows, KIND="kind", SUBJECT="subject", ROLES="roles")


def _object(text: str) -> str:
    """The path of an object, which of a file may be written as its SHA-1."""
    return text if "/" in text else file_path(Sha1.parse(text))


def _page(command: Command) -> Command:
    limit = click.IntRange(1, 1000)
    command = click.option("--limit", type=limit, default=100, show_default=True, help="Files to show")(command)
    return click.option("--after", metavar="PATH", help="Only what comes after this path")(command)


def _listed(flags: dict[str, Any], name: str, what: str) -> list[dict[str, Any]]:
    page = {key: value for key in ("limit", "after") if (value := flags.pop(key)) is not None}
    found = admin(flags, "GET", "channels", name, what, query="?" + urlencode(page))
    more("--after", found["next"])
    rows: list[dict[str, Any]] = found[what]
    return rows


@channel.command()
@click.argument("name")
@_page
@admin_options
def objects(name: str, **flags: Any) -> None:
    """List what lies in a channel, by path."""
    columns = {"BY": "principal", "SIZE": "size", "LABEL": "label", "ON_DEMAND": "onDemand"}
    table(_listed(flags, name, "objects"), STORED="storedAt", **columns, PATH="path")


@channel.command()
@click.argument("name")
@click.argument("file", metavar="SHA1|PATH")
@admin_options
def delete(name: str, file: str, **flags: Any) -> None:
    """Delete a file in a channel; `restore` undoes it."""
    admin(flags, "DELETE", "channels", name, "objects", _object(file))
    click.echo(f"deleted {file} in {name}")


@channel.command()
@click.argument("name")
@_page
@admin_options
def deletions(name: str, **flags: Any) -> None:
    """List what was deleted in a channel and can be restored."""
    columns = {"BY": "deletedBy", "SIZE": "size", "LABEL": "label", "UPLOADED_BY": "principal"}
    table(_listed(flags, name, "deletions"), DELETED="deletedAt", **columns, PATH="path")


@channel.command()
@click.argument("name")
@click.argument("file", metavar="SHA1|PATH")
@admin_options
def restore(name: str, file: str, **flags: Any) -> None:
    """Undo the deletion of a file in a channel."""
    admin(flags, "POST", "channels", name, "deletions", _object(file), "restore")
    click.echo(f"restored {file} in {name}")
