"""For whom rights are decided: a node, a user or a client key; and what each may do in a channel now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kachery_lab.core.ids import NodeId
from kachery_lab.core.roles import Role, role_names
from kachery_lab.errors import Forbidden
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.principals import Principal

Kind = Literal["node", "user", "client"]
KINDS: dict[str, Kind] = {"node": "node", "user": "user", "client": "client"}
_READ = Role.REQUEST_FILES | Role.REQUEST_FEEDS | Role.REQUEST_TASKS
_WRITE = Role.PROVIDE_FILES | Role.PROVIDE_FEEDS | Role.PROVIDE_TASKS


@dataclass(frozen=True, slots=True)
class Subject:
    """Written `kind:name` where it is kept. `ceiling` is what the credential leaves of the subject's roles, `channels`
    the only channels that it reaches (None: all), `token` the id of a token, with whose end it loses everything."""

    kind: Kind
    name: str
    ceiling: Role = Role.ALL
    channels: frozenset[str] | None = None
    token: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    @classmethod
    def parse(
        cls, text: str, ceiling: Role = Role.ALL, channels: frozenset[str] | None = None, token: str | None = None
    ) -> Subject:
        """Inverse of `str`, with what `str` leaves out. Raises Forbidden."""
        kind, _, name = text.partition(":")
        if name and (known := KINDS.get(kind)):
            return cls(known, name, ceiling, channels, token)
        raise Forbidden("unknown subject")


def subject_of(principal: Principal, own_node: NodeId) -> Subject:
    """Local clients, and tokens with scope `client`, act as the node; other tokens as their user, cut by scopes."""
    if principal.kind != "user" or principal.may("client"):
        return Subject("node", own_node, token=principal.token)
    ceiling = Role.NONE
    if principal.may("read"):
        ceiling |= _READ
    if principal.may("write"):
        ceiling |= _WRITE
    return Subject("user", principal.name, ceiling, principal.channels, principal.token)


class RoleService:
    """Effective roles, decided anew at each use from what is in memory."""

    def __init__(self, data: AccessData, token_in_force: Callable[[str], bool]) -> None:
        self._data = data
        self._token_in_force = token_in_force

    def roles(self, subject: Subject, channel: str) -> Role:
        """What a subject may do in a channel now; nothing in a channel that does not exist."""
        if subject.channels is not None and channel not in subject.channels:
            return Role.NONE
        if self._has_ended(subject):
            return Role.NONE
        if subject.kind == "node":
            found = self._data.node_roles(channel, subject.name)
        elif subject.kind == "user":
            found = self._data.user_roles(channel, subject.name)
        else:
            found = self._data.client_roles(channel, subject.name)
        return found & subject.ceiling

    def _has_ended(self, subject: Subject) -> bool:
        return subject.token is not None and not self._token_in_force(subject.token)

    def require(self, subject: Subject, channel: str, role: Role) -> None:
        """Raises Forbidden that names role and channel."""
        if self.roles(subject, channel) & role != role:
            if self._has_ended(subject):
                raise Forbidden(
                    f"the token {subject.token} was revoked or has expired, so it gives no "
                    f"{' or '.join(role_names(role))} in the channel {channel}",
                    hint="Ask for a new address with a token in force",
                )
            raise Forbidden(
                f"{subject.kind} {subject.name} lacks {' and '.join(role_names(role))} in the channel {channel}",
                hint="The channel's owner grants roles; a node must also be a member and ask for them",
            )
