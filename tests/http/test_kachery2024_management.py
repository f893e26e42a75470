"""The API of kachery 2: users and zones."""

from __future__ import annotations

from typing import Any

import pytest

from kachery_lab.core.roles import Role
from kachery_lab.services.principals import OPERATOR
from tests.servers import Answer
from tests.zones import Zone, fresh


@pytest.fixture
def admin(zone: Zone) -> str:
    return zone.token("boss", "admin")


@pytest.fixture
def manager(zone: Zone) -> str:
    """A token of the zone's owner that may manage it."""
    zone.hub.call(zone.hub.node.channels.update(OPERATOR, zone.name, {"owner": zone.user("owner")}))
    return zone.token("owner", "channel-owner", "read", "write")


def good(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    found: dict[str, Any] = answer.json()
    return found


# -- users -------------------------------------------------------------------------------------------------------------


def test_a_user_and_what_it_says_of_itself(zone: Zone, admin: str) -> None:
    name = zone.user("github|new")
    assert zone.ask("addUser", zone.other, userId=name).status == 403
    assert good(zone.ask("addUser", admin, userId=name)) == {"type": "addUserResponse"}
    assert zone.ask("addUser", admin, userId=name).status == 409
    empty = {"userId": name, "name": "", "email": "", "researchDescription": "", "apiKey": ""}
    assert good(zone.ask("getUser", admin, userId=name)) == {"type": "getUserResponse", "user": empty}
    told = {"name": "Änn", "email": "ann@example.org", "researchDescription": "spikes\nand more"}
    own = zone.token("github|new")
    assert good(zone.ask("setUserInfo", own, userId=name, **told)) == {"type": "setUserInfoResponse"}
    assert good(zone.ask("setUserInfo", own, userId=name, name="Ann")) == {"type": "setUserInfoResponse"}
    assert good(zone.ask("getUser", own, userId=name))["user"] == {**empty, **told, "name": "Ann"}
    for field, value in (("name", "x" * 201), ("email", "x" * 201), ("researchDescription", "x" * 2001), ("name", 5)):
        assert zone.ask("setUserInfo", own, userId=name, **{field: value}).status == 400
    assert good(zone.ask("getUser", own, userId=name))["user"]["name"] == "Ann"
    for kind, fields in (("getUser", {}), ("setUserInfo", {"name": "Eve"}), ("computeUserStats", {})):
        assert zone.ask(kind, zone.other, userId=name, **fields).status == 403
        assert zone.ask(kind, None, userId=name, **fields).status == 401
    assert zone.ask("getUser", admin, userId="nobody").status == 404
    assert name in [one["userId"] for one in good(zone.ask("getUsers", admin))["users"]]
    assert zone.ask("getUsers", own).status == 403
    stats = good(zone.ask("computeUserStats", own, userId=name))
    assert stats == {"type": "computeUserStatsResponse", "userStats": {"userId": name}}


def test_an_api_key_is_made_anew(zone: Zone, admin: str) -> None:
    name, data = zone.user("owner"), fresh()
    first = good(zone.ask("resetUserApiKey", zone.owner, userId=name))["apiKey"]
    assert good(zone.ask("getUser", first, userId=name))["user"]["apiKey"] == "********"
    zone.upload(first, data)
    second = good(zone.ask("resetUserApiKey", first, userId=name))["apiKey"]
    assert zone.find(first, data).status == 401
    assert zone.find(second, data).json()["found"] is True
    third = good(zone.ask("resetUserApiKey", admin, userId=name))["apiKey"]
    assert zone.find(second, data).status == 401
    assert zone.find(third, data).json()["found"] is True
    # Other tokens of the user stay.
    assert zone.find(zone.owner, data).json()["found"] is True
    assert zone.ask("resetUserApiKey", zone.other, userId=name).status == 403


def test_an_api_key_may_do_no_more_than_the_token_that_asked(zone: Zone) -> None:
    name, data = zone.user("owner"), fresh()
    zone.upload(zone.owner, data)
    reads = zone.token("owner", "read")
    key = good(zone.ask("resetUserApiKey", reads, userId=name))["apiKey"]
    assert zone.find(key, data).json()["found"] is True
    assert zone.initiate(key, fresh()).status == 403
    narrow = zone.token("owner", "read", "write", channels=["default"])
    key = good(zone.ask("resetUserApiKey", narrow, userId=name))["apiKey"]
    assert zone.find(key, data).status == 403
    for scope in ("metrics", "channel-owner", "client"):
        assert zone.ask("resetUserApiKey", zone.token("owner", scope), userId=name).status == 403
    key = good(zone.ask("resetUserApiKey", zone.owner, userId=name))["apiKey"]
    assert zone.initiate(key, fresh()).status == 200


# -- zones -------------------------------------------------------------------------------------------------------------


def test_a_zone_from_its_making_to_its_end(zone: Zone, admin: str) -> None:
    name, owner = f"{zone.name}.new", zone.user("maker")
    manager = zone.token("maker", "channel-owner", "read", "write")
    assert zone.ask("addZone", zone.token("maker"), zoneName=name, userId=owner).status == 403
    assert zone.ask("addZone", manager, zoneName=name, userId=zone.user("other")).status == 403
    assert good(zone.ask("addZone", manager, zoneName=name, userId=owner)) == {"type": "addZoneResponse"}
    assert zone.ask("addZone", admin, zoneName=name, userId=owner).status == 409
    shown = {"zoneName": name, "userId": owner, "users": [], "publicDownload": False, "publicUpload": False}
    assert good(zone.ask("getZone", manager, zoneName=name)) == {"type": "getZoneResponse", "zone": shown}
    assert good(zone.ask("getZones", manager, userId=owner))["zones"] == [shown]
    for key in (None, zone.other):
        assert zone.ask("getZone", key, zoneName=name).status == 404
        assert name not in [one["zoneName"] for one in good(zone.ask("getZones", key))["zones"]]
    users = [
        {"userId": zone.user("writer"), "admin": False, "uploadFiles": True, "downloadFiles": False},
        {"userId": zone.user("reader"), "admin": False, "uploadFiles": False, "downloadFiles": True},
    ]
    assert good(zone.ask("setZoneInfo", manager, zoneName=name, users=users)) == {"type": "setZoneInfoResponse"}
    assert good(zone.ask("getZone", manager, zoneName=name))["zone"]["users"] == sorted(
        users, key=lambda u: u["userId"]
    )
    assert good(zone.ask("getZone", zone.reader, zoneName=name))["zone"]["users"] == []
    data = fresh()
    made = zone.initiate(zone.writer, data, zoneName=name)
    assert made.status == 200
    assert zone.put(made.json()["signedUploadUrl"], data).status == 200
    assert zone.finalize(zone.writer, data, zoneName=name).status == 200
    assert zone.find(zone.reader, data, zoneName=name).json()["found"] is True
    assert zone.find(None, data, zoneName=name).status == 401
    assert good(zone.ask("setZoneInfo", manager, zoneName=name, publicDownload=True))
    assert zone.find(None, data, zoneName=name).json()["found"] is True
    assert good(zone.ask("getZone", None, zoneName=name))["zone"]["publicDownload"] is True
    assert good(zone.ask("setZoneInfo", manager, zoneName=name, users=[], publicDownload=False))
    assert zone.find(zone.reader, data, zoneName=name).status == 403
    for key in (zone.other, zone.reader, zone.token("maker")):
        assert zone.ask("deleteZone", key, zoneName=name).status == 403
    assert good(zone.ask("deleteZone", manager, zoneName=name)) == {"type": "deleteZoneResponse"}
    assert zone.ask("getZone", admin, zoneName=name).status == 404


def test_other_roles_of_users_stay(zone: Zone, manager: str) -> None:
    zone.grant("reader", Role.REQUEST_FILES | Role.PROVIDE_FEEDS)
    assert good(zone.ask("setZoneInfo", manager, zoneName=zone.name, users=[]))
    granted = {name: roles for _, name, roles in zone.hub.node.authorizations.granted(OPERATOR, zone.name)}
    files = Role.REQUEST_FILES | Role.PROVIDE_FILES
    assert granted == {zone.user("reader"): Role.PROVIDE_FEEDS, zone.user("owner"): Role.ALL & ~files}


def test_what_a_zone_here_cannot_be(zone: Zone, manager: str) -> None:
    for change in (
        {"publicUpload": True},
        {"bucketUri": "s3://bucket"},
        {"directory": "x"},
        {"credentials": "{}"},
        {"users": "all"},
        {"users": ["ann"]},
        {"users": [{"admin": True}]},
        {"users": [{"userId": zone.user("reader"), "admin": True}]},
        {"users": [{"userId": "a b"}]},
        {"publicDownload": "yes"},
    ):
        answer = zone.ask("setZoneInfo", manager, zoneName=zone.name, **change)
        assert (answer.status, list(answer.json())) == (400, ["error"]), change
    fine = {"publicUpload": False, "bucketUri": "", "users": [{"userId": zone.user("owner"), "admin": True}], "new": 1}
    assert good(zone.ask("setZoneInfo", manager, zoneName=zone.name, **fine))
    for key in (zone.other, zone.owner):
        assert zone.ask("setZoneInfo", key, zoneName=zone.name).status == 403
        assert zone.ask("setZoneInfo", key, zoneName="no-such-zone").status == 403
    assert zone.ask("setZoneInfo", None, zoneName=zone.name).status == 401
