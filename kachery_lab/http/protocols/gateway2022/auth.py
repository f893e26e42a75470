"""Who asks: the envelope of a request, its time and its signature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from kachery_lab.core.ids import ChannelName, parse_fields, parse_whole_number
from kachery_lab.core.keys import PublicKey
from kachery_lab.errors import InvalidInput, Unauthenticated
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.protocols.gateway2022.errors import note
from kachery_lab.services.subjects import Subject

_NONE: frozenset[str] = frozenset()
_ENVELOPE = (frozenset({"payload"}), frozenset({"fromClientId", "signature", "githubUserId", "githubAccessToken"}))
_FILE = frozenset({"type", "timestamp", "hashAlg", "hash"})
_ZONE = frozenset({"zone"})
PAYLOADS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "findFile": (_FILE, _ZONE),
    "initiateFileUpload": (_FILE | {"size"}, _ZONE),
    "finalizeFileUpload": (_FILE | {"size", "objectKey"}, _ZONE),
    "deleteFile": (_FILE, _ZONE),
    "getClientInfo": (frozenset({"type", "timestamp", "clientId"}), _ZONE),
    "getResourceInfo": (frozenset({"type", "timestamp", "resourceName"}), _ZONE),
    "getZoneInfo": (frozenset({"type", "timestamp", "zoneName"}), _ZONE),
}
DEFAULT_ZONE = ChannelName("default")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request whose form, time and signature are good. `subject`: the registered client key that signed, None for
    others; `client_id`, `signature`: of whoever signed. `zone_given`: whether the request names it."""

    kind: str
    payload: dict[str, Any]
    zone: ChannelName
    zone_given: bool
    timestamp: int
    client_id: str | None
    signature: str | None
    subject: Subject | None

    def require_client(self) -> tuple[Subject, str, str]:
        """(Subject, client id, signature) of a registered client. Raises Unauthenticated."""
        if self.subject is None or self.client_id is None or self.signature is None:
            raise unregistered(self.client_id)
        return self.subject, self.client_id, self.signature


def unregistered(client_id: str | None) -> Unauthenticated:
    """The refusal of a request that no registered client signed."""
    if client_id is None:
        return Unauthenticated(
            "this needs a request signed by a registered client",
            hint="Run `kachery-cloud-init` with the same variables",
        )
    return Unauthenticated(
        f"the client {client_id} is not registered here, or waits for approval",
        hint=f"Run `kachery-cloud-init`, or let an admin run `kachery-lab client add {client_id} --user NAME`",
    )


def open_envelope(request: Request, value: object) -> Asked:
    """Raises InvalidInput for another form, Unauthenticated (time, signature), TooManyRequests."""
    node = node_of(request)
    envelope = parse_fields(value, "the request", *_ENVELOPE)
    payload = envelope["payload"]
    kind = payload.get("type") if isinstance(payload, dict) else None
    if not isinstance(kind, str) or kind not in PAYLOADS:
        raise InvalidInput(f"payload.type: expected one of {', '.join(PAYLOADS)}")
    fields: dict[str, Any] = parse_fields(payload, "payload", *PAYLOADS[kind])
    zone = ChannelName.parse(fields["zone"], "zone") if "zone" in fields else DEFAULT_ZONE
    timestamp = parse_whole_number(fields["timestamp"], "timestamp")
    client_id = envelope.get("fromClientId")
    if client_id is not None or "fromClientId" in envelope:
        client_id = PublicKey.parse(client_id, "fromClientId").hex
    if "githubUserId" in envelope or "githubAccessToken" in envelope:
        raise Unauthenticated("GitHub accounts are not known here", hint="Sign with a registered client key instead")
    note(request, client=client_id, zone=zone)
    node.client_requests.check_time(timestamp)
    signature = subject = None
    if client_id is not None:
        if "signature" not in envelope:
            raise Unauthenticated("fromClientId comes without a signature")
        signature = node.client_requests.check_signature(fields, client_id, envelope["signature"])
        known = node.clients.known(client_id)
        subject = Subject("client", client_id) if known is not None and known.user is not None else None
    # After the signature: nobody uses up the share of another's key.
    node.client_requests.check_rate(f"address {peer_of(request)}" if subject is None else str(subject))
    return Asked(kind, fields, zone, "zone" in fields, timestamp, client_id, signature, subject)
