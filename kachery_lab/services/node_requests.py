"""Requests that another node signed, on our own API: each is good once, for five minutes, for this hub only."""

from __future__ import annotations

import hashlib
import re
import time
from collections import OrderedDict

from kachery_lab.core.ids import NodeId
from kachery_lab.core.keys import PublicKey
from kachery_lab.core.signables import request_bytes
from kachery_lab.errors import Conflict, Forbidden, InvalidInput, Unauthenticated
from kachery_lab.services.access_data import AccessData
from kachery_lab.services.subjects import Subject

HEADER = "kachery-node"
WINDOW_SECONDS = 300
MAX_NONCES = 200_000
_FORM = re.compile(r"v1 ([0-9a-f]{64}) (\d{1,12}) ([0-9a-f]{16,64}) ([0-9a-f]{128})", re.ASCII)


class NodeRequests:
    """Verifies signatures and remembers nonces until they are out of date."""

    def __init__(self, data: AccessData, hub_id: NodeId) -> None:
        self._data = data
        self._hub_id = hub_id
        self._nonces: OrderedDict[str, float] = OrderedDict()
        # Nonces die with the process; so do the requests that it may have seen before.
        self._started = time.time()

    def verify(self, header: str | None, method: str, target: str, body: bytes) -> Subject:
        """The node that signed, as a subject. Raises Unauthenticated (also names the server's time), Forbidden for a
        node that is not approved here, Conflict for a repeated request."""
        match = _FORM.fullmatch(header or "")
        if match is None:
            raise Unauthenticated("this needs a request signed by a node", hint="Header Kachery-Node: v1 ...")
        node_id, timestamp, nonce, signature = match.groups()
        now = time.time()
        if abs(now - int(timestamp)) > WINDOW_SECONDS or int(timestamp) < int(self._started):
            raise Unauthenticated(
                f"the request is of {timestamp}, the server's time is {int(now)}", hint="Set the clock, then try again"
            )
        data = request_bytes(
            method, target, hashlib.sha256(body).hexdigest(), int(timestamp), nonce, node_id, self._hub_id
        )
        try:
            key = PublicKey.parse(node_id, "nodeId")
        except InvalidInput as error:
            raise Unauthenticated(error.message) from None
        if not key.verify(bytes.fromhex(signature), data):
            raise Unauthenticated("the signature is not this node's, or not of this request")
        self._use(f"{node_id}:{nonce}", now)
        return Subject("node", node_id)

    def _use(self, nonce: str, now: float) -> None:
        while self._nonces and next(iter(self._nonces.values())) < now - 2 * WINDOW_SECONDS:
            self._nonces.popitem(last=False)
        if nonce in self._nonces:
            raise Conflict("this request was sent before", hint="Sign each request anew")
        if len(self._nonces) >= MAX_NONCES:
            raise Conflict("too many signed requests at the moment", hint="Try again in a minute")
        self._nonces[nonce] = now

    def require_approved(self, node: Subject) -> None:
        """Raises Forbidden when the node is unknown here or waits for approval."""
        known = self._data.nodes.get(node.name)
        if known is None or known.approved_at is None:
            raise Forbidden(
                f"the node {node.name} is not approved at this hub", hint="An admin runs: kachery-lab node approve"
            )
