"""Band tokens: what a node of 2021 shows to be connected to the bands of a channel (spec/hub-api.md section 4).

A token says who and, at most, what. What the node may do is decided from its roles of the moment of each use.
"""

from __future__ import annotations

import secrets
import time

from kachery_lab.core.bands import capability
from kachery_lab.core.strict_json import shorten
from kachery_lab.core.tickets import BandToken, Signer
from kachery_lab.errors import Forbidden, InvalidInput
from kachery_lab.services.certificates import Bearer
from kachery_lab.services.subjects import RoleService

TOKEN_MS = 3_600_000
"""How long a token is good for; the provider's library asks for a new one when it is told that it expires."""


class BandTokenService:
    """Issues band tokens to those who show a certificate, and opens them."""

    def __init__(self, signer: Signer, roles: RoleService) -> None:
        self._signer = signer
        self._roles = roles
        self.lifetime_ms = TOKEN_MS

    def issue(self, bearer: Bearer, wanted: object) -> tuple[str, BandToken]:
        """A token for the rights that a request names, and its text. Raises InvalidInput for another shape, Forbidden
        for more than the certificate allows and for a node without any role now."""
        channel, subject = bearer.channel.name, bearer.subject
        asked = _within(wanted, capability(channel, subject.ceiling))
        if not self._roles.roles(subject, channel):
            raise Forbidden(
                f"{subject.kind} {subject.name} has no role in the channel {channel} any more",
                hint="The channel's owner grants roles; the node must also ask for them",
            )
        now = int(time.time() * 1000)
        token = BandToken(subject.name, channel, asked, now, now + self.lifetime_ms, secrets.token_hex(8))
        return self._signer.band_token(token), token

    def open(self, text: str) -> BandToken:
        """The token of a text; whether it has expired is for the caller to look at. Raises Forbidden for any other."""
        token = self._signer.open_band_token(text)
        token.check(time.time() * 1000)
        return token


def _within(wanted: object, allowed: dict[str, list[str]]) -> dict[str, list[str]]:
    """The rights that a request names, by band name. Raises InvalidInput, and Forbidden for more than is allowed."""
    found: dict[str, list[str]] = {}
    if not isinstance(wanted, dict):
        raise InvalidInput(f"capability: expected an object, got {shorten(wanted)}")
    for band, rights in wanted.items():
        if not isinstance(rights, list) or not all(right in ("publish", "subscribe") for right in rights):
            raise InvalidInput(f"capability[{shorten(band)}]: expected a list of publish and subscribe")
        if band not in allowed or not set(rights) <= set(allowed[band]):
            raise Forbidden(f"capability[{shorten(band)}]: more than the certificate allows")
        found[band] = sorted(set(rights))
    return found
