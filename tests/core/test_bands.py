from __future__ import annotations

import json
from pathlib import Path

import pytest

from kachery_lab.core.bands import BANDS, band_name, capability, rights
from kachery_lab.core.roles import NAMES, Role
from kachery_lab.errors import InvalidInput

EXCHANGES = json.loads((Path(__file__).parents[1] / "vectors" / "hub_exchanges.json").read_text("utf-8"))["exchanges"]

# Published by nodes with, subscribed by nodes with (the table of the older daemon's documents).
TABLE = {
    "requestFiles": ("requestFiles", "provideFiles"),
    "provideFiles": ("provideFiles", "requestFiles"),
    "requestFeeds": ("requestFeeds", "provideFeeds"),
    "provideFeeds": ("provideFeeds", "requestFeeds"),
    "requestTasks": ("requestTasks", "provideTasks"),
    "provideTasks": ("provideTasks", "requestTasks"),
}


def test_names() -> None:
    assert set(BANDS) == set(TABLE)
    assert len(BANDS) == 6
    assert max(len(band_name("c" * 27, band)) for band in BANDS) == 40
    with pytest.raises(InvalidInput):
        band_name("chan", "requestfiles")


@pytest.mark.parametrize("bits", range(64))
def test_every_set_of_roles_has_exactly_the_rights_of_the_table(bits: int) -> None:
    roles = Role(bits)
    expected = {}
    for band, (publisher, subscriber) in TABLE.items():
        allowed = {"publish"} if roles & NAMES[publisher] else set()
        allowed |= {"subscribe"} if roles & NAMES[subscriber] else set()
        if allowed:
            expected[band] = allowed
    found = rights(roles)
    assert {band: set(allowed) for band, allowed in found.items()} == expected
    assert all(len(set(allowed)) == len(allowed) for allowed in found.values())


def test_the_capability_of_all_roles_is_the_recorded_one() -> None:
    recorded = next(
        exchange["response"]["json"]["cert"]["payload"]["attributes"]["ablyCapability"]
        for exchange in EXCHANGES
        if exchange["request"].get("json", {}).get("body", {}).get("type") == "getBitwooderCertForChannel"
    )
    assert json.dumps(capability("testchan", Role.ALL)) == json.dumps(recorded)
    assert capability("testchan", Role.NONE) == {}
