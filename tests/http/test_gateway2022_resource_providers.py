"""WebSocket `/p/{token}`: what a provider is asked, what its word counts, and what happens when it does not answer."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from kachery_lab.core.ids import UserName
from kachery_lab.core.roles import Role
from kachery_lab.services import resource_providers, resources
from kachery_lab.services.principals import OPERATOR
from tests import resource_providers as providers
from tests.gateway import CloudClient
from tests.hubs import Hub, path_of, sha1_of
from tests.resource_providers import SECONDS, WITH_DIRECTORY, Reader, all_gone, providing
from tests.zones import Zone

hub, zone, reader, data = providers.hub, providers.zone, providers.reader, providers.data


# -- a file is asked for ---------------------------------------------------------------------------------------------


def test_a_file_is_uploaded_when_it_is_asked_for(zone: Zone, reader: Reader, data: bytes) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        assert zone.find(zone.reader, data).json()["found"] is False
        asked = reader.begin(data)
        wanted = line.wanted()
        assert set(wanted) == {"type", "requestId", "resourceName", "zone", "request", "timeoutMsec"}
        assert (wanted["resourceName"], wanted["zone"]) == (zone.name, zone.name)
        assert set(wanted["request"]) == {"type", "uri", "timeoutMsec"}
        assert wanted["request"]["uri"] == f"sha1://{sha1_of(data)}"
        assert wanted["request"]["timeoutMsec"] == resource_providers.ANSWER_SECONDS * 1000
        zone.upload(zone.writer, data)
        line.status(wanted, "completed", size=1, bytesUploaded=1, timestampCompleted=0)
        assert asked.result(SECONDS) == {"status": "completed", "size": 1000, "bytesUploaded": 1000}
        assert zone.hub.get(zone.url(zone.reader, data)).body == data
        assert reader.status(data) == {"status": "completed", "size": 1000}


def test_a_public_zone(hub: Hub, data: bytes) -> None:
    public = Zone(hub, public=True)
    with providing(hub, public.writer, public.name) as line, Reader(hub, public.name, None) as anybody:
        asked = anybody.begin(data)
        public.upload(public.writer, data)
        line.status(line.wanted(), "completed")
        assert asked.result(SECONDS)["status"] == "completed"


def test_a_provider_that_names_no_zone(hub: Hub, data: bytes) -> None:
    """It is for `default`, and knows no field `zone`."""
    owner = UserName(hub.node.data.channel("default").owner)
    admin = hub.call(hub.node.tokens.create(OPERATOR, owner, ["read", "write"]))[1]
    with (
        providing(hub, admin, "default", zone=None, proxySecret=None) as line,
        Reader(hub, "default", admin) as reader,
    ):
        asked = reader.begin(data)
        wanted = line.wanted()
        assert "zone" not in wanted
        line.status(wanted, "not-found")
        assert asked.result(SECONDS) == {"status": "not-found"}


def test_its_word_is_not_believed(zone: Zone, reader: Reader, data: bytes) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        asked = reader.begin(data)
        line.status(line.wanted(), "completed", size=1000, bytesUploaded=1000)
        found = asked.result(SECONDS)
        assert found["status"] == "error"
        assert "does not have it" in found["error"]
        assert "KACHERY_ZONE" in found["error"]
        assert zone.find(zone.reader, data).json()["found"] is False
        # The same after it sent other bytes than it was asked for, or did not finish.
        asked = reader.begin(data)
        wanted = line.wanted()
        assert zone.put(zone.announced(data, zone.writer), data[::-1]).status == 422
        zone.announced(data, zone.writer)
        line.status(wanted, "completed")
        assert asked.result(SECONDS)["status"] == "error"


def test_what_it_says_is_passed_on(zone: Zone, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "ASK_AGAIN_SECONDS", 0.01)
    with providing(zone.hub, zone.writer, zone.name) as line:
        for state in ("not-found", "queued", "running"):
            asked = reader.begin(os.urandom(20))
            line.status(line.wanted(), state, size=10**30, more="x")
            assert asked.result(SECONDS) == {"status": state}
        asked = reader.begin(os.urandom(20))
        line.status(line.wanted(), "error", error="exit code 1\x1b[31m")
        assert asked.result(SECONDS) == {"status": "error", "error": "the provider says 'exit code 1\\x1b[31m'"}
        asked = reader.begin(os.urandom(20))
        line.respond(line.wanted(), {}, error="x" * 5000)
        found = asked.result(SECONDS)
        assert (found["status"], len(found["error"]) < 300) == ("error", True)


def test_one_request_for_many_who_ask(zone: Zone, reader: Reader, data: bytes) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        asked = [reader.begin(data) for _ in range(10)]
        wanted = line.wanted()
        other = os.urandom(20)
        zone.upload(zone.writer, data)
        # Whoever asks now is not made to wait for its answer.
        assert reader.status(data) == {"status": "completed", "size": 1000}
        last = reader.begin(other)
        assert line.wanted()["request"]["uri"] == f"sha1://{sha1_of(other)}", "the file was asked for twice"
        line.status(wanted, "completed")
        assert {one.result(SECONDS)["status"] for one in asked} == {"completed"}
        assert not last.done()


def test_at_work_means_not_asked_again(zone: Zone, reader: Reader, data: bytes) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        assert reader.status(data, 0) == {"status": "running"}
        wanted = line.wanted()
        line.status(wanted, "queued")
        other = os.urandom(20)
        until = time.monotonic() + SECONDS
        while reader.status(data, 0) != {"status": "queued"}:
            assert time.monotonic() < until
        reader.status(other, 0)
        assert line.wanted()["request"]["uri"] == f"sha1://{sha1_of(other)}"
        line.say(type="ping")
        line.status(wanted, "completed")
        zone.upload(zone.writer, data)
        assert reader.status(data)["status"] == "completed"


def test_a_directory_comes_first(hub: Hub, data: bytes) -> None:
    hub.make_channel(WITH_DIRECTORY, public=True)
    hub.join(hub.node.identity.node_id, WITH_DIRECTORY, Role.PROVIDE_FILES)
    (hub.storage.parent / "old" / "sha1" / sha1_of(data)).write_bytes(data)
    boss = hub.call(hub.node.tokens.create(OPERATOR, UserName("boss"), ["write"]))[1]
    with providing(hub, boss, WITH_DIRECTORY) as line, Reader(hub, WITH_DIRECTORY, None) as reader:
        assert reader.status(data)["status"] == "completed"
        other = os.urandom(20)
        asked = reader.begin(other)
        wanted = line.wanted()
        assert wanted["request"]["uri"] == f"sha1://{sha1_of(other)}"
        line.status(wanted, "not-found")
        assert asked.result(SECONDS) == {"status": "not-found"}


def test_what_was_deleted_is_not_asked_for(zone: Zone, reader: Reader, data: bytes) -> None:
    zone.upload(zone.writer, data)
    zone.hub.call(zone.hub.node.channels.remove_object(OPERATOR, zone.name, path_of(data)))
    with providing(zone.hub, zone.writer, zone.name) as line:
        assert reader.status(data) == {"status": "not-found"}
        other = os.urandom(20)
        reader.status(other, 0)
        assert line.wanted()["request"]["uri"] == f"sha1://{sha1_of(other)}"


def test_only_a_resource_request_asks(zone: Zone, reader: Reader, data: bytes) -> None:
    """Who looks for a file, or uploads it, does not wait for a provider."""
    with providing(zone.hub, zone.writer, zone.name) as line:
        assert zone.find(zone.reader, data).json()["found"] is False
        assert zone.hub.get(f"/sha1/{sha1_of(data)}").status == 404
        zone.upload(zone.writer, data)
        other = os.urandom(20)
        reader.status(other, 0)
        assert line.wanted()["request"]["uri"] == f"sha1://{sha1_of(other)}"


def test_it_is_seen(hub: Hub, data: bytes) -> None:
    public = Zone(hub, public=True)

    def info() -> Any:
        return hub.post("/api/gateway", CloudClient().envelope("getResourceInfo", resourceName=public.name)).json()

    def shown() -> Any:
        answer = hub.get(f"/api/admin/v1/channels/{public.name}", Authorization=f"Bearer {admin}")
        return answer.json()["resourceProvider"]

    admin = hub.call(hub.node.tokens.create(OPERATOR, public.user("boss"), ["admin"]))[1]
    assert (info()["found"], shown()) == (False, None)
    with providing(hub, public.writer, public.name):
        assert info()["found"] is True
        assert shown() == f"user:{public.user('writer')} at 127.0.0.1"
    all_gone(hub)
    assert shown() is None
    with Reader(hub, public.name, None) as reader:
        assert reader.status(data) == {"status": "not-found"}


# -- it does not answer ----------------------------------------------------------------------------------------------


def test_a_provider_that_goes(zone: Zone, reader: Reader, data: bytes) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        asked = reader.begin(data)
        line.wanted()
    found = asked.result(SECONDS)
    assert found["status"] == "error"
    assert "disconnected before it answered" in found["error"]
    with providing(zone.hub, zone.writer, zone.name) as line:
        asked = reader.begin(data)
        line.status(line.wanted(), "not-found")
        assert asked.result(SECONDS) == {"status": "not-found"}


def test_a_provider_that_never_answers(
    zone: Zone, reader: Reader, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with providing(zone.hub, zone.writer, zone.name) as line:
        assert reader.status(data, 100) == {"status": "running"}
        line.wanted()
        monkeypatch.setattr(resource_providers, "ANSWER_SECONDS", 0.2)
        monkeypatch.setattr(resource_providers, "GRACE_SECONDS", 0.1)
        found = reader.status(other := os.urandom(20))
        assert found["status"] == "error"
        assert "did not answer" in found["error"]
        late = line.wanted()
        line.status(late, "completed")
        line.status({"requestId": "unknown"}, "completed")
        monkeypatch.undo()
        asked = reader.begin(other)
        line.status(line.wanted(), "not-found")
        assert asked.result(SECONDS) == {"status": "not-found"}


def test_bounded_requests(zone: Zone, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource_providers, "MAX_WAITING", 2)
    monkeypatch.setattr(resources, "ASK_AGAIN_SECONDS", 0.01)
    with providing(zone.hub, zone.writer, zone.name) as line:
        assert [reader.status(os.urandom(20), 0)["status"] for _ in range(2)] == ["running"] * 2
        assert reader.status(os.urandom(20)) == {"status": "queued"}
        line.status(line.wanted(), "not-found")
        line.status(line.wanted(), "not-found")
        asked = reader.begin(os.urandom(20))
        line.status(line.wanted(), "not-found")
        assert asked.result(SECONDS) == {"status": "not-found"}
        monkeypatch.setattr(resources, "MOST_ASKED", 0)
        assert reader.status(os.urandom(20)) == {"status": "queued"}
