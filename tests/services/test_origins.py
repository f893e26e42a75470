"""Origins that are in the log and not in the index yet count as known."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kachery_lab.core.ids import Sha1
from kachery_lab.errors import Unavailable
from kachery_lab.services import logs
from tests.hubs import Hub, sha1_of
from tests.zones import fresh

CHANNEL = "somebody/recordings"


def absent() -> bool:
    return False


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def slow_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "INDEX_SECONDS", 3600)


def test_known_before_and_after_it_is_indexed(hub: Hub) -> None:
    sha1, origins = Sha1(sha1_of(fresh())), hub.node.origins
    hub.call(origins.arriving_unless(sha1, CHANNEL, absent))
    assert origins._ahead
    assert hub.call(origins.of(sha1)) == {CHANNEL}
    hub.call(hub.node.records_log.drain())
    assert not origins._ahead
    assert hub.call(origins.of(sha1)) == {CHANNEL}


def test_what_was_here_before_stays_local(hub: Hub) -> None:
    sha1, origins = Sha1(sha1_of(fresh())), hub.node.origins
    hub.call(origins.arriving_unless(sha1, CHANNEL, lambda: True))
    assert hub.call(origins.of(sha1)) == {"local", CHANNEL}
    assert not origins._ahead


def test_a_volume_that_fails_refuses_one_and_no_other(hub: Hub) -> None:
    sha1, origins = Sha1(sha1_of(fresh())), hub.node.origins

    def failing() -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(Unavailable):
        hub.call(origins.arriving_unless(sha1, CHANNEL, failing))
    assert hub.call(origins.of(sha1)) == {"local"}
    assert not origins._ahead
    hub.call(origins.arriving_unless(sha1, CHANNEL, absent))
    assert hub.call(origins.of(sha1)) == {CHANNEL}
    hub.call(hub.node.records_log.drain())
