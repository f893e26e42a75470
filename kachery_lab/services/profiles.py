"""What users say about themselves, and the one API key that kachery 2 gives each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import UserName
from kachery_lab.db.engine import Database
from kachery_lab.db.models import user_profiles
from kachery_lab.errors import InvalidInput, NotFound
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import AuditService
from kachery_lab.services.principals import Principal
from kachery_lab.services.tokens import TokenService

MAX_NAME, MAX_EMAIL, MAX_RESEARCH = 200, 200, 2000


@dataclass(frozen=True, slots=True)
class Profile:
    """A user as kachery 2 shows them."""

    user: str
    name: str
    email: str
    research_description: str
    has_api_key: bool


class ProfileService:
    """A user may see and change their own; an admin, everybody's."""

    def __init__(self, database: Database, data: AccessData, audit: AuditService, tokens: TokenService) -> None:
        self._database = database
        self._data = data
        self._audit = audit
        self._tokens = tokens

    def _require(self, actor: Principal, user: str) -> None:
        if not (actor.kind == "user" and actor.name == user):
            actor.require("admin")
        if user not in self._data.users:
            raise NotFound(f"there is no user {user!r}")

    async def get(self, actor: Principal, user: str) -> Profile:
        """Raises Forbidden, NotFound."""
        self._require(actor, user)
        return (await self._read([user]))[0]

    async def list(self, actor: Principal) -> Sequence[Profile]:
        """Everybody, by name. Raises Forbidden."""
        actor.require("admin")
        return await self._read(sorted(self._data.users))

    async def _read(self, users: Sequence[str]) -> Sequence[Profile]:
        statement = select(user_profiles)
        if len(users) == 1:
            statement = statement.where(user_profiles.c.user == users[0])
        rows = await self._database.read(lambda conn: {row.user: row for row in conn.execute(statement)})
        found = []
        for user in users:
            row = rows.get(user)
            name, email, research = ("", "", "") if row is None else (row.name, row.email, row.research_description)
            found.append(Profile(user, name, email, research, self._tokens.api_key(user) is not None))
        return found

    async def change(
        self,
        actor: Principal,
        user: UserName,
        *,
        name: str | None = None,
        email: str | None = None,
        research_description: str | None = None,
    ) -> None:
        """None: as it was. Raises Forbidden, NotFound, InvalidInput."""
        async with self._audit.action(actor, "user.update", user):
            actor.require("write", "channel-owner", "admin")
            self._require(actor, user)
            given = {"name": name, "email": email, "research_description": research_description}
            for (field, value), most in zip(given.items(), (MAX_NAME, MAX_EMAIL, MAX_RESEARCH), strict=True):
                if value is not None and len(value) > most:
                    raise InvalidInput(f"{field}: expected at most {most} characters")
            row = {field: value for field, value in given.items() if value is not None}
            statement = insert(user_profiles).values(user=user, **dict.fromkeys(given, ""))
            statement = statement.on_conflict_do_nothing()

            def change(conn: Connection) -> None:
                conn.execute(statement)
                if row:
                    conn.execute(user_profiles.update().where(user_profiles.c.user == user).values(row))

            await self._data.change(change)

    async def reset_api_key(self, actor: Principal, user: UserName) -> str:
        """A new API key; the one before it ends. It may do no more than the token that asks for it, an admin's aside.
        Raises Forbidden, NotFound."""
        self._require(actor, user)
        return await self._tokens.reset_api_key(actor, user)
