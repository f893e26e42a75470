"""Client keys: how the newer clients prove who asks. A key belongs to one user.

Three ways to register one: an admin adds it; its holder opens the signed link that the client prints, and an admin
approves; or the holder shows an enrolment code there, which an admin made for a user.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from sqlalchemy import Connection, delete, update
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.core.ids import UserName
from kachery_lab.core.keys import PublicKey
from kachery_lab.core.signatures import verify_2021
from kachery_lab.db.models import authorizations, clients, enrolment_codes
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from kachery_lab.services.access import WrongCounter
from kachery_lab.services.access_data import AccessData, ClientRecord, EnrolmentCode
from kachery_lab.services.audit import AuditService
from kachery_lab.services.principals import Principal
from kachery_lab.services.tokens import hash_secret
from kachery_lab.services.users import add_user

MAX_LABEL = 100
MAX_WAITING = 1000
"""Keys that may wait for approval."""
MAX_WAITING_OF_PEER = 20
"""Of these, from one address."""
WAITING_MS = 14 * 24 * 3600 * 1000
"""A key that nobody approved for so long is forgotten when others ask."""
DEFAULT_CODE_MS = 24 * 3600 * 1000
MAX_CODE_MS = 90 * 24 * 3600 * 1000
MAX_USES = 1000
_ADD_CLIENT = '{"type":"addClient"}'


class ClientService:
    """Registered client keys and enrolment codes. Only admins see and change them; holders of keys may ask."""

    def __init__(self, data: AccessData, audit: AuditService) -> None:
        self._data = data
        self._audit = audit
        self._wrong = WrongCounter()

    # -- what admins do ------------------------------------------------------------------------------------------

    def list(self, actor: Principal) -> list[ClientRecord]:
        """All keys, the oldest first. Raises Forbidden."""
        actor.require("admin")
        return sorted(self._data.clients.values(), key=lambda client: (client.created_at, client.client_id))

    def get(self, actor: Principal, client_id: str) -> ClientRecord:
        """Raises Forbidden, NotFound."""
        actor.require("admin")
        found = self._data.clients.get(client_id)
        if found is None:
            raise NotFound(f"there is no client {client_id!r}", hint="`kachery-lab client list` shows the ids")
        return found

    async def add(self, actor: Principal, client_id: str, user: UserName, label: str) -> ClientRecord:
        """Register a key, or let a waiting one in; the user is made when absent. Raises Forbidden, InvalidInput,
        Conflict when it is registered."""
        async with self._audit.action(actor, "client.add", client_id, f"user {user}"):
            actor.require("admin")
            PublicKey.parse(client_id, "clientId")
            known = self._data.clients.get(client_id)
            if known is not None and known.user is not None:
                raise Conflict(f"the client {client_id} is registered already, for {known.user}")
            await self._register(client_id, user, check_label(label))
            return self._data.clients[client_id]

    async def approve(self, actor: Principal, client_id: str, user: UserName | None = None) -> ClientRecord:
        """Let a waiting key in, for this user; None: for whom its holder said to be. Approving again for the same user
        changes nothing. Raises Forbidden, NotFound, InvalidInput, Conflict when it is another user's."""
        async with self._audit.action(actor, "client.approve", client_id) as note:
            known = self.get(actor, client_id)
            if known.user is not None:
                if user not in (None, known.user):
                    raise Conflict(f"the client {client_id} belongs to {known.user}", hint="Remove it first")
                return known
            owner = user or UserName.parse(known.asked_as, "user")
            note(f"user {owner}")
            await self._register(client_id, owner, known.label)
            return self._data.clients[client_id]

    async def relabel(self, actor: Principal, client_id: str, label: str) -> ClientRecord:
        """Give a key another label. Raises Forbidden, NotFound, InvalidInput."""
        async with self._audit.action(actor, "client.update", client_id):
            self.get(actor, client_id)
            statement = update(clients).where(clients.c.client_id == client_id).values(label=check_label(label))
            await self._data.change(lambda conn: conn.execute(statement).rowcount)
            return self.get(actor, client_id)

    async def remove(self, actor: Principal, client_id: str) -> None:
        """End a key, with the authorizations of its own. What it uploaded stays. Raises Forbidden, NotFound."""
        async with self._audit.action(actor, "client.remove", client_id):
            self.get(actor, client_id)
            grants = delete(authorizations).where(
                authorizations.c.subject_kind == "client", authorizations.c.subject == client_id
            )
            remove = delete(clients).where(clients.c.client_id == client_id)
            await self._data.change(lambda conn: (conn.execute(grants).rowcount, conn.execute(remove).rowcount)[1])

    # -- enrolment codes -----------------------------------------------------------------------------------------

    def codes(self, actor: Principal) -> Sequence[EnrolmentCode]:
        """Codes without their texts, used up and expired ones included. Raises Forbidden."""
        actor.require("admin")
        return sorted(self._data.enrolment_codes.values(), key=lambda code: (code.created_at, code.id))

    async def add_code(
        self, actor: Principal, user: UserName, label: str = "", uses: int = 1, expires_at: int | None = None
    ) -> tuple[EnrolmentCode, str]:
        """A code that registers `uses` keys of a user until `expires_at` (ms since 1970; default: a day from now), and
        its text, which is shown this once. The user is made when absent. Raises Forbidden, InvalidInput."""
        async with self._audit.action(actor, "client.code.add", user) as note:
            actor.require("admin")
            now = int(time.time() * 1000)
            until = now + DEFAULT_CODE_MS if expires_at is None else expires_at
            if not now < until <= now + MAX_CODE_MS:
                raise InvalidInput("expiresAt: expected a time within the next 90 days, in ms since 1970")
            if not 1 <= uses <= MAX_USES:
                raise InvalidInput(f"uses: expected a number from 1 to {MAX_USES}")
            code = EnrolmentCode(secrets.token_hex(4), user, check_label(label), now, until, uses)
            text = secrets.token_urlsafe(15)
            row = {"id": code.id, "digest": hash_secret(text), "user": user, "label": code.label}
            times = {"created_at": now, "expires_at": until, "uses_left": uses}

            def add(conn: Connection) -> None:
                add_user(conn, user)
                conn.execute(insert(enrolment_codes).values(**row, **times))

            await self._data.change(add)
            note(f"{code.id}: {uses} uses")
        return code, text

    async def remove_code(self, actor: Principal, code_id: str) -> None:
        """End a code; the keys that it registered stay. Raises Forbidden, NotFound."""
        async with self._audit.action(actor, "client.code.remove", code_id):
            if not any(code.id == code_id for code in self.codes(actor)):
                raise NotFound(f"there is no enrolment code {code_id!r}")
            statement = delete(enrolment_codes).where(enrolment_codes.c.id == code_id)
            await self._data.change(lambda conn: conn.execute(statement).rowcount)

    def as_owner(self, client_id: str, channel: str, peer: str | None) -> Principal:
        """The owner of a channel, who speaks by a client key of theirs, for this channel only.

        Raises Forbidden for other keys, and for one that has a (lesser) authorization of its own.
        """
        client, found = self._data.clients.get(client_id), self._data.channels.get(channel)
        own = (channel, "client", client_id) in self._data.authorizations
        if client is None or client.user is None or found is None or found.owner != client.user or own:
            raise Forbidden(
                f"client {client_id} does not speak for the owner of the zone {channel}",
                hint="Only the zone's owner deletes there",
            )
        return Principal("user", client.user, frozenset({"channel-owner"}), peer, frozenset({channel}))

    # -- what holders of keys do ---------------------------------------------------------------------------------

    def known(self, client_id: str) -> ClientRecord | None:
        """A key, waiting or registered, for anybody who knows its id."""
        return self._data.clients.get(client_id)

    def check_link(self, client_id: str, signature: object) -> None:
        """Raises Unauthenticated unless the key signed that it wants to be added. The signature names no time, so it
        can be shown again; all it ever does is to ask."""
        if not verify_2021(client_id, _ADD_CLIENT, signature):
            raise Unauthenticated(
                "this link was not signed by the client that it names", hint="Copy the whole link, or make a new one"
            )

    async def ask(self, client_id: str, signature: object, label: str, asked_as: str, peer: str | None) -> ClientRecord:
        """Note that a key wants to be registered, for an admin to approve. Asking again changes nothing.

        Raises Unauthenticated, InvalidInput, Forbidden when too many wait.
        """
        self.check_link(client_id, signature)
        if (known := self.known(client_id)) is not None:
            return known
        label = check_label(label)
        name = UserName.parse(asked_as, "user") if asked_as else ""
        now = int(time.time() * 1000)
        waiting = [one for one in self._data.clients.values() if one.user is None and one.created_at > now - WAITING_MS]
        if len(waiting) >= MAX_WAITING or sum(one.asked_from == peer for one in waiting) >= MAX_WAITING_OF_PEER:
            raise Forbidden("too many clients wait for approval", hint="An admin approves or removes some first")
        row = {"client_id": client_id, "label": label, "created_at": now, "asked_as": name, "asked_from": peer}
        old = delete(clients).where(clients.c.user.is_(None), clients.c.created_at <= now - WAITING_MS)
        statement = insert(clients).values(row).on_conflict_do_nothing()
        await self._data.change(lambda conn: (conn.execute(old).rowcount, conn.execute(statement).rowcount)[1])
        return self._data.clients[client_id]

    async def enrol(self, client_id: str, signature: object, label: str, code: str, peer: str | None) -> ClientRecord:
        """Register a key with an enrolment code. Showing it again for the same key uses up nothing.

        Raises Unauthenticated (signature, or code unknown, expired or used up), TooManyRequests, InvalidInput,
        Conflict when the key is another user's.
        """
        self.check_link(client_id, signature)
        label, digest, now = check_label(label), hash_secret(code), int(time.time() * 1000)
        found = self._data.enrolment_codes.get(digest)
        wrong = Unauthenticated("the enrolment code is unknown, expired or used up", hint="Ask an admin for a new one")
        if found is None or found.expires_at <= now:
            raise self._wrong.refuse(peer, wrong)
        known = self.known(client_id)
        if known is not None and known.user is not None:
            if known.user != found.user:
                raise Conflict("this client is registered for another user already")
            return known
        actor = Principal("user", found.user, peer=peer)
        async with self._audit.action(actor, "client.enrol", client_id, f"code {found.id}"):
            use = update(enrolment_codes).where(enrolment_codes.c.digest == digest, enrolment_codes.c.uses_left > 0)
            use = use.values(uses_left=enrolment_codes.c.uses_left - 1)

            def enrol(conn: Connection) -> bool:
                if not conn.execute(use).rowcount:
                    return False
                _put(conn, client_id, found.user, label, now)
                return True

            if not await self._data.change(enrol):
                raise self._wrong.refuse(peer, wrong)
        return self._data.clients[client_id]

    async def _register(self, client_id: str, user: UserName, label: str) -> None:
        now = int(time.time() * 1000)

        def register(conn: Connection) -> None:
            add_user(conn, user)
            _put(conn, client_id, user, label, now)

        await self._data.change(register)


def check_label(label: str) -> str:
    """Raises InvalidInput."""
    if len(label) > MAX_LABEL or not label.isprintable():
        raise InvalidInput(f"label: expected at most {MAX_LABEL} printable characters")
    return label


def _put(conn: Connection, client_id: str, user: str, label: str, now: int) -> None:
    row = {"user": user, "label": label, "approved_at": now}
    statement = insert(clients).values(client_id=client_id, created_at=now, asked_as="", asked_from=None, **row)
    conn.execute(statement.on_conflict_do_update(index_elements=[clients.c.client_id], set_=row))
