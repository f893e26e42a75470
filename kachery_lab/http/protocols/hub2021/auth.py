"""Who signed a node's request."""

from __future__ import annotations

from kachery_lab.core.ids import NodeId, parse_fields
from kachery_lab.core.signatures import parse_signature
from kachery_lab.errors import Forbidden, InvalidInput, NotFound
from kachery_lab.node import Node
from kachery_lab.services.certificates import signed_by

_ENVELOPE = frozenset({"body", "nodeId", "signature"})
_NONE: frozenset[str] = frozenset()
BODIES = {
    "getNodeConfig": frozenset({"type", "nodeId", "ownerId"}),
    "getChannelConfig": frozenset({"type", "channelName"}),
    "getBitwooderCertForChannel": frozenset({"type", "nodeId", "ownerId", "channelName"}),
    "report": frozenset({"type", "nodeId", "ownerId", "nodeLabel"}),
}
OLDER = (
    "getPubsubAuthForChannel",
    "createSignedFileUploadUrl",
    "createSignedSubfeedMessageUploadUrl",
    "createSignedTaskResultUploadUrl",
)


def open_envelope(value: object) -> tuple[NodeId, dict[str, str]]:
    """The node that signed, and the fields of its request, all of them texts.

    Raises InvalidInput for another shape, NotFound for a type that is not served, Forbidden for a signature that does
    not fit.
    """
    envelope = parse_fields(value, "the request", _ENVELOPE, _NONE)
    node_id = NodeId.parse(envelope["nodeId"])
    signature = parse_signature(envelope["signature"])
    body = envelope["body"]
    kind = body.get("type") if isinstance(body, dict) else None
    if isinstance(kind, str) and kind in OLDER:
        raise NotFound(f"{kind} is not served here", hint="It belongs to nodes before 1.2; update the node")
    if not isinstance(kind, str) or kind not in BODIES:
        raise InvalidInput(f"body.type: expected one of {', '.join(BODIES)}")
    fields = parse_fields(body, "body", BODIES[kind], _NONE)
    texts = {name: text for name, text in fields.items() if isinstance(text, str)}
    if len(texts) != len(fields):
        raise InvalidInput("body: expected texts")
    # One key signs requests and band messages alike, so only what it says about itself counts.
    if not signed_by(node_id, body, signature):
        raise Forbidden("the signature does not fit")
    if texts.get("nodeId", node_id) != node_id:
        raise Forbidden("body.nodeId is not the node that signed")
    return node_id, texts


def is_registered(node: Node, node_id: NodeId, owner: str) -> bool:
    """Whether a node is known, approved and registered under this owner."""
    found = node.data.nodes.get(node_id)
    return found is not None and found.approved_at is not None and found.owner == owner
