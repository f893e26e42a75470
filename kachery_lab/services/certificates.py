"""Delegation certificates: what a node of 2021 shows to get upload URLs (spec/hub-api.md sections 3 and 4).

Rights are looked at before a certificate is issued, bound into it, and looked at again whenever it is used: it gives
what both the certificate and the node's roles of that moment allow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kachery_lab.core.bands import capability
from kachery_lab.core.canonical_json import canonical_2021, python_form
from kachery_lab.core.ids import NodeId, parse_fields, parse_whole_number
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.objects import ObjectPath
from kachery_lab.core.roles import parse_roles, role_names
from kachery_lab.core.signatures import parse_signature, sign_2021, verify_2021
from kachery_lab.core.strict_json import check_signable
from kachery_lab.errors import Forbidden, InvalidInput, NotFound
from kachery_lab.services.access_data import AccessData, Channel
from kachery_lab.services.channels import ChannelService
from kachery_lab.services.subjects import Subject
from kachery_lab.services.uploads import UploadService

CERTIFICATE_MS = 300_000
REQUEST_MS = 300_000
"""How far ahead a request may say that it expires; daemon and client say 60 s."""
SKEW_MS = 60_000
MAX_PATHS = 10_000
"""Objects in one request; all new messages of a subfeed come in one."""

_CERTIFICATE = (frozenset({"payload", "auth"}), frozenset[str]())
_CERTIFIED = (frozenset({"expires", "attributes", "delegatedSignerId"}), frozenset[str]())
_AUTH = (frozenset({"signerId", "signature"}), frozenset({"delegationCertificate"}))
_UPLOADS = (frozenset({"channel", "node", "roles"}), frozenset[str]())


@dataclass(frozen=True, slots=True)
class Bearer:
    """Who showed a good certificate for a good request. The roles that it binds are the subject's ceiling."""

    channel: Channel
    subject: Subject


def signed_by(signer: str, value: object, signature: object) -> bool:
    """Whether a key signed a value: canonical form, its legacy form, or the text that the Python client signs."""
    try:
        check_signable(value)
        return verify_2021(signer, value, signature, python_form_text=python_form(value))
    except InvalidInput:
        return False


class CertificateService:
    """Issues certificates with the channels' resource keys and honours them."""

    def __init__(self, data: AccessData, channels: ChannelService, uploads: UploadService) -> None:
        self._data = data
        self._channels = channels
        self._uploads = uploads

    def issue(self, channel: Channel, node_id: NodeId) -> tuple[dict[str, object], str]:
        """A certificate for five minutes and the private key it is for. Raises Forbidden for a node without roles."""
        roles = self._data.node_roles(channel.name, node_id)
        if not roles:
            raise Forbidden(
                f"node {node_id} has no role in the channel {channel.name}",
                hint="The channel's owner grants roles; the node must also ask for them",
            )
        delegated = PrivateKey.generate()
        bound = {"channel": channel.name, "node": str(node_id), "roles": role_names(roles)}
        payload: dict[str, object] = {
            "expires": int(time.time() * 1000) + CERTIFICATE_MS,
            "attributes": {"ablyCapability": capability(channel.name, roles), "uploads": bound},
            "delegatedSignerId": delegated.public_hex,
        }
        key = self._channels.resource_key(channel)
        signature = sign_2021(key, canonical_2021(payload))
        certificate = {"payload": payload, "auth": {"signerId": channel.resource_id, "signature": signature}}
        return certificate, delegated.seed_hex()

    def resource(self, resource_id: object) -> Channel:
        """The channel of a resource id. Raises NotFound."""
        found = next((c for c in self._data.channels.values() if c.resource_id == resource_id), None)
        if found is None:
            raise NotFound("there is no such resource")
        return found

    # -- honouring -----------------------------------------------------------------------------------------------

    def bearer(self, payload: Mapping[str, object], auth: object) -> Bearer:
        """Who signed a request with a certificate that holds now. Raises InvalidInput (shape), Forbidden, NotFound."""
        now = time.time() * 1000
        fields = parse_fields(auth, "auth", *_AUTH)
        signer = NodeId.parse(fields["signerId"], "auth.signerId")
        parse_signature(fields["signature"], "auth.signature")
        expires = _milliseconds(payload["expires"], "payload.expires")
        resource_id = NodeId.parse(payload["resourceId"], "payload.resourceId")
        certificate = fields.get("delegationCertificate")
        if certificate is None:
            raise Forbidden("a delegation certificate is needed", hint="Ask for one with getBitwooderCertForChannel")
        certified, attributes = self._certified(certificate, resource_id, signer, now)
        if not signed_by(signer, payload, fields["signature"]):
            raise Forbidden("the signature does not fit the payload")
        if not now - SKEW_MS < expires <= now + REQUEST_MS + SKEW_MS:
            raise Forbidden(f"payload.expires is past or too far ahead; this server's time is {int(now)} ms")
        bound = parse_fields(attributes.get("uploads"), "attributes.uploads", *_UPLOADS)
        if bound["channel"] != certified.name:
            raise Forbidden("the certificate is for another channel")
        roles = parse_roles(bound["roles"], "attributes.uploads.roles")
        return Bearer(certified, Subject("node", NodeId.parse(bound["node"]), roles))

    def _certified(
        self, certificate: object, resource_id: str, signer: str, now: float
    ) -> tuple[Channel, dict[str, object]]:
        """The channel and the attributes of a certificate for this signer, issued here and in force."""
        fields = parse_fields(certificate, "delegationCertificate", *_CERTIFICATE)
        payload = parse_fields(fields["payload"], "delegationCertificate.payload", *_CERTIFIED)
        auth = parse_fields(fields["auth"], "delegationCertificate.auth", *_AUTH)
        expires = _milliseconds(payload["expires"], "delegationCertificate.payload.expires")
        attributes = payload["attributes"]
        if not isinstance(attributes, dict):
            raise InvalidInput("delegationCertificate.payload.attributes: expected an object")
        if "delegationCertificate" in auth:
            raise Forbidden("certificates for certificates are not issued here")
        if payload["delegatedSignerId"] != signer:
            raise Forbidden("the certificate is for another key")
        channel = self.resource(resource_id)
        if auth["signerId"] != resource_id or not signed_by(resource_id, payload, auth["signature"]):
            raise Forbidden("the certificate was not issued by this hub for this resource")
        if now >= expires:
            raise Forbidden("the certificate has expired", hint="Ask for a new one")
        return channel, attributes

    def upload_tickets(self, bearer: Bearer, paths: object, sizes: object) -> list[str]:
        """URL segments of upload tickets, in order; all or none. Raises InvalidInput, Forbidden, NotFound, TooLarge."""
        if not isinstance(paths, list) or not isinstance(sizes, list) or len(paths) != len(sizes):
            raise InvalidInput("filePaths, sizes: expected two lists of the same length")
        if len(paths) > MAX_PATHS:
            raise InvalidInput(f"filePaths: at most {MAX_PATHS} in one request")
        objects = self._objects(bearer.channel.name, paths)
        lengths = [parse_whole_number(size, "sizes") for size in sizes]
        issued = zip(objects, lengths, strict=True)
        return [self._uploads.issue(bearer.channel.name, path, size, bearer.subject) for path, size in issued]

    @staticmethod
    def _objects(channel: str, paths: Sequence[object]) -> list[ObjectPath]:
        found = []
        for path in paths:
            if not isinstance(path, str):
                raise InvalidInput("filePaths: expected texts")
            name, _, rest = path.partition("/")
            if name != channel:
                raise Forbidden("filePaths: the certificate is for another channel")
            found.append(ObjectPath.parse(rest, "filePaths"))
        return found


def _milliseconds(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise InvalidInput(f"{where}: expected a time in ms since 1970")
    return float(value)
