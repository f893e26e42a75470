"""Who takes part in a channel: memberships (asked by a node's owner), authorizations and passcodes (granted by the
channel's owner)."""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Literal

from sqlalchemy import Connection, delete
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import NodeId, UserName
from kachery_lab.core.keys import PrivateKey, derive_key
from kachery_lab.core.roles import Role, role_names
from kachery_lab.db.models import authorizations, membership_passcodes, memberships, passcodes
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, NotFound
from kachery_lab.services.access_data import AccessData, Membership, Passcode
from kachery_lab.services.audit import AuditService
from kachery_lab.services.channels import ChannelService
from kachery_lab.services.nodes import NodeService
from kachery_lab.services.principals import Principal
from kachery_lab.services.users import add_user

SubjectKind = Literal["node", "user", "client"]
Offer = Literal["local", "uploaded"]
_CLIENT_ID = re.compile(r"[0-9a-f]{64}|[A-Za-z0-9_-]{1,80}", re.ASCII)


class AuthorizationService:
    """Grants and memberships. Effective roles are what is both asked and granted (`AccessData`)."""

    def __init__(
        self,
        data: AccessData,
        audit: AuditService,
        channel_service: ChannelService,
        nodes: NodeService,
        secret: PrivateKey,
    ) -> None:
        self._data = data
        self._audit = audit
        self._channels = channel_service
        self._nodes = nodes
        self._passcode_key = derive_key(secret, "kachery-lab/passcodes/1")

    # -- authorizations: the channel's owner grants --------------------------------------------------------------

    def granted(self, actor: Principal, channel: str) -> list[tuple[str, str, Role]]:
        """(Kind, subject, granted roles) of a channel."""
        self._channels.require_owner(actor, channel)
        return sorted((k, s, roles) for (c, k, s), roles in self._data.authorizations.items() if c == channel)

    async def grant(self, actor: Principal, channel: str, kind: SubjectKind, subject: str, roles: Role) -> None:
        """Set what a subject is granted, in place of what it was. No role at all is `revoke`."""
        what = f"{channel} {kind}:{subject}"
        async with self._audit.action(actor, "authorization.grant", what, ", ".join(role_names(roles))) as act:
            self._channels.require_owner(actor, channel)
            name = parse_subject(kind, subject)
            if not roles:
                raise InvalidInput("roles: expected at least one", hint="Remove the authorization instead")
            row = {"granted": int(roles), "created_at": int(time.time() * 1000)}
            statement = insert(authorizations).values(channel=channel, subject_kind=kind, subject=name, **row)
            statement = statement.on_conflict_do_update(
                index_elements=[authorizations.c.channel, authorizations.c.subject_kind, authorizations.c.subject],
                set_=row,
            )

            def change(conn: Connection) -> None:
                if kind == "user":
                    add_user(conn, name)
                conn.execute(statement)

            await self._data.change(act.recorded(change))

    async def revoke(self, actor: Principal, channel: str, kind: SubjectKind, subject: str) -> None:
        """Take away what a subject was granted. Raises NotFound."""
        async with self._audit.action(actor, "authorization.revoke", f"{channel} {kind}:{subject}") as act:
            self._channels.require_owner(actor, channel)
            if (channel, kind, subject) not in self._data.authorizations:
                raise NotFound(f"{kind} {subject} has no authorization in {channel}")
            statement = delete(authorizations).where(
                authorizations.c.channel == channel,
                authorizations.c.subject_kind == kind,
                authorizations.c.subject == subject,
            )
            await self._data.change(act.recorded(lambda conn: conn.execute(statement).rowcount))

    async def set_users(self, actor: Principal, channel: str, reach: Role, users: Mapping[UserName, Role]) -> None:
        """Set which roles of `reach` each user is granted; users who are not named lose these, and roles beyond `reach`
        stay as they are. All of it is one change."""
        async with self._audit.action(actor, "authorization.grant", f"{channel} users") as note:
            self._channels.require_owner(actor, channel)
            known = {
                s: roles for (c, kind, s), roles in self._data.authorizations.items() if (c, kind) == (channel, "user")
            }
            wanted = {
                name: known.get(name, Role.NONE) & ~reach | users.get(UserName(name), Role.NONE)
                for name in {*known, *users}
            }
            changed = {name: roles for name, roles in wanted.items() if roles != known.get(name, Role.NONE)}
            note("; ".join(f"{name}: {', '.join(role_names(roles))}" for name, roles in sorted(changed.items())))
            now = int(time.time() * 1000)

            def change(conn: Connection) -> None:
                for name, roles in changed.items():
                    conn.execute(
                        delete(authorizations).where(
                            authorizations.c.channel == channel,
                            authorizations.c.subject_kind == "user",
                            authorizations.c.subject == name,
                        )
                    )
                    if roles:
                        add_user(conn, name)
                        row = {"channel": channel, "subject_kind": "user", "subject": name}
                        conn.execute(insert(authorizations).values(**row, granted=int(roles), created_at=now))

            if changed:
                await self._data.change(change)

    # -- memberships: the node's owner asks ----------------------------------------------------------------------

    def memberships(self, actor: Principal, channel: str | None, node_id: NodeId | None) -> list[Membership]:
        """Memberships of one channel (for its owner) or of one node (for its owner)."""
        if node_id is not None:
            self._nodes.require_speaker(actor, node_id)
        elif channel is not None:
            self._channels.require_owner(actor, channel)
        else:
            actor.require("admin")
        return [
            found
            for found in self._data.memberships.values()
            if channel in (None, found.channel) and node_id in (None, found.node_id) and actor.covers(found.channel)
        ]

    async def join(
        self,
        actor: Principal,
        channel: str,
        node_id: NodeId,
        asked: Role = Role.ALL,
        *,
        offer: Offer | None = None,
        public_local: bool = False,
        shown: Iterable[str] = (),
    ) -> Membership:
        """Ask for a part in a channel, in place of an older request. It gives nothing that is not granted.

        `offer` says which blobs the node provides there: `local` (default in private channels) or `uploaded`; in public
        ones `local` needs `public_local`. `shown` are passcodes.
        """
        async with self._audit.action(actor, "membership.join", f"{channel} node:{node_id}") as act:
            self._nodes.require_speaker(actor, node_id)
            if not actor.covers(channel):
                raise Forbidden("this token is for other channels")
            found = self._data.channel(channel)
            offer = offer or ("uploaded" if found.public else "local")
            if offer not in ("local", "uploaded"):
                raise InvalidInput("offer: expected local or uploaded")
            if offer == "local" and found.public and not public_local:
                raise Conflict(
                    f"{channel} is public: local files would be open to anyone",
                    hint="Say --public-local if you mean it",
                )
            digests = [self.digest(channel, passcode) for passcode in shown]
            row = {"asked": int(asked), "offer": offer, "created_at": int(time.time() * 1000)}
            statement = insert(memberships).values(channel=channel, node_id=node_id, **row)
            statement = statement.on_conflict_do_update(
                index_elements=[memberships.c.channel, memberships.c.node_id], set_=row
            )

            def change(conn: Connection) -> None:
                conn.execute(statement)
                _show(conn, channel, node_id, digests)

            await self._data.change(act.recorded(change))
            return self._data.memberships[channel, node_id]

    async def leave(self, actor: Principal, channel: str, node_id: NodeId) -> None:
        """Give up a membership. The node's owner or the channel's may. Raises NotFound."""
        async with self._audit.action(actor, "membership.leave", f"{channel} node:{node_id}") as act:
            actor.require("admin", "channel-owner")
            node, found = self._data.nodes.get(node_id), self._data.channels.get(channel)
            owners = {node.owner if node else None, found.owner if found else None}
            may = actor.may("admin") or (actor.name in owners and actor.covers(channel))
            if (channel, node_id) not in self._data.memberships or not may:
                raise NotFound(f"the node {node_id} is no member of {channel!r}")
            statement = delete(memberships).where(memberships.c.channel == channel, memberships.c.node_id == node_id)

            def change(conn: Connection) -> None:
                conn.execute(statement)
                _show(conn, channel, node_id, [])

            await self._data.change(act.recorded(change))

    # -- passcodes -----------------------------------------------------------------------------------------------

    def digest(self, channel: str, passcode: str) -> str:
        """What is kept of a passcode: a keyed hash, since six characters are guessed from a plain one."""
        if not 6 <= len(passcode) <= 40:
            raise InvalidInput("passcode: expected 6 to 40 characters")
        return hmac.digest(self._passcode_key, f"{channel}\n{passcode}".encode("utf-8", "replace"), "sha256").hex()

    def passcodes(self, actor: Principal, channel: str) -> list[Passcode]:
        """The passcodes of a channel, without their texts."""
        self._channels.require_owner(actor, channel)
        return sorted(
            (found for (name, _), found in self._data.passcodes.items() if name == channel),
            key=lambda found: (found.created_at, found.id),
        )

    async def add_passcode(
        self, actor: Principal, channel: str, roles: Role, label: str = "", passcode: str | None = None
    ) -> tuple[Passcode, str]:
        """A passcode that grants roles to every membership that shows it, and its text, which is shown this once."""
        text = secrets.token_urlsafe(15) if passcode is None else passcode
        async with self._audit.action(actor, "passcode.add", channel, ", ".join(role_names(roles))) as act:
            self._channels.require_owner(actor, channel)
            digest = self.digest(channel, text)
            if (channel, digest) in self._data.passcodes:
                raise Conflict("this passcode is in use here")
            if not roles or len(label) > 100 or not label.isprintable():
                raise InvalidInput("expected at least one role, and a label of at most 100 printable characters")
            row = {"channel": channel, "digest": digest, "id": secrets.token_hex(4), "label": label}
            statement = insert(passcodes).values(**row, granted=int(roles), created_at=int(time.time() * 1000))
            await self._data.change(act.recorded(lambda conn: conn.execute(statement).rowcount))
            return self._data.passcodes[channel, digest], text

    async def remove_passcode(self, actor: Principal, channel: str, passcode_id: str) -> None:
        """End a passcode for everybody who shows it. Raises NotFound."""
        async with self._audit.action(actor, "passcode.remove", f"{channel} {passcode_id}") as act:
            self._channels.require_owner(actor, channel)
            if not any(found.id == passcode_id for found in self.passcodes(actor, channel)):
                raise NotFound(f"{channel} has no passcode {passcode_id!r}")
            statement = delete(passcodes).where(passcodes.c.channel == channel, passcodes.c.id == passcode_id)
            await self._data.change(act.recorded(lambda conn: conn.execute(statement).rowcount))


def parse_subject(kind: str, subject: str) -> str:
    """The name of a subject of this kind. Raises InvalidInput."""
    if kind == "node":
        return NodeId.parse(subject, "subject")
    if kind == "user":
        return UserName.parse(subject, "subject")
    if kind == "client" and _CLIENT_ID.fullmatch(subject):
        return subject
    raise InvalidInput("subject: expected a node id, a user name or a client id, and its kind")


def _show(conn: Connection, channel: str, node_id: str, digests: Iterable[str]) -> None:
    conn.execute(
        delete(membership_passcodes).where(
            membership_passcodes.c.channel == channel, membership_passcodes.c.node_id == node_id
        )
    )
    for digest in set(digests):
        conn.execute(insert(membership_passcodes).values(channel=channel, node_id=node_id, digest=digest))
