"""Who connects: the token of the address, and what it allows at most."""

from __future__ import annotations

import time
from dataclasses import dataclass

from starlette.websockets import WebSocket

from kachery_lab.core.bands import BANDS, Right, band_name
from kachery_lab.core.ids import NodeId
from kachery_lab.core.tickets import BandToken
from kachery_lab.errors import Forbidden, KacheryLabError
from kachery_lab.http.protocols.ably2021.errors import NO_TOKEN, TOKEN_EXPIRED, ConnectionRefused, token_error
from kachery_lab.node import Node

REMIND_SECONDS = 30.0
"""How long before its token expires a client is asked for a new one; half of the rest for one that lives shorter."""


@dataclass(frozen=True, slots=True)
class Pass:
    """An open token. `ends` by the monotonic clock: a clock that is set meanwhile changes nothing."""

    token: BandToken
    ends: float

    @property
    def node_id(self) -> NodeId:
        """Whom it is for."""
        return NodeId(self.token.node)

    @property
    def left(self) -> float:
        """Seconds until it expires."""
        return self.ends - time.monotonic()

    def band(self, name: object) -> str | None:
        """The band of a name on the wire, None when it is none of this channel's."""
        found = [band for band in BANDS if name == band_name(self.token.channel, band)]
        return found[0] if found else None

    def allows(self, band: str, right: Right) -> bool:
        """Whether the token gives a right. The node's roles may give less by now."""
        return right in self.token.capability.get(band_name(self.token.channel, band), ())

    def for_same(self, other: Pass) -> bool:
        """Whether another token is for the same node and channel."""
        return (self.token.node, self.token.channel) == (other.token.node, other.token.channel)


def open_pass(node: Node, text: object) -> Pass:
    """The token of a client, in force now. Raises ConnectionRefused."""
    if not isinstance(text, str) or not text:
        raise ConnectionRefused(NO_TOKEN)
    try:
        if not node.settings.legacy_nodes:
            raise Forbidden("nodes of 2021 may not use this hub", hint="KACHERY_LAB_LEGACY_NODES=true allows it")
        token = node.band_tokens.open(text)
    except KacheryLabError as error:
        raise ConnectionRefused(token_error(error)) from None
    left = token.expires / 1000 - time.time()
    if left <= 0:
        raise ConnectionRefused(TOKEN_EXPIRED)
    return Pass(token, time.monotonic() + left)


def pass_of(websocket: WebSocket, node: Node) -> Pass:
    """The token in the address. Raises ConnectionRefused."""
    return open_pass(node, websocket.query_params.get("access_token"))
