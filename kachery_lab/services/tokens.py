"""Access tokens: made, listed and revoked here; only their hashes are kept."""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, Row, select, update
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import ChannelName, UserName
from kachery_lab.core.strict_json import MAX_SAFE_INTEGER
from kachery_lab.db.engine import Database
from kachery_lab.db.models import tokens, users
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, NotFound
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.audit import Act, AuditService
from kachery_lab.services.principals import SCOPES, Principal

PREFIX = "klk_"
ADMIN = UserName("admin")
MAX_CHANNELS = 100
API_KEY = "API key of kachery 2"
"""The label of the token that `resetUserApiKey` makes."""
_UNCUT = ("client", "admin", "metrics")
"""Scopes that reach beyond channels, so that narrowing a token to channels would not narrow them."""


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


def parse_channels(names: object) -> frozenset[str] | None:
    """The channels that a token is narrowed to, from a list of names; None: all. Raises InvalidInput."""
    if names is None:
        return None
    if not isinstance(names, list) or not 1 <= len(names) <= MAX_CHANNELS:
        raise InvalidInput(f"channels: expected a list of 1 to {MAX_CHANNELS} names")
    return frozenset(ChannelName.parse(name, "channels") for name in names)


def parse_scopes(scopes: object) -> tuple[str, ...]:
    """Known scopes, each once, in the order of SCOPES. Raises InvalidInput."""
    wanted = scopes if isinstance(scopes, list | tuple) else ()
    if not wanted or any(scope not in SCOPES for scope in wanted):
        raise InvalidInput(f"scopes: expected some of {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in wanted)


class TokenService:
    """Tokens are made, seen and ended by admins only. The table is small and read on every request with a token, so all
    of it is held in memory."""

    def __init__(self, database: Database, data: AccessData, audit: AuditService) -> None:
        self._database = database
        self._data = data
        self._audit = audit
        data.listeners.append(self._forget_removed_users)
        self._by_hash: dict[str, Token] = {}
        self._hash_of: dict[str, str] = {}

    def load(self) -> None:
        """Blocking: read the table, once, at start."""
        rows = self._database.read_sync(lambda conn: conn.execute(select(tokens)).all())
        self._keep({row.token_hash: _token(row) for row in rows})

    def _keep(self, by_hash: dict[str, Token]) -> None:
        self._by_hash = by_hash
        self._hash_of = {token.id: key for key, token in by_hash.items()}

    def in_force(self, token_id: str) -> bool:
        """Whether a token, by its id, opens anything now: what was made with it ends with it."""
        token = self._by_hash.get(self._hash_of.get(token_id, ""))
        return token is not None and token.in_force(_now())

    def find(self, secret: str) -> Token | None:
        """The token in force with this secret. The look-up is by hash, so its time tells nothing of the secret."""
        token = self._by_hash.get(hash_secret(secret))
        return token if token is not None and token.in_force(_now()) else None

    async def create(
        self,
        actor: Principal,
        user: UserName,
        scopes: object,
        label: str = "",
        expires_at: int | None = None,
        channels: object = None,
    ) -> tuple[Token, str]:
        """A new token and its secret, which is shown this once. The user is made when absent. `channels`: a list of the
        only ones that it reaches, for scopes that are about channels. Raises Forbidden, InvalidInput."""
        secret = new_secret()
        async with self._audit.action(actor, "token.create", user) as act:
            actor.require("admin")
            known, narrowed = parse_scopes(scopes), parse_channels(channels)
            if narrowed is not None and (wide := [scope for scope in known if scope in _UNCUT]):
                raise InvalidInput(f"a token with the scope {wide[0]} cannot be narrowed to channels")
            if expires_at is not None and not _now() < expires_at <= MAX_SAFE_INTEGER:
                raise InvalidInput("expiresAt: expected a time in the future, in ms since 1970")
            token = await self._add(user, known, label, expires_at, secret, narrowed, act)
        return token, secret

    def _forget_removed_users(self) -> None:
        self._keep({key: token for key, token in self._by_hash.items() if token.user in self._data.users})

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
        act: Act | None = None,
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

        if act is not None:
            act(f"{token.id}: {' '.join(scopes)}")
        await self._data.change(add if act is None else act.recorded(add))
        self._by_hash[row["token_hash"]] = token
        self._hash_of[token.id] = row["token_hash"]
        return token

    def list(self, actor: Principal) -> list[Token]:
        """All tokens, the oldest first, revoked and expired ones included. Raises Forbidden."""
        actor.require("admin")
        return sorted(self._by_hash.values(), key=lambda token: (token.created_at, token.id))

    def get(self, actor: Principal, token_id: str) -> Token:
        """Raises Forbidden, NotFound."""
        return self._find(actor, token_id)[1]

    async def revoke(self, actor: Principal, token_id: str) -> Token:
        """End a token now. Raises Forbidden, NotFound, Conflict when it was revoked before."""
        async with self._audit.action(actor, "token.revoke", token_id) as act:
            key, token = self._find(actor, token_id)
            act(f"of {token.user}")
            if token.revoked_at is not None:
                raise Conflict(f"the token {token_id} was revoked before")
            now = _now()
            statement = update(tokens).where(tokens.c.id == token_id, tokens.c.revoked_at.is_(None))

            def end(conn: Connection) -> None:
                if not conn.execute(statement.values(revoked_at=now)).rowcount:
                    raise Conflict(f"the token {token_id} was revoked meanwhile")

            await self._data.change(act.recorded(end))
            self._by_hash[key] = replace(token, revoked_at=now)
            return self._by_hash[key]

    # -- the API key of kachery 2 --------------------------------------------------------------------------------

    def api_key(self, user: str) -> Token | None:
        """The API key of a user that is in force."""
        mine = (token for token in self._by_hash.values() if token.user == user and token.label == API_KEY)
        return next((token for token in mine if token.in_force(_now())), None)

    async def reset_api_key(self, actor: Principal, user: UserName) -> str:
        """A new API key of a user, shown this once; the one before it ends. It may do what the caller's token may do of
        `read` and `write`, in the same channels and as long; an admin's may do both everywhere. Raises Forbidden."""
        secret = new_secret()
        async with self._audit.action(actor, "token.create", user) as note:
            scopes = tuple(scope for scope in ("read", "write") if actor.may("admin") or actor.may(scope))
            if not scopes:
                raise Forbidden("this token may neither read nor write, so no API key can be made with it")
            admin = actor.may("admin")
            old = [key for key, one in self._by_hash.items() if one.user == user and one.label == API_KEY]
            expires = None if admin else actor.expires_at
            token = await self._add(user, scopes, API_KEY, expires, secret, None if admin else actor.channels)
            now = _now()
            ended = update(tokens).where(tokens.c.token_hash.in_(old), tokens.c.revoked_at.is_(None))
            await self._data.change(lambda conn: conn.execute(ended.values(revoked_at=now)).rowcount)
            for key in old:
                if self._by_hash[key].revoked_at is None:
                    self._by_hash[key] = replace(self._by_hash[key], revoked_at=now)
            note(f"{token.id}: {' '.join(scopes)}, API key")
        return secret

    def _find(self, actor: Principal, token_id: str) -> tuple[str, Token]:
        actor.require("admin")
        key = self._hash_of.get(token_id)
        if key is None:
            raise NotFound(f"there is no token {token_id!r}", hint="`kachery-lab token list` shows the ids")
        return key, self._by_hash[key]


def principal(token: Token, peer: str | None) -> Principal:
    """The caller that a token makes."""
    return Principal("user", token.user, frozenset(token.scopes), peer, token.channels, token.id, token.expires_at)


def _token(row: Row[Any]) -> Token:
    channels = None if row.channels is None else frozenset(row.channels.split())
    scopes = tuple(row.scopes.split())
    times = (row.created_at, row.expires_at, row.revoked_at)
    return Token(row.id, row.user, row.label, scopes, *times, channels)


def _now() -> int:
    return int(time.time() * 1000)
