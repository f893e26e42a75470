"""Certificates and upload URLs of the 2021 hub: rights are bound into them and looked at again when they are used."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.roles import Role
from kachery_lab.core.signatures import sign_2021
from tests.hubs import Hub, LabNode, path_of, refused, sha1_of, upload_request


def signed_again(request: dict[str, Any], key: str) -> dict[str, Any]:
    signature = sign_2021(PrivateKey.from_seed(key), canonical_2021(request["payload"]))
    return {**request, "auth": {**request["auth"], "signature": signature}}


def test_rights_are_bound_into_the_certificate(hub: Hub, channel: str) -> None:
    node = LabNode()
    hub.register(node)
    hub.join(node, channel, Role.NONE)
    assert channel in refused(hub.ask(node, "getBitwooderCertForChannel", channelName=channel))
    assert (f"node:{node.id}", "certificate.issue", channel) in [entry[:3] for entry in hub.refusals()]
    hub.grant(node.id, channel, Role.REQUEST_FILES | Role.PROVIDE_TASKS)
    certificate, key = hub.certificate(node, channel)
    payload = certificate["payload"]
    assert 290_000 < payload["expires"] - time.time() * 1000 <= 300_000
    assert payload["attributes"]["uploads"]["roles"] == ["requestFiles", "provideTasks"]
    assert set(payload["attributes"]["ablyCapability"]) == {
        f"{channel}-{band}" for band in ("requestFiles", "provideFiles", "requestTasks", "provideTasks")
    }
    resource_id = hub.node.data.channel(channel).resource_id
    file, task = f"{channel}/{path_of(b'x')}", f"{channel}/{path_of(b'x').replace('sha1', 'task_results', 1)}"
    assert hub.post("/api/resource", upload_request(certificate, key, resource_id, [task], [1])).status == 200
    text = refused(hub.post("/api/resource", upload_request(certificate, key, resource_id, [file], [1])))
    assert "provideFiles" in text
    assert channel in text
    # More rights need a new certificate; fewer hold for the old one at once.
    hub.grant(node.id, channel, Role.ALL)
    refused(hub.post("/api/resource", upload_request(certificate, key, resource_id, [file], [1])))
    assert hub.upload_urls(node, channel, [path_of(b"x")], [1])
    hub.grant(node.id, channel, Role.REQUEST_FILES)
    refused(hub.post("/api/resource", upload_request(certificate, key, resource_id, [task], [1])))


def test_forged_certificates(hub: Hub, channel: str, member: LabNode) -> None:
    certificate, key = hub.certificate(member, channel)
    resource_id = hub.node.data.channel(channel).resource_id
    paths, sizes = [f"{channel}/{path_of(b'x')}"], [1]
    good = upload_request(certificate, key, resource_id, paths, sizes)
    assert hub.post("/api/resource", good).status == 200

    def with_certificate(**changes: Any) -> dict[str, Any]:
        payload = {**certificate["payload"], **changes}
        return upload_request({**certificate, "payload": payload}, key, resource_id, paths, sizes)

    mine, other_channel = PrivateKey.generate(), f"o{time.monotonic_ns():x}"
    hub.make_channel(other_channel)
    other_id = hub.node.data.channel(other_channel).resource_id
    self_made = {**certificate["payload"], "delegatedSignerId": mine.public_hex}
    own_authority = {
        "payload": self_made,
        "auth": {"signerId": mine.public_hex, "signature": sign_2021(mine, canonical_2021(self_made))},
    }
    attributes = certificate["payload"]["attributes"]
    wider = {**attributes, "uploads": {**attributes["uploads"], "node": "0" * 64}}
    no_certificate = {**good, "auth": {k: v for k, v in good["auth"].items() if k != "delegationCertificate"}}
    forged = [
        with_certificate(expires=certificate["payload"]["expires"] + 1),
        with_certificate(attributes=wider),
        with_certificate(delegatedSignerId=mine.public_hex),
        upload_request(certificate, mine.seed_hex(), resource_id, paths, sizes),
        upload_request(own_authority, mine.seed_hex(), resource_id, paths, sizes),
        upload_request(own_authority, mine.seed_hex(), mine.public_hex, paths, sizes),
        upload_request(certificate, key, other_id, [f"{other_channel}/{path_of(b'x')}"], sizes),
        upload_request(certificate, key, resource_id, [f"{other_channel}/{path_of(b'x')}"], sizes),
        no_certificate,
        {**good, "payload": {**good["payload"], "sizes": [2]}},
    ]
    for request in forged:
        refused(hub.post("/api/resource", request))
    assert hub.post("/api/resource", good).status == 200


@pytest.mark.parametrize(
    "paths_and_sizes",
    [
        (["{c}/{p}"], []),
        ([], [1]),
        (["{c}/{p}"], ["1"]),
        (["{c}/{p}"], [-1]),
        (["{c}/{p}"], [1.5]),
        ([5], [1]),
        (["{c}/../{c}/{p}"], [1]),
        (["{c}/sha1/{s}"], [1]),
        (["{c}/{p}/"], [1]),
        (["{c}/{p}.tmp"], [1]),
        ("{c}/{p}", [1]),
        (["{c}/{p}"] * 10_001, [1] * 10_001),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_malformed_upload_requests_are_400(
    hub: Hub, channel: str, member: LabNode, paths_and_sizes: tuple[Any, Any]
) -> None:
    certificate, key = hub.certificate(member, channel)
    paths, sizes = paths_and_sizes
    fill = {"c": channel, "p": path_of(b"x"), "s": sha1_of(b"x")}
    paths = [p.format(**fill) if isinstance(p, str) else p for p in paths] if isinstance(paths, list) else paths
    resource_id = hub.node.data.channel(channel).resource_id
    refused(hub.post("/api/resource", upload_request(certificate, key, resource_id, paths, sizes)), 400)


def test_all_messages_of_a_subfeed_come_in_one_request(hub: Hub, channel: str, member: LabNode) -> None:
    feed = "ab" * 32
    folder = f"feeds/ab/ab/ab/{feed}/subfeeds/cd/cd/cd/{'cd' * 20}"
    urls = hub.upload_urls(member, channel, [f"{folder}/{n}" for n in range(700)], list(range(700)))
    assert len(set(urls)) == 700


def test_a_token_for_the_bands(hub: Hub, channel: str, member: LabNode) -> None:
    """Only for a good certificate and a good signature; a repeated request gets the rights of its moment."""
    certificate, key = hub.certificate(member, channel)
    request = upload_request(certificate, key, hub.node.data.channel(channel).resource_id, [], [])
    payload = {k: v for k, v in request["payload"].items() if k not in ("filePaths", "sizes")}
    payload |= {"type": "getAblyTokenRequest", "capability": certificate["payload"]["attributes"]["ablyCapability"]}
    unsigned = {**request, "type": payload["type"], "payload": payload}
    refused(hub.post("/api/resource", unsigned))
    refused(hub.post("/api/resource", signed_again(unsigned, "07" * 32)))
    refused(hub.post("/api/resource", signed_again({**unsigned, "payload": {**payload, "expires": 1}}, key)))
    good = signed_again(unsigned, key)
    for answer in (hub.post("/api/resource", good), hub.post("/api/resource", good)):
        assert answer.status == 200, answer.body
        assert answer.headers["cache-control"] == "no-store"
        details = answer.json()["ablyTokenRequest"]
        assert json.loads(details["capability"]).keys() == payload["capability"].keys()
        assert details["issued"] < details["expires"]
    hub.revoke(member.id, channel)
    assert "no role" in refused(hub.post("/api/resource", good))


def test_resource_info(hub: Hub, channel: str) -> None:
    resource_id = hub.node.data.channel(channel).resource_id
    answer = hub.post("/api/resource", {"type": "getResourceInfo", "resourceId": resource_id})
    assert answer.json()["resourceInfo"]["bucketBaseUrl"] == f"{hub.base}/bucket"
    key = hub.node.channels.resource_key(hub.node.data.channel(channel)).seed_hex()
    by_key = hub.post("/api/resource", {"type": "getResourceInfo", "resourceKey": key})
    assert by_key.json() == answer.json()
    assert key.encode() not in by_key.body
    refused(hub.post("/api/resource", {"type": "getResourceInfo", "resourceId": "0" * 64}))
    refused(hub.post("/api/resource", {"type": "getResourceInfo"}), 400)
