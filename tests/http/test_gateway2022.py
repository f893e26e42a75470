"""`/api/gateway`: what kachery-cloud sends, and what is refused. Refusals are paired with the same request served."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import pytest

from kachery_lab.core.roles import Role
from kachery_lab.services.principals import OPERATOR
from tests import gateway
from tests.gateway import (
    PUBLIC,
    ZONE,
    CloudClient,
    announce,
    ask,
    browser_text,
    finalization,
    make_client,
    ok,
    refused,
    store,
)
from tests.hubs import Hub, path_of, sha1_of

hub, writer, data = gateway.hub, gateway.writer, gateway.data
WINDOW = 15 * 60 * 1000


def find(hub: Hub, client: CloudClient, data: bytes, zone: str | None = ZONE) -> dict[str, Any]:
    return ok(ask(hub, client.file("findFile", data, zone)))


# -- what is served ------------------------------------------------------------------------------------------------


def test_upload_find_read(hub: Hub, writer: CloudClient, data: bytes) -> None:
    assert find(hub, writer, data) == {"type": "findFile", "found": False}
    announced = store(hub, writer, data)
    assert set(announced) == {"type", "alreadyExists", "objectKey", "signedUploadUrl"}
    found = find(hub, writer, data)
    assert set(found) == {"type", "found", "url", "size", "bucketUri", "objectKey", "cacheHit"}
    assert (found["type"], found["found"], found["size"]) == ("findFile", True, len(data))
    assert found["objectKey"] == announced["objectKey"]
    assert hub.get(found["url"]).body == data
    head = hub.request("HEAD", found["url"])
    assert (head.status, head.headers["content-length"]) == (200, str(len(data)))
    again = announce(hub, writer, data)
    assert again == {"type": "initiateFileUpload", "alreadyExists": True}


def test_the_zone_is_default_when_it_is_absent(hub: Hub, data: bytes) -> None:
    client = make_client(hub, "admin")
    store(hub, client, data, None)
    assert find(hub, client, data, None)["found"] is True
    assert find(hub, client, data, "default")["found"] is True


def test_finalize_without_zone(hub: Hub, writer: CloudClient, data: bytes) -> None:
    """figurl's upload code leaves it out; the object key says it."""
    announced = announce(hub, writer, data)
    assert hub.request("PUT", announced["signedUploadUrl"], data).status == 200
    key = announced["objectKey"]
    ok(ask(hub, finalization(writer, data, key, None)))
    assert find(hub, writer, data)["found"] is True


def test_public_zone_needs_no_key(hub: Hub, data: bytes) -> None:
    owner = make_client(hub, "boss")
    store(hub, owner, data, PUBLIC)
    payload = CloudClient().file("findFile", data, PUBLIC)["payload"]
    for envelope in (CloudClient().file("findFile", data, PUBLIC), {"payload": payload}):
        found = ok(ask(hub, envelope))
        assert hub.get(found["url"]).body == data
        assert "ticket" not in found["url"]
    text = refused(ask(hub, CloudClient().file("initiateFileUpload", data, PUBLIC, size=len(data))), 401)
    assert "is not registered here" in text


def test_client_info(hub: Hub, writer: CloudClient) -> None:
    stranger = CloudClient()
    for asking in (writer, stranger):
        found = ok(ask(hub, asking.envelope("getClientInfo", clientId=writer.id, zone=ZONE)))
        assert (found["type"], found["found"]) == ("getClientInfo", True)
        client = found["client"]
        assert set(client) == {"clientId", "ownerId", "timestampCreated", "label"}
        assert (client["clientId"], client["ownerId"], client["label"]) == (writer.id, "writer", "rig")
        assert abs(client["timestampCreated"] - time.time() * 1000) < 60_000
    unknown = ok(ask(hub, stranger.envelope("getClientInfo", clientId=stranger.id)))
    assert unknown == {"type": "getClientInfo", "found": False}
    assert hub.request("POST", stranger.link(), b"user=ann", FORM).status == 200
    assert ok(ask(hub, stranger.envelope("getClientInfo", clientId=stranger.id)))["found"] is False


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


def test_zone_info_names_this_server(hub: Hub) -> None:
    for zone in (ZONE, "nowhere"):
        found = ok(ask(hub, CloudClient().envelope("getZoneInfo", zoneName=zone)))
        assert found == {"type": "getZoneInfo", "found": True, "kacheryGatewayUrl": hub.base}


def test_zone_info_names_the_public_url(tmp_path: Any) -> None:
    with Hub(tmp_path, public_url="https://lab.example/node/") as hub:
        found = ok(ask(hub, CloudClient().envelope("getZoneInfo", zoneName="default")))
        assert found["kacheryGatewayUrl"] == "https://lab.example/node"


def test_double_slash(hub: Hub, writer: CloudClient, data: bytes) -> None:
    for path in ("//api/gateway", "/api/gateway"):
        assert hub.post(path, writer.file("findFile", data, ZONE)).json()["found"] is False


def test_delete_and_restore(hub: Hub, writer: CloudClient, data: bytes) -> None:
    owner = make_client(hub, "boss")
    store(hub, writer, data)
    text = refused(ask(hub, writer.file("deleteFile", data, ZONE)), 403)
    assert "owner" in text
    assert find(hub, writer, data)["found"] is True
    assert ok(ask(hub, owner.file("deleteFile", data, ZONE))) == {"type": "deleteFile", "success": True}
    assert find(hub, writer, data)["found"] is False
    gone = ok(ask(hub, owner.file("deleteFile", data, ZONE)))
    assert gone["success"] is False
    assert sha1_of(data) in gone["error"]
    hub.call(hub.node.channels.restore_object(OPERATOR, ZONE, path_of(data)))
    assert hub.get(find(hub, writer, data)["url"]).body == data


def test_both_dialects_of_canonical_json(hub: Hub, writer: CloudClient) -> None:
    """Text beyond ASCII cannot be in any valid field, so what is looked at is whether the signature was the reason."""
    for text, status in ((None, 400), (browser_text, 400)):
        payload = {"type": "getZoneInfo", "zoneName": "Zürich 🔬", "timestamp": int(time.time() * 1000)}
        signature = writer.signature(payload) if text is None else writer.signature(payload, text)
        envelope = {"payload": payload, "fromClientId": writer.id, "signature": signature}
        assert "zoneName" in refused(ask(hub, envelope), status) or "channelName" in refused(ask(hub, envelope), status)
        other = {**envelope, "signature": "0" * 128}
        assert "signature" in refused(ask(hub, other), 401)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_schemas_are_closed(hub: Hub, writer: CloudClient, data: bytes) -> None:
    good = writer.file("findFile", data, ZONE)
    assert ask(hub, good).status == 200
    payload = good["payload"]

    def signed(**changes: Any) -> dict[str, Any]:
        changed = {key: value for key, value in {**payload, **changes}.items() if value is not ...}
        return {"payload": changed, "fromClientId": writer.id, "signature": writer.signature(changed)}

    wrong = [
        [],
        {},
        {**good, "extra": 1},
        {**good, "payload": []},
        {**good, "payload": {**payload, "type": "findfile"}},
        {**good, "fromClientId": "a" * 63},
        {**good, "fromClientId": None},
        {**good, "signature": "a" * 127},
        signed(extra=1),
        signed(hash=...),
        signed(timestamp=...),
        signed(timestamp="now"),
        signed(timestamp=True),
        signed(hash="A" * 40),
        signed(hash="a" * 39),
        signed(hash="a" * 40 + "\n"),
        signed(hashAlg="md5"),
        signed(zone=None),
        signed(zone="a/b"),
        signed(zone="api"),
        signed(type=["findFile"]),
    ]
    for envelope in wrong:
        refused(ask(hub, envelope), 400)  # type: ignore[arg-type]
    refused(hub.post("/api/gateway", b'{"payload": NaN}'), 400)
    refused(hub.post("/api/gateway", b'{"payload": {}, "payload": {}}'), 400)
    refused(hub.post("/api/gateway", b"["), 400)
    refused(hub.post("/api/gateway", b" " * 100_001), 413)
    assert ask(hub, signed()).status == 200


def test_time_window(hub: Hub, writer: CloudClient, data: bytes) -> None:
    now = int(time.time() * 1000)
    for offset, status in (
        (-WINDOW - 2000, 401),
        (-WINDOW + 5000, 200),
        (WINDOW - 5000, 200),
        (WINDOW + 5000, 401),
        (-now, 401),
        (2**53 - now, 401),
        (24 * 3600 * 1000, 401),
    ):
        envelope = writer.file("findFile", data, ZONE, timestamp=now + offset)
        answer = ask(hub, envelope)
        assert answer.status == status, (offset, answer.body)
        if status == 401:
            text = refused(answer, 401)
            assert "clock" in text
            assert f"client {writer.id}" in text
            assert f"zone {ZONE}" in text
            assert time.strftime("server's time %Y-%m-%dT%H", time.gmtime()) in text


def test_signatures(hub: Hub, writer: CloudClient, data: bytes) -> None:
    good = writer.file("findFile", data, ZONE)
    stranger = CloudClient()
    for wrong in (
        {**good, "signature": stranger.signature(good["payload"])},
        {**good, "fromClientId": stranger.id},
        {**good, "payload": {**good["payload"], "timestamp": good["payload"]["timestamp"] + 1}},
        {**good, "payload": {**good["payload"], "zone": PUBLIC}},
        {key: value for key, value in good.items() if key != "signature"},
        {**good, "githubUserId": "boss", "githubAccessToken": "x"},
        {"payload": good["payload"], "githubUserId": "boss", "githubAccessToken": "x"},
    ):
        refused(ask(hub, wrong), 401)
    assert ask(hub, good).status == 200
    assert ask(hub, {**good, "signature": good["signature"].upper()}).status == 200


def test_vectors(hub: Hub) -> None:
    """Signatures that the real client made: the time is refused, which comes before; so they are checked alone."""
    requests, payload = hub.node.client_requests, {"type": "findFile", "hashAlg": "sha1", "zone": "lab"}
    payload |= {"hash": "2aae6c35c94fcfb415dbe95f408b9ce91ee846ed", "timestamp": 1790000000000}  # type: ignore[dict-item]
    client = "79b5562e8fe654f94078b112e8a98ba7901f853ae695bed7e0e3910bad049664"
    signature = (
        "37f268a41341c09c9f8fe2167c1a2327c458750fcd056bc2b642cdaec6e47dd7"
        "f0fc514ccbb017b7d22cb8e074ecd977ec9c6250423ee7089a9bf12785967b02"
    )
    assert requests.check_signature(payload, client, signature) == signature
    added = (
        "49c94f37296235ffff99d855b07317c333a8d1afa8b1b8511fd4f75c0e7efefc"
        "41138f48fb7fe3549942e6c11f49300b71a9cb3a516c2bfe07792e94e8560503"
    )
    assert hub.get(f"/registerClient/{client}?signature={added}&zone=lab&label=rig").status == 200
    assert hub.get(f"/registerClient/{client}?signature={added[:-1]}4&zone=lab&label=rig").status == 401


def test_private_zone(hub: Hub, writer: CloudClient, data: bytes) -> None:
    store(hub, writer, data)
    stranger, other = CloudClient(), make_client(hub, "other")
    uploader = make_client(hub, "uploader", Role.PROVIDE_FILES)
    reader = make_client(hub, "reader", Role.REQUEST_FILES)
    refused(ask(hub, {"payload": writer.file("findFile", data, ZONE)["payload"]}), 401)
    assert "is not registered here" in refused(ask(hub, stranger.file("findFile", data, ZONE)), 401)
    for client in (other, uploader):
        text = refused(ask(hub, client.file("findFile", data, ZONE)), 403)
        assert "requestFiles" in text
        assert f"client {client.id}, zone {ZONE}" in text
    assert find(hub, reader, data)["found"] is True
    for client in (other, reader):
        assert "provideFiles" in refused(ask(hub, client.file("initiateFileUpload", b"n", ZONE, size=1)), 403)
    assert (f"client:{reader.id}", "upload.announce", ZONE) in {entry[:3] for entry in hub.refusals()}
    store(hub, uploader, data + b"1")


def test_existence_is_not_told(hub: Hub, data: bytes) -> None:
    """A zone that is not there and one that is closed say the same."""
    other = make_client(hub, "other")
    texts = [refused(ask(hub, other.file("findFile", data, zone)), 403) for zone in (ZONE, "nowhere")]
    assert texts[0].replace(ZONE, "").split("(client")[0] == texts[1].replace("nowhere", "").split("(client")[0]


def test_a_hash_from_elsewhere_opens_nothing(hub: Hub, writer: CloudClient, data: bytes) -> None:
    store(hub, writer, data)
    owner = make_client(hub, "boss")
    assert find(hub, owner, data, PUBLIC)["found"] is False
    other = make_client(hub, "other", Role.PROVIDE_FILES | Role.REQUEST_FILES, PUBLIC)
    announced = announce(hub, other, data, PUBLIC)
    assert announced["alreadyExists"] is False
    key = announced["objectKey"]
    done = ask(hub, finalization(other, data, key, PUBLIC))
    refused(done, 409)
    assert find(hub, other, data, PUBLIC)["found"] is False
    assert hub.request("PUT", announced["signedUploadUrl"], data).status == 200
    assert ask(hub, finalization(other, data, key, PUBLIC)).status == 200
    assert find(hub, other, data, PUBLIC)["found"] is True


def test_finalize_of_something_else(hub: Hub, writer: CloudClient, data: bytes) -> None:
    announced = announce(hub, writer, data)
    key = announced["objectKey"]
    assert hub.request("PUT", announced["signedUploadUrl"], data).status == 200
    for wrong, status in (
        ({"objectKey": key.replace(ZONE, PUBLIC, 1)}, 400),
        ({"objectKey": "../" + key}, 400),
        ({"objectKey": key[:-1] + ("0" if key[-1] != "0" else "1")}, 400),
        ({"size": len(data) + 1}, 422),
    ):
        fields = {"size": len(data), "objectKey": key, **wrong}
        refused(ask(hub, writer.file("finalizeFileUpload", data, ZONE, **fields)), status)
    other = make_client(hub, "rival", Role.PROVIDE_FILES)
    refused(ask(hub, finalization(other, data, key)), 409)
    ok(ask(hub, finalization(writer, data, key)))
    assert hub.get(find(hub, writer, data)["url"]).body == data


# -- once ----------------------------------------------------------------------------------------------------------


def test_a_repeat_gets_the_same_answer_and_has_no_effect(hub: Hub, writer: CloudClient, data: bytes) -> None:
    owner = make_client(hub, "boss")
    initiate = writer.file("initiateFileUpload", data, ZONE, size=len(data))
    first = ok(ask(hub, initiate))
    assert ok(ask(hub, initiate)) == first
    assert hub.request("PUT", first["signedUploadUrl"], data).status == 200
    key = first["objectKey"]
    finalize = finalization(writer, data, key)
    assert ok(ask(hub, finalize)) == ok(ask(hub, finalize))
    delete = owner.file("deleteFile", data, ZONE)
    assert ok(ask(hub, delete))["success"] is True
    # Sent again by somebody who saw it: the file stays deleted, and after a new upload it stays there.
    assert ok(ask(hub, finalize)) == {"type": "finalizeFileUpload"}
    assert find(hub, writer, data)["found"] is False
    store(hub, writer, data)
    assert ok(ask(hub, delete))["success"] is True
    assert find(hub, writer, data)["found"] is True


def test_repeats_at_the_same_time_are_one(hub: Hub, writer: CloudClient) -> None:
    count = 0

    async def work() -> dict[str, Any]:
        nonlocal count
        count += 1
        await asyncio.sleep(0.05)
        return {"count": count}

    async def many() -> list[dict[str, Any]]:
        signature = os.urandom(64).hex()
        now = time.time() * 1000
        return await asyncio.gather(*(hub.node.client_requests.once(signature, now, work) for _ in range(20)))

    assert hub.call(many()) == [{"count": 1}] * 20


def test_a_repeat_after_a_right_is_gone(hub: Hub, data: bytes) -> None:
    client = make_client(hub, "passing", Role.PROVIDE_FILES)
    initiate = client.file("initiateFileUpload", data, ZONE, size=len(data))
    assert ask(hub, initiate).status == 200
    hub.call(hub.node.authorizations.revoke(OPERATOR, ZONE, "user", "passing"))
    refused(ask(hub, initiate), 403)


def test_answers_outlive_the_process_and_are_forgotten_in_time(tmp_path: Any, data: bytes) -> None:
    with Hub(tmp_path) as hub:
        client = make_client(hub, "admin")
        store(hub, client, data, None)
        delete = client.file("deleteFile", data)
        assert ok(ask(hub, delete))["success"] is True
        store(hub, client, data, None)
    with Hub(tmp_path) as hub:
        assert ok(ask(hub, delete))["success"] is True
        assert find(hub, client, data, None)["found"] is True
        assert hub.call(hub.node.client_requests.prune()) == 0
        old = int(time.time() * 1000) - WINDOW - 2000
        hub.call(hub.node.client_requests._keep("ab" * 64, old, {}))
        assert hub.call(hub.node.client_requests.prune()) == 1


def test_rates(hub: Hub, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy, modest = make_client(hub, "greedy", Role.REQUEST_FILES), make_client(hub, "modest", Role.REQUEST_FILES)
    rates = hub.node.client_requests._rates
    monkeypatch.setattr(rates, "_burst", 10.0)
    monkeypatch.setattr(rates, "_per_second", 1.0)
    answers = [ask(hub, greedy.file("findFile", data, ZONE)) for _ in range(20)]
    statuses = [answer.status for answer in answers]
    assert statuses[:10] == [200] * 10
    assert statuses[-1] == 429
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert ask(hub, modest.file("findFile", data, ZONE)).status == 200
