"""Access tokens: made, listed and revoked here; only their hashes are kept."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, select, update
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import UserName
from kachery_lab.db.engine import Database
from kachery_lab.db.models import tokens, users
from kachery_lab.errors import Conflict, InvalidInput, NotFound
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.principals import SCOPES, Principal

PREFIX = "klk_"
ADMIN = UserName("admin")


@dataclass(frozen=True, slots=True)
class Token:
    """What may be shown of a token. Times in ms since 1970."""

    id: str
    user: str
    label: str
    scopes: tuple[str, ...]
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    channels: frozenset[str] | None = None

    def in_force(self, now: int) -> bool:
        """Whether it opens anything at `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


def new_secret() -> str:
    """`klk_` and 160 random bits in lower-case base32."""
    return PREFIX + base64.b32encode(secrets.token_bytes(20)).decode().lower()


def hash_secret(secret: str) -> str:
    """What is kept of a token. Its 160 random bits need no slow hash."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def parse_scopes(scopes: Iterable[str]) -> tuple[str, ...]:
    """Known scopes, each once, in the order of SCOPES. Raises InvalidInput."""
    wanted = set(scopes)
    if not wanted or wanted - set(SCOPES):
        raise InvalidInput(f"scopes: expected some of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in wanted)


class TokenService:
    """The table is small and read on every request with a token, so all of it is held in memory."""

    def __init__(self, database: Database, data: AccessData) -> None:
        self._database = database
        self._data = data
        data.listeners.append(self._forget_removed_users)
        self._by_hash: dict[str, Token] = {}

    def load(self) -> None:
        """Blocking: read the table, once, at start."""
        rows = self._database.read_sync(lambda conn: conn.execute(select(tokens)).all())
        self._by_hash = {row.token_hash: _token(row) for row in rows}

    def find(self, secret: str) -> Token | None:
        """The token in force with this secret. The look-up is by hash, so its time tells nothing of the secret."""
        token = self._by_hash.get(hash_secret(secret))
        return token if token is not None and token.in_force(_now()) else None

    async def create(
        self,
        user: UserName,
        scopes: Iterable[str],
        label: str = "",
        expires_at: int | None = None,
        channels: Iterable[str] | None = None,
    ) -> tuple[Token, str]:
        """A new token and its secret, which is shown this once. The user is made when absent. `channels`: the only
        ones that it reaches."""
        secret = new_secret()
        narrowed = None if channels is None else frozenset(channels)
        return await self._add(user, parse_scopes(scopes), label, expires_at, secret, narrowed), secret

    def _forget_removed_users(self) -> None:
        self._by_hash = {key: token for key, token in self._by_hash.items() if token.user in self._data.users}

    async def ensure_admin(self, secret: str) -> None:
        """Make a given secret an admin token, unless it is one."""
        if hash_secret(secret) not in self._by_hash:
            await self._add(
                ADMIN,
                parse_scopes(["client", "read", "write", "channel-owner", "admin"]),
                "first admin token",
                None,
                secret,
            )

    async def _add(
        self,
        user: UserName,
        scopes: tuple[str, ...],
        label: str,
        expires_at: int | None,
        secret: str,
        channels: frozenset[str] | None = None,
    ) -> Token:
        if len(label) > 100 or not label.isprintable():
            raise InvalidInput("label: expected at most 100 printable characters")
        token = Token(secrets.token_hex(4), user, label, scopes, _now(), expires_at, None, channels)
        row: dict[str, Any] = {
            "id": token.id,
            "token_hash": hash_secret(secret),
            "user": user,
            "label": label,
            "scopes": " ".join(scopes),
            "created_at": token.created_at,
            "expires_at": expires_at,
            "channels": None if channels is None else " ".join(sorted(channels)),
        }

        def add(conn: Connection) -> None:
            conn.execute(insert(users).values(name=user, created_at=token.created_at).on_conflict_do_nothing())
            conn.execute(insert(tokens).values(row))

        await self._data.change(add)
        self._by_hash[row["token_hash"]] = token
        return token

    async def list(self) -> list[Token]:
        """All tokens, the oldest first, revoked and expired ones included."""
        return sorted(self._by_hash.values(), key=lambda token: (token.created_at, token.id))

    async def revoke(self, token_id: str) -> Token:
        """End a token now. Raises NotFound, Conflict when it was revoked before."""
        found = next(((key, token) for key, token in self._by_hash.items() if token.id == token_id), None)
        if found is None:
            raise NotFound(f"there is no token {token_id!r}", hint="`kachery-lab token list` shows the ids")
        key, token = found
        if token.revoked_at is not None:
            raise Conflict(f"the token {token_id} was revoked before")
        now = _now()
        statement = update(tokens).where(tokens.c.id == token_id).values(revoked_at=now)
        await self._data.change(lambda conn: conn.execute(statement).rowcount)
        self._by_hash[key] = replace(token, revoked_at=now)
        return self._by_hash[key]


def principal(token: Token, peer: str | None) -> Principal:
    """The caller that a token makes."""
    return Principal("user", token.user, frozenset(token.scopes), peer, token.channels)


def _token(row: Row[Any]) -> Token:
    channels = None if row.channels is None else frozenset(row.channels.split())
    scopes = tuple(row.scopes.split())
    times = (row.created_at, row.expires_at, row.revoked_at)
    return Token(row.id, row.user, row.label, scopes, *times, channels)


def _now() -> int:
    return int(time.time() * 1000)
