"""Quotas, usage and search: what is counted when, who sees it, and what is freed."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from kachery_lab.core.ids import Sha1
from kachery_lab.core.roles import Role
from kachery_lab.services import pending
from kachery_lab.services.principals import OPERATOR
from kachery_lab.services.subjects import Subject
from kachery_lab.services.usage import today
from tests.faults.report import wait_for
from tests.hubs import Hub, LabNode, path_of, sha1_of
from tests.servers import Answer
from tests.zones import Zone, fresh

ADMIN = "/api/admin/v1"


@pytest.fixture
def admin(hub: Hub) -> str:
    return (hub.storage.parent / "metadata" / "admin-token").read_text().strip()


def call(hub: Hub, key: str, method: str, path: str, body: Any = None) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    return hub.request(method, ADMIN + path, data, {"Authorization": f"Bearer {key}"})


def held(zone: Zone, name: str = "owner") -> tuple[int, int]:
    """(Objects, bytes) that count for one of the zone's people."""
    _, found = zone.hub.call(zone.hub.node.quotas.get(OPERATOR, f"user:{zone.user(name)}"))
    return found.objects, found.bytes


def set_quota(zone: Zone, name: str, size: int | None, count: int | None) -> None:
    zone.hub.call(zone.hub.node.quotas.set(OPERATOR, f"user:{zone.user(name)}", size, count))


# -- quotas ------------------------------------------------------------------------------------------------------------


def test_a_zone_refuses_at_the_announcement_what_does_not_fit(hub: Hub) -> None:
    zone = Zone(hub, max_bytes=10_000)
    first = fresh(6000)
    url = zone.initiate(zone.owner, first).json()["signedUploadUrl"]
    # Announced is taken, before a byte has come.
    refused = zone.initiate(zone.owner, fresh(4001))
    assert refused.status == 507
    assert "10000" in refused.json()["error"]
    assert "6000 are taken" in refused.json()["error"]
    assert zone.initiate(zone.owner, fresh(4000)).status == 200
    assert zone.initiate(zone.owner, first).status == 200
    assert zone.put(url, first).status == 200
    assert zone.finalize(zone.owner, first).status == 200
    assert held(zone) == (2, 10_000)
    assert zone.initiate(zone.owner, b"x").status == 507


def test_objects_are_counted_too(hub: Hub) -> None:
    zone = Zone(hub, max_objects=2)
    for _ in range(2):
        zone.upload(zone.owner, fresh())
    refused = zone.initiate(zone.owner, b"one more")
    assert (refused.status, "2 objects" in refused.json()["error"]) == (507, True)
    hub.call(hub.node.channels.update(OPERATOR, zone.name, {"max_objects": 3}))
    assert zone.initiate(zone.owner, b"one more").status == 200


def test_a_user_s_quota_spans_zones(hub: Hub) -> None:
    zone, second = Zone(hub), Zone(hub)
    second.user = zone.user  # type: ignore[method-assign]
    second.grant("owner", Role.ALL)
    set_quota(zone, "owner", 10_000, None)
    zone.upload(zone.owner, fresh(6000))
    refused = second.initiate(zone.owner, fresh(4001))
    assert (refused.status, f"user:{zone.user('owner')}" in refused.json()["error"]) == (507, True)
    # Others are not affected.
    assert zone.initiate(zone.writer, fresh(4001)).status == 200
    second.upload(zone.owner, fresh(4000))
    assert held(zone) == (2, 10_000)
    set_quota(zone, "owner", None, None)
    assert zone.initiate(zone.owner, fresh(4001)).status == 200


def test_the_keys_of_a_user_count_for_the_user(hub: Hub) -> None:
    zone = Zone(hub)
    node = LabNode()
    hub.call(hub.node.clients.add(OPERATOR, node.id, zone.user("owner"), "rig"))
    set_quota(zone, "owner", 5000, None)
    files, key = hub.node.channel_files, zone.name
    data = fresh(3000)
    assert hub.call(files.announce(key, Sha1(sha1_of(data)), 3000, Subject("client", node.id))).exists is False
    assert held(zone) == (1, 3000)
    assert zone.initiate(zone.owner, fresh(2001)).status == 507
    assert zone.initiate(zone.owner, fresh(2000)).status == 200


def test_what_is_never_finished_is_freed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(hub, max_bytes=10_000)
    data = fresh(6000)
    url = zone.initiate(zone.owner, data).json()["signedUploadUrl"]
    assert zone.put(url, data).status == 200
    assert zone.initiate(zone.owner, fresh(6000)).status == 507
    monkeypatch.setattr(pending, "_now", lambda: int(time.time() * 1000) + 2 * pending.SECONDS * 1000)
    assert zone.finalize(zone.owner, data).status == 409
    assert zone.put(url, data).status == 403
    assert zone.initiate(zone.owner, fresh(6000)).status == 200
    assert held(zone) == (1, 6000)


def test_the_hourly_work_frees_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(hub)
    zone.initiate(zone.owner, fresh(6000))
    assert hub.call(hub.node.pending.purge()) == 0
    assert held(zone) == (1, 6000)
    monkeypatch.setattr(pending, "_now", lambda: int(time.time() * 1000) + 2 * pending.SECONDS * 1000)
    assert hub.call(hub.node.pending.purge()) >= 1
    assert held(zone) == (0, 0)


def test_an_upload_on_its_way_does_not_expire(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    zone, data = Zone(hub), fresh(60_000)
    url = zone.initiate(zone.owner, data).json()["signedUploadUrl"]

    def later() -> None:
        wait_for(lambda: bool(hub.node.pending._arriving), "the upload is on its way")
        monkeypatch.setattr(pending, "_now", lambda: int(time.time() * 1000) + 2 * pending.SECONDS * 1000)
        hub.call(hub.node.pending.purge())
        monkeypatch.undo()
        assert held(zone) == (1, len(data))

    assert hub.request("PUT", url, data, before_end=later).status == 200
    assert zone.finalize(zone.owner, data).status == 200


def test_too_many_announcements(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(hub)
    monkeypatch.setattr(pending, "MOST", 5)
    data = [fresh() + bytes([n]) for n in range(6)]
    assert [zone.initiate(zone.owner, one).status for one in data] == [200] * 5 + [429]
    assert zone.initiate(zone.owner, data[0]).status == 200
    assert zone.initiate(zone.writer, data[5]).status == 200
    zone.upload(zone.owner, data[0])
    assert zone.initiate(zone.owner, data[5]).status == 200


def test_deleting_frees_and_restoring_takes(hub: Hub) -> None:
    zone, data = Zone(hub, max_bytes=10_000), fresh(6000)
    zone.upload(zone.owner, data)
    hub.call(hub.node.channels.remove_object(OPERATOR, zone.name, path_of(data)))
    assert held(zone) == (0, 0)
    other = fresh(6000)
    zone.upload(zone.owner, other)
    path = f"/channels/{zone.name}/deletions/{quote(path_of(data), safe='')}/restore"
    admin = hub.call(hub.node.tokens.create(OPERATOR, zone.user("boss"), ["admin"]))[1]
    assert call(hub, admin, "POST", path).status == 507
    hub.call(hub.node.channels.remove_object(OPERATOR, zone.name, path_of(other)))
    assert call(hub, admin, "POST", path).status == 200
    assert held(zone) == (1, 6000)
    assert call(hub, admin, "POST", path).status == 404


def test_what_is_counted_survives_a_replay(hub: Hub) -> None:
    """The totals are those of the rows, whatever happened to these."""
    zone = Zone(hub)
    data = [fresh(1000 + n) for n in range(4)]
    for one in data:
        zone.upload(zone.writer, one)
    zone.upload(zone.owner, fresh(10))
    hub.call(hub.node.channels.remove_object(OPERATOR, zone.name, path_of(data[0])))
    hub.call(hub.node.channels.remove_object(OPERATOR, zone.name, path_of(data[1])))
    hub.call(hub.node.channels.restore_object(OPERATOR, zone.name, path_of(data[1])))
    objects = hub.call(hub.node.channels.objects(OPERATOR, zone.name, "", 100))
    assert held(zone, "writer") == (3, sum(one.size for one in objects if "writer" in one.principal))
    assert hub.call(hub.node.buckets.used(zone.name)) == sum(one.size for one in objects)
    hub.call(hub.node.channels.update(OPERATOR, zone.name, {"retention_days": 1}))
    assert hub.call(hub.node.buckets.expire()) == 0
    assert held(zone, "writer")[0] == 3


def test_the_endpoints_of_quotas(hub: Hub, admin: str) -> None:
    zone = Zone(hub)
    subject = f"/quotas/user:{zone.user('owner')}"
    assert call(hub, admin, "DELETE", subject).status == 404
    answer = call(hub, admin, "PUT", subject, {"maxBytes": 5000, "maxObjects": None})
    assert answer.json() == {"subject": f"user:{zone.user('owner')}", "maxBytes": 5000, "maxObjects": None}
    zone.upload(zone.owner, fresh(3000))
    shown = call(hub, admin, "GET", subject).json()
    assert (shown["bytes"], shown["objects"], shown["maxBytes"]) == (3000, 1, 5000)
    assert shown["subject"] in [one["subject"] for one in call(hub, admin, "GET", "/quotas").json()["quotas"]]
    assert zone.initiate(zone.owner, fresh(2001)).status == 507
    assert call(hub, admin, "DELETE", subject).status == 204
    assert zone.initiate(zone.owner, fresh(2001)).status == 200
    for wrong in ("user:", "ann", "group:x", "user:" + "x" * 101):
        assert call(hub, admin, "PUT", f"/quotas/{wrong}", {"maxBytes": 1, "maxObjects": 1}).status == 400
    for body in ({}, {"maxBytes": -1, "maxObjects": None}, {"maxBytes": "1", "maxObjects": None}):
        assert call(hub, admin, "PUT", subject, body).status == 400


# -- usage and search --------------------------------------------------------------------------------------------------


def test_uploads_are_found(hub: Hub, admin: str) -> None:
    zone = Zone(hub)
    labels = ["session_1%.nwb", "session 2.nwb", "ä \U0001f9e0", ""]
    data = [fresh() + bytes([n]) for n in range(4)]
    for one, label in zip(data, labels, strict=True):
        made = zone.initiate(zone.writer, one, label=label).json()
        assert zone.put(made["signedUploadUrl"], one).status == 200
        assert zone.finalize(zone.writer, one).status == 200
    zone.upload(zone.owner, fresh())

    def search(key: str = admin, **query: Any) -> list[dict[str, Any]]:
        answer = call(hub, key, "GET", f"/uploads?{urlencode({'channel': zone.name, **query})}")
        assert answer.status == 200, answer
        return list(answer.json()["uploads"])

    everything = search()
    assert len(everything) == 5
    assert [one["storedAt"] for one in everything] == sorted((one["storedAt"] for one in everything), reverse=True)
    mine = search(principal=f"user:{zone.user('writer')}")
    assert [one["label"] for one in mine] == labels[::-1]
    assert [one["sha1"] for one in mine] == [sha1_of(one) for one in data[::-1]]
    for text, found in (("session", 2), ("_1%", 1), ("%", 1), ("session%nwb", 0), ("\U0001f9e0", 1)):
        assert len(search(label=text)) == found, text
    assert [one["label"] for one in search(sha1=sha1_of(data[1]))] == [labels[1]]
    assert len(search(since=mine[-1]["storedAt"])) == 5
    assert search(until=mine[-1]["storedAt"] - 1) == []
    pages, before = [], ""
    while True:
        answer = call(hub, admin, "GET", f"/uploads?{urlencode({'channel': zone.name, 'limit': 2, 'before': before})}")
        pages += answer.json()["uploads"]
        before = answer.json()["next"]
        if before is None:
            break
    assert pages == everything
    for wrong in ("before=x", "before=1/2", "sha1=x", "since=x", "limit=0", "unknown=1", "label=a&label=b"):
        assert call(hub, admin, "GET", f"/uploads?{wrong}").status == 400, wrong
    owner = hub.call(hub.node.tokens.create(OPERATOR, zone.user("owner"), ["channel-owner"]))[1]
    assert call(hub, owner, "GET", "/uploads").json()["uploads"] == []
    assert call(hub, owner, "GET", f"/uploads?channel={zone.name}").status == 404
    hub.call(hub.node.channels.update(OPERATOR, zone.name, {"owner": zone.user("owner")}))
    assert search(owner) == everything
    assert call(hub, owner, "GET", "/uploads").json()["uploads"] == everything


def test_usage_by_zone_user_and_day(hub: Hub, admin: str) -> None:
    zone, second = Zone(hub, public=True), Zone(hub)
    data, other = fresh(5000), fresh(700)
    zone.upload(zone.writer, data)
    second.upload(second.owner, other)
    assert hub.get(zone.url(None, data)).status == 200
    assert hub.get(zone.url(None, data), Range="bytes=0-99").status == 206
    assert hub.request("HEAD", zone.url(None, data)).status == 200
    assert hub.get(zone.url(None, data), **{"If-None-Match": "*"}).status == 304
    assert hub.get(second.url(second.reader, other)).status == 200
    nothing = {"uploads": 0, "bytesUploaded": 0, "downloads": 0, "bytesDownloaded": 0}

    def rows(key: str = admin, **query: str) -> dict[tuple[str, str | None], dict[str, Any]]:
        answer = call(hub, key, "GET", f"/usage?{urlencode(query)}")
        assert answer.status == 200, answer
        found = {}
        for row in answer.json()["usage"]:
            assert row.pop("day") == today()
            found[row.pop("channel"), row.pop("principal")] = row
        return found

    assert rows(channel=zone.name) == {
        (zone.name, f"user:{zone.user('writer')}"): {**nothing, "uploads": 1, "bytesUploaded": 5000},
        (zone.name, None): {**nothing, "downloads": 2, "bytesDownloaded": 5100},
    }
    assert rows(principal=f"user:{second.user('reader')}") == {
        (second.name, f"user:{second.user('reader')}"): {**nothing, "downloads": 1, "bytesDownloaded": 700}
    }
    assert rows(channel=zone.name, until="2020-01-01") == {}
    assert rows(channel=zone.name, since=today(), until=today())
    first = call(hub, admin, "GET", f"/usage?channel={zone.name}&limit=1").json()
    after = quote(first["next"], safe="")
    then = call(hub, admin, "GET", f"/usage?channel={zone.name}&limit=1&after={after}").json()
    assert first["usage"][0]["principal"] is None
    assert then["usage"][0]["principal"] == f"user:{zone.user('writer')}"
    for wrong in ("since=yesterday", "after=x", "unknown=1"):
        assert call(hub, admin, "GET", f"/usage?{wrong}").status == 400
    asked = zone.ask("usage", zone.writer, userId=zone.user("writer")).json()["userZoneDayUsages"]
    assert asked == [
        {
            "day": today(),
            "zoneName": zone.name,
            "userId": zone.user("writer"),
            "numDownloads": 0,
            "numUploads": 1,
            "numBytesDownloaded": 0,
            "numBytesUploaded": 5000,
        }
    ]
    assert zone.ask("usage", zone.other, userId=zone.user("writer")).status == 403
