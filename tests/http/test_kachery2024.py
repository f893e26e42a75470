"""The API of kachery 2: shapes, statuses and rules of its calls about files."""

from __future__ import annotations

import hashlib
import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest

from kachery_lab.core.ids import Sha1
from kachery_lab.core.roles import Role
from kachery_lab.core.work_tokens import is_work_token
from kachery_lab.services.principals import OPERATOR
from tests.hubs import Hub, path_of, sha1_of
from tests.servers import files_below
from tests.zones import Zone, fresh

HELLO = "2aae6c35c94fcfb415dbe95f408b9ce91ee846ed"


@pytest.fixture
def public(hub: Hub) -> Zone:
    return Zone(hub, public=True)


# -- the three calls ---------------------------------------------------------------------------------------------------


def test_an_upload_and_its_shapes(zone: Zone) -> None:
    data = fresh()
    assert zone.find(zone.owner, data).json() == {"type": "findFileResponse", "found": False}
    made = zone.initiate(zone.owner, data)
    key = f"{zone.name}/{path_of(data)}"
    url = made.json()["signedUploadUrl"]
    assert made.json() == {
        "type": "initiateFileUploadResponse",
        "alreadyExists": False,
        "alreadyPending": False,
        "signedUploadUrl": url,
        "objectKey": key,
    }
    answer = zone.put(url, data)
    assert (answer.status, answer.body) == (200, b"")
    # What is not finished is not there yet.
    assert zone.find(zone.owner, data).json()["found"] is False
    assert zone.finalize(zone.owner, data).json() == {"type": "finalizeFileUploadResponse", "success": True}
    found = zone.find(zone.owner, data).json()
    assert found == {
        "type": "findFileResponse",
        "found": True,
        "url": found["url"],
        "size": len(data),
        "bucketUri": "",
        "objectKey": key,
        "cacheHit": False,
    }
    assert zone.hub.get(found["url"]).body == data
    again = zone.initiate(zone.owner, data).json()
    assert again == {
        "type": "initiateFileUploadResponse",
        "alreadyExists": True,
        "alreadyPending": False,
        "objectKey": key,
    }


def test_the_published_vectors(zone: Zone) -> None:
    assert sha1_of(b"hello world") == HELLO
    assert is_work_token(Sha1(HELLO), "00000000000077d3")
    assert hashlib.sha1(f"{HELLO}00000000000077d3".encode()).hexdigest() == "0001829a27cef2c6700af5a8650f871ead259f99"
    assert not is_work_token(Sha1(HELLO), "00000000000077d4")
    for data in (b"hello world", b""):
        zone.upload(zone.owner, data)
        assert zone.hub.get(zone.url(zone.owner, data)).body == data
    assert zone.find(zone.owner, b"").json()["size"] == 0


def test_an_empty_file_arrives_chunked(zone: Zone) -> None:
    """requests sends an empty file without a length: one chunk, the last."""
    made = zone.initiate(zone.owner, b"").json()
    connection = http.client.HTTPConnection("127.0.0.1", zone.hub.port, timeout=30)
    connection.request("PUT", made["signedUploadUrl"].removeprefix(zone.hub.base), iter(()), encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()
    assert zone.finalize(zone.owner, b"").status == 200


def test_newer_and_older_dialects(zone: Zone) -> None:
    data = fresh()
    assert zone.initiate(zone.owner, data, allowPublicZones=True, futureField={"a": [1]}).status == 200
    assert zone.initiate(zone.owner, data, size=float(len(data))).status == 200
    body = {"type": "findFileRequest", "hashAlg": "sha1", "hash": sha1_of(data), "zoneName": zone.name}
    assert zone.hub.post("//api/findFile", body, Authorization=f"Bearer {zone.owner}").status == 200


def test_work_tokens_are_checked_when_set(zone: Zone, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"hello world"
    assert zone.initiate(zone.owner, data, workToken="wrong").status == 200
    monkeypatch.setattr(
        zone.hub.node, "settings", zone.hub.node.settings.model_copy(update={"check_work_tokens": True})
    )
    refused = zone.initiate(zone.owner, data, workToken="wrong")
    assert (refused.status, refused.json()) == (400, {"error": "Invalid work token"})
    assert zone.initiate(zone.owner, data, workToken="00000000000077d3").status == 200


@pytest.mark.parametrize(
    "change",
    [
        {"type": "findFileRequest"},
        {"type": None},
        {"size": "5"},
        {"size": -1},
        {"size": 1.5},
        {"size": True},
        {"size": 2**60},
        {"hashAlg": "md5"},
        {"hash": HELLO.upper()},
        {"hash": HELLO[:-1]},
        {"hash": HELLO + "\n"},
        {"hash": 5},
        {"zoneName": "a:b"},
        {"zoneName": "../x"},
        {"zoneName": ""},
        {"zoneName": "api"},
        {"zoneName": "z" * 101},
        {"workToken": 5},
        {"label": "a\nb"},
        {"label": "x" * 1001},
    ],
    ids=str,
)
def test_malformed_requests(zone: Zone, change: dict[str, Any]) -> None:
    answer = zone.initiate(zone.owner, b"hello world", **change)
    assert (answer.status, list(answer.json())) == (400, ["error"]), answer.body
    assert zone.initiate(zone.owner, b"hello world").status == 200


def test_bodies_that_are_no_request(zone: Zone) -> None:
    for body in (b"", b"{", b"null", b"[]", b"5", b'"a"', b"\xff", b'{"type":"findFileRequest"}', b"[" * 100_000):
        for kind in ("findFile", "initiateFileUpload", "finalizeFileUpload"):
            answer = zone.hub.request("POST", f"/api/{kind}", body, {"Authorization": f"Bearer {zone.owner}"})
            assert (answer.status, list(answer.json())) == (400, ["error"]), (kind, body, answer.body)
    assert zone.hub.request("GET", "/api/findFile").status == 405


# -- who may -----------------------------------------------------------------------------------------------------------


def test_who_may_upload(zone: Zone, public: Zone) -> None:
    for one in (zone, public):
        data = fresh()
        for key, status in (
            (None, 401),
            ("klk_nobody", 401),
            (one.other, 403),
            (one.reader, 403),
            (one.token("owner", "read"), 403),
            (one.token("owner", channels=["default"]), 403),
            (one.writer, 200),
            (one.owner, 200),
        ):
            assert one.initiate(key, data).status == status, key
        url = one.initiate(one.writer, data).json()["signedUploadUrl"]
        assert one.put(url, data).status == 200
        for key, status in ((None, 401), (one.other, 403), (one.reader, 403), (one.owner, 409), (one.writer, 200)):
            assert one.finalize(key, data).status == status, key


def test_who_may_find_and_read(zone: Zone, public: Zone) -> None:
    data, open_data = fresh(), fresh()
    zone.upload(zone.owner, data)
    public.upload(public.owner, open_data)
    for key, status in (
        (None, 401),
        ("klk_nobody", 401),
        (zone.other, 403),
        (zone.writer, 403),
        (zone.token("owner", "write"), 403),
        (zone.token("owner", channels=["default"]), 403),
        (zone.reader, 200),
        (zone.owner, 200),
    ):
        assert zone.find(key, data).status == status, key
    for key, status in ((None, 200), ("klk_nobody", 401), (public.other, 200), (public.writer, 200)):
        assert public.find(key, open_data).status == status, key
    assert "ticket=" in zone.url(zone.reader, data)
    assert public.url(None, open_data) == f"{zone.hub.base}/sha1/{sha1_of(open_data)}"


def test_an_unknown_zone_and_a_private_one_look_alike(zone: Zone) -> None:
    data = fresh()
    zone.upload(zone.owner, data)
    for key in (None, zone.other):
        private, absent = zone.find(key, data), zone.find(key, data, zoneName="no-such-zone")
        assert private.status == absent.status
        assert private.json()["error"].replace(zone.name, "no-such-zone") == absent.json()["error"]
    for kind in (zone.initiate, zone.finalize):
        private, absent = kind(zone.other, data), kind(zone.other, data, zoneName="no-such-zone")
        assert (private.status, absent.status) == (403, 403)
        assert private.json()["error"].replace(zone.name, "no-such-zone") == absent.json()["error"]


def test_a_netrc_entry_is_named(zone: Zone) -> None:
    data = fresh()
    for kind in ("findFile", "initiateFileUpload"):
        answer = zone.hub.post(f"/api/{kind}", {}, Authorization="Basic bWU6c2VjcmV0")
        assert answer.status == 401
        assert "netrc" in answer.json()["error"]
    made = zone.initiate(zone.owner, data).json()
    # Signed addresses carry the permission; what else is sent does not matter.
    basic = {"Authorization": "Basic bWU6c2VjcmV0"}
    assert zone.hub.request("PUT", made["signedUploadUrl"], data, basic).status == 200
    zone.finalize(zone.owner, data)
    assert zone.hub.get(zone.url(zone.reader, data), **basic).body == data


def test_the_client_scope_acts_as_the_node(zone: Zone) -> None:
    data = fresh()
    key = zone.token("other", "client")
    assert zone.initiate(key, data).status == 403
    zone.hub.join(zone.hub.node.identity.node_id, zone.name, Role.ALL)
    zone.upload(key, data)
    assert zone.hub.get(zone.url(key, data)).body == data


# -- what uploads must be ----------------------------------------------------------------------------------------------


def test_the_bytes_are_verified_before_the_answer(zone: Zone) -> None:
    data = fresh()
    url = zone.initiate(zone.owner, data).json()["signedUploadUrl"]
    for wrong in (data[:-1], data + b"x", bytes(len(data)), b""):
        assert zone.put(url, wrong).status == 422
        assert zone.finalize(zone.owner, data).status == 409
        assert zone.find(zone.owner, data).json()["found"] is False
    assert zone.put(url, data).status == 200
    assert zone.put(url, data).status == 200
    wrong_size = zone.finalize(zone.owner, data, size=len(data) + 1)
    assert (wrong_size.status, list(wrong_size.json())) == (422, ["error"])
    for _ in range(3):
        assert zone.finalize(zone.owner, data).status == 200
        assert zone.put(url, data).status == 200
    assert zone.finalize(zone.owner, data, size=len(data) - 1).status == 422
    assert zone.hub.get(zone.url(zone.owner, data)).body == data


def test_finalize_needs_the_key_of_the_same_file(zone: Zone, public: Zone) -> None:
    data, other = fresh(), fresh()
    zone.put(zone.initiate(zone.owner, data).json()["signedUploadUrl"], data)
    for key in (
        "",
        "x",
        path_of(data),
        f"{zone.name}/{path_of(other)}",
        f"{public.name}/{path_of(data)}",
        f"../{path_of(data)}",
    ):
        assert zone.finalize(zone.owner, data, objectKey=key).status == 400, key
    assert zone.finalize(zone.owner, data).status == 200


def test_limits_of_a_zone(hub: Hub) -> None:
    zone = Zone(hub, max_object_bytes=1000)
    assert zone.initiate(zone.owner, fresh(1001)).status == 413
    assert zone.initiate(zone.owner, fresh(1000)).status == 200


def test_what_exists_is_not_sent_again_and_heals(zone: Zone) -> None:
    """A reference whose bytes are gone is not `found`, and they may be sent again."""
    data = fresh()
    zone.upload(zone.owner, data)
    assert zone.initiate(zone.writer, data).json()["alreadyExists"] is True
    (file,) = [path for path in files_below(zone.hub.storage) if path.name == sha1_of(data)]
    file.unlink()
    assert zone.find(zone.owner, data).json()["found"] is False
    made = zone.initiate(zone.owner, data).json()
    assert made["alreadyExists"] is False
    assert zone.put(made["signedUploadUrl"], data).status == 200
    assert zone.finalize(zone.owner, data).status == 200
    assert zone.hub.get(zone.url(zone.owner, data)).body == data


# -- what this server's own node offers --------------------------------------------------------------------------------


def test_files_of_this_node_are_found_where_it_offers_them(zone: Zone, public: Zone) -> None:
    data, hub = fresh(), zone.hub
    stored = hub.request("POST", "/store", data, {"KACHERY-CLIENT-AUTH-CODE": hub.code})
    assert stored.status == 200
    own = hub.node.identity.node_id
    assert zone.find(zone.reader, data).json()["found"] is False
    hub.join(own, zone.name, Role.REQUEST_FILES)
    assert zone.find(zone.reader, data).json()["found"] is False
    hub.grant(own, zone.name, Role.PROVIDE_FILES)
    # Nobody in particular, and who may only write, learn nothing of the node's files.
    assert zone.find(zone.writer, data).status == 403
    assert zone.initiate(zone.writer, data).json()["alreadyExists"] is False
    assert hub.get(zone.url(zone.reader, data)).body == data
    hub.join(own, public.name, Role.ALL)
    for key in (None, public.other, public.reader):
        assert public.find(key, data).json()["found"] is False
    # A person who may do both turns it into an upload of their own.
    assert zone.initiate(zone.owner, data).json()["alreadyExists"] is True
    (shown,) = hub.call(hub.node.channels.objects(OPERATOR, zone.name, "", 10))
    assert (shown.principal, shown.on_demand) == (f"user:{zone.user('owner')}", False)


def test_what_came_through_another_zone_is_not_offered(zone: Zone, hub: Hub) -> None:
    data, second = fresh(), Zone(hub)
    second.upload(second.owner, data)
    hub.join(hub.node.identity.node_id, zone.name, Role.ALL)
    assert zone.find(zone.reader, data).json()["found"] is False
    assert hub.get(f"/sha1/{sha1_of(data)}", Authorization=f"Bearer {zone.reader}").status == 404
    hub.request("POST", "/store", data, {"KACHERY-CLIENT-AUTH-CODE": hub.code})
    assert zone.find(zone.reader, data).json()["found"] is True


def test_a_deleted_file_stays_away_until_it_is_restored(zone: Zone) -> None:
    data, hub = fresh(), zone.hub
    hub.join(hub.node.identity.node_id, zone.name, Role.ALL)
    zone.upload(zone.writer, data)
    hub.request("POST", "/store", data, {"KACHERY-CLIENT-AUTH-CODE": hub.code})
    before = hub.call(hub.node.buckets.find(zone.name, path_of(data)))
    url = zone.url(zone.reader, data)
    hub.call(hub.node.channels.remove_object(OPERATOR, zone.name, path_of(data)))
    for _ in range(2):
        assert zone.find(zone.reader, data).json()["found"] is False
    assert hub.get(url).status == 404
    assert zone.initiate(zone.writer, data).json()["alreadyExists"] is False
    hub.call(hub.node.channels.restore_object(OPERATOR, zone.name, path_of(data)))
    assert hub.get(url).body == data
    assert hub.call(hub.node.buckets.find(zone.name, path_of(data))) == before
    hub.call(hub.node.channels.remove_object(OPERATOR, zone.name, path_of(data)))
    assert zone.find(zone.reader, data).json()["found"] is False
    zone.upload(zone.owner, data)
    assert zone.find(zone.reader, data).json()["found"] is True


def test_answers_are_not_kept_by_caches(zone: Zone) -> None:
    data = fresh()
    for answer in (zone.initiate(zone.owner, data), zone.find(zone.owner, data)):
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"] == "application/json"
    assert json.loads(zone.find(None, data).body)["error"]


def test_the_address_follows_the_one_that_was_used(zone: Zone) -> None:
    data = fresh()
    body = {"type": "initiateFileUploadRequest", "size": len(data), "hashAlg": "sha1", "hash": sha1_of(data)}
    body |= {"zoneName": zone.name, "workToken": ""}
    given = {"Authorization": f"Bearer {zone.owner}", "Host": f"localhost:{zone.hub.port}"}
    url = zone.hub.post("/api/initiateFileUpload", body, **given).json()["signedUploadUrl"]
    assert urlsplit(url).netloc == f"localhost:{zone.hub.port}"
