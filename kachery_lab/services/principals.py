"""Who is asking."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kachery_lab.errors import Forbidden

Kind = Literal["local", "browser", "user", "operator"]
SCOPES = ("client", "read", "write", "channel-owner", "admin", "metrics")


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller.

    `local` holds the code from `client-auth`, `browser` one of the additional codes, `user` a token, and `operator`
    reached the admin socket, which only the server's own user can open. `peer` is the network address, if any.
    `channels` narrows a token to these channels; None: all. `token` is the id of a `user`'s token, which
    ends at `expires_at`, in ms since 1970.
    """

    kind: Kind
    name: str
    scopes: frozenset[str] = field(default_factory=frozenset)
    peer: str | None = None
    channels: frozenset[str] | None = None
    token: str | None = None
    expires_at: int | None = None

    def covers(self, channel: str) -> bool:
        """Whether the credential reaches a channel at all."""
        return self.channels is None or channel in self.channels

    @property
    def share(self) -> str | None:
        """Whose part of this server's capacity a request takes; None: the server's own work."""
        if self.kind == "user":
            return f"user {self.name}"
        if self.kind == "operator":
            # Who holds a ticket stores as the subject that it was issued to.
            return self.name if self.name.startswith(("node:", "user:", "client:")) else None
        return f"{self.kind} client at {self.peer}"

    @property
    def owner_name(self) -> str:
        """The user who owns what the caller makes."""
        return self.name if self.kind == "user" else "admin"

    def may(self, scope: str) -> bool:
        """Whether the caller holds a scope. The operator holds all; a local client may do what `client` may."""
        return self.kind == "operator" or scope in self.scopes

    def require(self, *scopes: str) -> None:
        """Raises Forbidden unless the caller holds one of the scopes."""
        if not any(self.may(scope) for scope in scopes):
            raise Forbidden(
                f"this needs the scope {' or '.join(scopes)}", hint="Ask an admin for a token with that scope"
            )


def local(peer: str | None) -> Principal:
    """The local lab client: acts as the node."""
    return Principal("local", "local", frozenset({"client"}), peer)


OPERATOR = Principal("operator", "operator")
