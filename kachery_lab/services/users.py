"""Users: names in this server's own table; they own nodes, channels and tokens."""

from __future__ import annotations

import time

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import UserName
from kachery_lab.db.models import authorizations, clients, enrolment_codes, task_grants, tokens, users
from kachery_lab.errors import Conflict, NotFound
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.principals import Principal


def add_user(conn: Connection, name: str) -> None:
    """Make a user unless it is there. For use inside a change."""
    conn.execute(insert(users).values(name=name, created_at=int(time.time() * 1000)).on_conflict_do_nothing())


class UserService:
    """Users are made by admins, or on the way when something gets an owner."""

    def __init__(self, data: AccessData, audit: AuditService) -> None:
        self._data = data
        self._audit = audit

    def list(self, actor: Principal) -> list[tuple[str, int]]:
        """(Name, when made in ms since 1970), by name. Raises Forbidden."""
        actor.require("admin")
        return sorted(self._data.users.items())

    def get(self, actor: Principal, name: str) -> tuple[str, int]:
        """(Name, when made). Raises Forbidden, NotFound."""
        actor.require("admin")
        if name not in self._data.users:
            raise NotFound(f"there is no user {name!r}")
        return name, self._data.users[name]

    async def create(self, actor: Principal, name: UserName) -> None:
        """Raises Forbidden, Conflict when the user is there."""
        async with self._audit.action(actor, "user.create", name) as act:
            actor.require("admin")
            if name in self._data.users:
                raise Conflict(f"there is a user {name!r} already")
            await self._data.change(act.recorded(lambda conn: add_user(conn, name)))

    async def remove(self, actor: Principal, name: str) -> None:
        """Remove a user with its tokens, client keys and authorizations. Raises Conflict while it owns nodes or
        channels."""
        async with self._audit.action(actor, "user.remove", name) as act:
            self.get(actor, name)
            owned = [f"channel {c.name}" for c in self._data.channels.values() if c.owner == name]
            owned += [f"node {n.node_id}" for n in self._data.nodes.values() if n.owner == name]
            if owned:
                raise Conflict(f"{name} still owns {', '.join(owned[:5])}", hint="Give them another owner first")

            def remove(conn: Connection) -> None:
                conn.execute(delete(tokens).where(tokens.c.user == name))
                keys = select(clients.c.client_id).where(clients.c.user == name)
                conn.execute(
                    delete(authorizations).where(
                        authorizations.c.subject_kind == "client", authorizations.c.subject.in_(keys)
                    )
                )
                conn.execute(delete(clients).where(clients.c.user == name))
                conn.execute(delete(enrolment_codes).where(enrolment_codes.c.user == name))
                conn.execute(
                    delete(authorizations).where(
                        authorizations.c.subject_kind == "user", authorizations.c.subject == name
                    )
                )
                conn.execute(
                    delete(task_grants).where(task_grants.c.subject_kind == "user", task_grants.c.subject == name)
                )
                conn.execute(delete(users).where(users.c.name == name))

            await self._data.change(act.recorded(remove))
