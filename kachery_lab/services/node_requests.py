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
    """Verifies signatures and remembers nonces. One is forgotten some time after its use, by a clock that nobody sets;
    from then on nothing of that node is accepted that is not younger, so that no repeat is, whatever the clock says."""

    def __init__(self, data: AccessData, hub_id: NodeId) -> None:
        self._data = data
        self._hub_id = hub_id
        self._nonces: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        self._forgotten: dict[str, int] = {}
        # Nonces die with the process; so do the requests that it may have seen before.
        self._started = time.monotonic()

    def verify(self, header: str | None, method: str, target: str, body: bytes) -> Subject:
        """The node that signed, as a subject. Raises Unauthenticated (also names the server's time), Forbidden for a
        node that is not approved here, Conflict for a repeated request."""
        match = _FORM.fullmatch(header or "")
        if match is None:
            raise Unauthenticated("this needs a request signed by a node", hint="Header Kachery-Node: v1 ...")
        node_id, timestamp, nonce, signature = match.groups()
        now = time.time()
        # In the time of day as it is now: a clock that was set right must not shut every node out.
        started = now - (time.monotonic() - self._started)
        oldest = max(int(started), self._forgotten.get(node_id, -1) + 1)
        if abs(now - int(timestamp)) > WINDOW_SECONDS or int(timestamp) < oldest:
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
        self._use(node_id, nonce, int(timestamp))
        return Subject("node", node_id)

    def _use(self, node_id: str, nonce: str, timestamp: int) -> None:
        now = time.monotonic()
        while self._nonces and next(iter(self._nonces.values()))[0] < now - 2 * WINDOW_SECONDS:
            (known, _), (_, before) = self._nonces.popitem(last=False)
            # What an unknown node repeats has no effect; of others there are as many as are registered.
            if known in self._data.nodes:
                self._forgotten[known] = max(before, self._forgotten.get(known, -1))
        if (node_id, nonce) in self._nonces:
            raise Conflict("this request was sent before", hint="Sign each request anew")
        if len(self._nonces) >= MAX_NONCES:
            raise Conflict("too many signed requests at the moment", hint="Try again in a minute")
        self._nonces[node_id, nonce] = (now, timestamp)

    def require_approved(self, node: Subject) -> None:
        """Raises Forbidden when the node is unknown here or waits for approval."""
        known = self._data.nodes.get(node.name)
        if known is None or known.approved_at is None:
            raise Forbidden(
                f"the node {node.name} is not approved at this hub", hint="An admin runs: kachery-lab node approve"
            )
