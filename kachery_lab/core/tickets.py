"""Signed, expiring permissions in URLs.

A ticket names one request exactly: method, object path, size, who asked, until when. A capability names a reader: who,
which channel, which epoch of the channel; what it opens is decided anew on each request. Both carry what the credential
that asked left of its subject's roles, and that credential if it can end by itself. A band token names a node on the
bands of one channel, for the protocol of 2021. Each is one URL segment: base64url of compact JSON, a dot, base64url of
HMAC-SHA256 over the kind and that JSON.
"""

from __future__ import annotations

import base64
import hmac
import json
from dataclasses import dataclass
from typing import Any, Literal

from kachery_lab.core.roles import Role
from kachery_lab.errors import Forbidden

SKEW_SECONDS = 60
PUT_SECONDS = 3600
GET_SECONDS = 3600
MAX_GET_SECONDS = 7 * 24 * 3600
VERSION = 1
_COMPACT = json.JSONEncoder(separators=(",", ":"), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission for one request. `expires` and `issued` in seconds since 1970, `size` in bytes or None: any size.

    `principal` is the subject on whose behalf it was issued, as `kind:name`; its rights are checked again at use, and
    give no more than `ceiling`, and nothing when the token with the id `token` is no longer in force (None: no token).
    `announced`: room for the upload is held, and it counts only once it is finished by a further request.
    `on_demand`: the object is put there because somebody asked for it, which is no upload.
    """

    method: Literal["GET", "PUT"]
    channel: str
    path: str
    principal: str
    issued: int
    expires: int
    nonce: str
    size: int | None = None
    on_demand: bool = False
    lease: str | None = None
    ceiling: int = int(Role.ALL)
    token: str | None = None
    v: int = VERSION
    announced: bool = False

    def check(self, method: str, now: float) -> None:
        """Raises Forbidden unless this ticket allows the method now. A GET ticket also allows HEAD."""
        if method != self.method and not (method == "HEAD" and self.method == "GET"):
            raise Forbidden(f"this URL is for {self.method}, not {method}")
        longest = PUT_SECONDS if self.method == "PUT" else MAX_GET_SECONDS
        if self.v != VERSION or self.expires - self.issued > longest or self.issued > now + SKEW_SECONDS:
            raise Forbidden("this URL was not issued for the present time")
        if now >= self.expires + SKEW_SECONDS:
            raise Forbidden("this URL has expired", hint="Ask for a new one")


@dataclass(frozen=True, slots=True)
class Capability:
    """Names a reader of one channel's bucket; `ceiling` and `token` as in a ticket. Raising the channel's epoch ends
    every older one."""

    principal: str
    channel: str
    epoch: int
    ceiling: int = int(Role.ALL)
    token: str | None = None
    v: int = VERSION


@dataclass(frozen=True, slots=True)
class BandToken:
    """Lets a node connect to the bands of one channel until `expires`. `capability` is the most that it may do there,
    by band name; its roles are checked again at each use. Times in ms since 1970."""

    node: str
    channel: str
    capability: dict[str, list[str]]
    issued: int
    expires: int
    nonce: str
    v: int = VERSION

    def check(self, now: float) -> None:
        """Raises Forbidden unless the token was issued for the present time; whether it has expired is not looked at.
        `now` in ms since 1970."""
        if self.v != VERSION or self.issued > now + SKEW_SECONDS * 1000:
            raise Forbidden("this token was not issued for the present time", hint="Ask for a new one")


class Signer:
    """Makes and opens tickets, capabilities and band tokens with one secret key of 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def ticket(self, ticket: Ticket) -> str:
        """The URL segment of a ticket."""
        return self._seal("ticket", ticket)

    def capability(self, capability: Capability) -> str:
        """The URL segment of a capability."""
        return self._seal("capability", capability)

    def band_token(self, token: BandToken) -> str:
        """The text of a band token."""
        return self._seal("band token", token)

    def open_ticket(self, text: str) -> Ticket:
        """The ticket in a URL segment; its time is not checked yet. Raises Forbidden."""
        fields = self._open("ticket", text)
        try:
            return Ticket(**fields)
        except TypeError:
            raise _unknown("ticket") from None

    def open_capability(self, text: str) -> Capability:
        """The capability in a URL segment. Raises Forbidden."""
        fields = self._open("capability", text)
        try:
            return Capability(**fields)
        except TypeError:
            raise _unknown("capability") from None

    def open_band_token(self, text: str) -> BandToken:
        """The band token in a text; its time is not checked yet. Raises Forbidden."""
        fields = self._open("band token", text)
        try:
            return BandToken(**fields)
        except TypeError:
            raise _unknown("band token") from None

    def _seal(self, kind: str, permission: Ticket | Capability | BandToken) -> str:
        data = _COMPACT.encode({name: getattr(permission, name) for name in permission.__slots__}).encode()
        return f"{_encode(data)}.{_encode(self._mac(kind, data))}"

    def _open(self, kind: str, text: str) -> dict[str, Any]:
        body, dot, mac = text.partition(".")
        try:
            data, given = _decode(body), _decode(mac)
        except ValueError:
            raise _unknown(kind) from None
        if not dot or not hmac.compare_digest(given, self._mac(kind, data)):
            raise _unknown(kind)
        # These bytes are our own: nobody else can make the code that was just compared.
        found: dict[str, Any] = json.loads(data)
        return found

    def _mac(self, kind: str, data: bytes) -> bytes:
        return hmac.digest(self._key, f"kachery-lab/{kind}/{VERSION}\n".encode() + data, "sha256")


def _unknown(kind: str) -> Forbidden:
    return Forbidden(f"this {kind} was not issued by this server", hint="Ask for a new one")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decode(text: str) -> bytes:
    """Raises ValueError for everything but the one text that `_encode` gives."""
    data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    if _encode(data) != text:
        raise ValueError("not canonical base64url")
    return data
