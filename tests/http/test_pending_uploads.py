"""Announced uploads over restarts and under limits that come later: what memory keeps, and what the database."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from kachery_lab.db.models import pending_uploads
from kachery_lab.services import pending
from kachery_lab.services.principals import OPERATOR
from tests.faults.report import wait_for
from tests.hubs import Hub, path_of
from tests.zones import Zone, fresh


def rows(hub: Hub) -> int:
    """How many unfinished uploads the database knows."""
    statement = select(func.count()).select_from(pending_uploads)
    return int(hub.node.database.read_sync(lambda conn: conn.execute(statement).scalar_one()))


def announced(zone: Zone, data: bytes, **changes: Any) -> str:
    """The path that the bytes are PUT to, on any hub of the same volume."""
    made = zone.initiate(zone.owner, data, **changes)
    assert made.status == 200, made.body
    return str(made.json()["signedUploadUrl"]).removeprefix(zone.hub.base)


@pytest.mark.parametrize(
    ("label", "limits", "written"),
    [("", {}, 0), ("trial 1", {}, 1), ("", {"max_bytes": 10_000}, 1)],
    ids=["by its ticket", "with a label", "under a limit"],
)
def test_a_restart_between_two_requests_does_not_matter(
    tmp_path: Path, label: str, limits: dict[str, int], written: int
) -> None:
    data = fresh()
    with Hub(tmp_path) as hub:
        zone = Zone(hub, **limits)
        path = announced(zone, data, label=label)
        assert rows(hub) == written
    with Hub(tmp_path) as hub:
        zone.hub = hub
        assert zone.finalize(zone.owner, data).status == 409
        assert zone.put(path, data[:-1] + b"x").status == 422
        assert zone.put(path, data).status == 200
        assert rows(hub) == 1
    with Hub(tmp_path) as hub:
        zone.hub = hub
        assert zone.finalize(zone.owner, data).status == 200
        assert rows(hub) == 0
        (shown,) = hub.call(hub.node.channels.objects(OPERATOR, zone.name, "", 10))
        assert (shown.path, shown.label) == (path_of(data), label)


def test_room_under_a_limit_is_held_over_a_restart(tmp_path: Path) -> None:
    first = fresh(6000)
    with Hub(tmp_path) as hub:
        zone = Zone(hub, max_bytes=10_000)
        path = announced(zone, first)
    with Hub(tmp_path) as hub:
        zone.hub = hub
        assert zone.initiate(zone.owner, fresh(4001)).status == 507
        assert zone.put(path, first).status == 200
        assert zone.finalize(zone.owner, first).status == 200
        assert zone.initiate(zone.owner, fresh(4000)).status == 200


def test_a_ticket_that_a_restart_outlives_is_under_the_limits_of_now(tmp_path: Path) -> None:
    data = fresh(6000)
    with Hub(tmp_path) as hub:
        zone = Zone(hub)
        path = announced(zone, data)
    with Hub(tmp_path) as hub:
        zone.hub = hub
        hub.call(hub.node.channels.update(OPERATOR, zone.name, {"max_bytes": 5000}))
        assert zone.put(path, data).status == 507
        hub.call(hub.node.channels.update(OPERATOR, zone.name, {"max_bytes": 6000}))
        assert zone.put(path, data).status == 200
        assert zone.finalize(zone.owner, data).status == 200


def test_what_has_expired_is_not_announced_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fresh()
    with Hub(tmp_path) as hub:
        zone = Zone(hub)
        path = announced(zone, data)
    with Hub(tmp_path) as hub:
        zone.hub = hub
        with monkeypatch.context() as later:
            later.setattr(pending, "_now", lambda: int(time.time() * 1000) + 2 * pending.SECONDS * 1000)
            assert zone.put(path, data).status == 403
        assert zone.put(path, data).status == 200


@pytest.mark.parametrize("whose", ["channel", "user"])
def test_a_limit_that_comes_later_counts_what_was_announced_before(hub: Hub, whose: str) -> None:
    zone, first = Zone(hub), fresh(6000)
    before = rows(hub)
    path = announced(zone, first)
    assert rows(hub) == before
    if whose == "channel":
        hub.call(hub.node.channels.update(OPERATOR, zone.name, {"max_bytes": 10_000}))
    else:
        hub.call(hub.node.quotas.set(OPERATOR, f"user:{zone.user('owner')}", 10_000, None))
    wait_for(lambda: rows(hub) == before + 1, "the database knows it")
    assert zone.initiate(zone.owner, fresh(4001)).status == 507
    assert zone.put(path, first).status == 200
    assert zone.finalize(zone.owner, first).status == 200
    assert zone.initiate(zone.owner, fresh(4001)).status == 507
    announced(zone, fresh(4000))


def test_nothing_is_left_of_what_is_finished(hub: Hub) -> None:
    zone, data, before = Zone(hub), fresh(), rows(hub)
    path = announced(zone, data)
    assert zone.put(path, data).status == 200
    # The same file on its way twice: what has arrived stays arrived, and takes its newer label.
    announced(zone, data, label="again")
    assert zone.finalize(zone.owner, data).status == 200
    assert zone.put(path, data).status == 200
    assert rows(hub) == before
    assert hub.node.pending.find(zone.name, path_of(data), f"user:{zone.user('owner')}") is None
    (shown,) = hub.call(hub.node.channels.objects(OPERATOR, zone.name, "", 10))
    assert shown.label == "again"


def test_a_channel_takes_its_announced_uploads_with_it(hub: Hub) -> None:
    zone, data = Zone(hub), fresh()
    path = announced(zone, data)
    hub.call(hub.node.channels.remove(OPERATOR, zone.name))
    assert hub.node.pending.find(zone.name, path_of(data), f"user:{zone.user('owner')}") is None
    assert zone.put(path, data).status == 403


def test_all_together_have_a_limit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    zone = Zone(hub)
    mine = fresh()
    announced(zone, mine)
    monkeypatch.setattr(pending, "MOST_OF_ALL", len(hub.node.pending._held))
    assert zone.initiate(zone.writer, fresh() + b"x").status == 429
    announced(zone, mine)
    zone.upload(zone.owner, mine)
    announced(zone, fresh() + b"x")
