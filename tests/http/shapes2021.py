"""What kachery-daemon 1.2.1 accepts as an answer of a hub: its strict validators, written from the documented rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]

_NAME = re.compile(r"(?=.{3,40}\Z)[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def text(value: Any) -> bool:
    return isinstance(value, str)


def boolean(value: Any) -> bool:
    return isinstance(value, bool)


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(value: Any) -> bool:
    return number(value) and value == int(value) and value >= 0


def anything(_value: Any) -> bool:
    return True


def hex_of(digits: int) -> Check:
    return lambda value: text(value) and re.fullmatch(f"[0-9a-fA-F]{{{digits}}}", value) is not None


def channel_name(value: Any) -> bool:
    return text(value) and _NAME.fullmatch(value) is not None


def user_id(value: Any) -> bool:
    return text(value) and len(value) <= 80


def node_label(value: Any) -> bool:
    return text(value) and len(value) <= 20


def passcode(value: Any) -> bool:
    return text(value) and 6 <= len(value) <= 40


def list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def record(
    required: Mapping[str, Check], optional: Mapping[str, Check] | None = None, *, closed: bool = False
) -> Check:
    """An object; an optional field may be absent and is never null."""

    def check(value: Any) -> bool:
        if not isinstance(value, dict) or any(name not in value for name in required):
            return False
        known = {**required, **(optional or {})}
        if closed and set(value) - set(known):
            return False
        return all(known[name](found) for name, found in value.items() if name in known)

    return check


node_id = hex_of(64)
roles = record({}, dict.fromkeys(("downloadFiles", "downloadFeeds", "downloadTaskResults"), boolean))
permissions = record(
    {},
    dict.fromkeys(
        ("requestFiles", "requestFeeds", "requestTasks", "provideFiles", "provideFeeds", "provideTasks"), boolean
    ),
)
node_authorization = record(
    {"channelName": channel_name, "nodeId": node_id, "permissions": permissions}, {"roles": roles}
)
membership = record(
    {"nodeId": node_id, "channelName": channel_name, "roles": roles},
    {
        "channelPasscodes": list_of(passcode),
        "validChannelPasscodes": list_of(passcode),
        "authorization": node_authorization,
        "channelResourceId": text,
        "channelBucketBaseUrl": text,
        "channelBucketUri": text,
    },
)
node_config = record(
    {"nodeId": node_id, "ownerId": user_id},
    {
        "channelMemberships": list_of(membership),
        "memberships": number,
        "lastNodeReport": record({"nodeId": node_id, "ownerId": user_id, "nodeLabel": node_label}),
        "lastNodeReportTimestamp": whole,
        "deleted": boolean,
    },
    closed=True,
)
channel_config = record(
    {"channelName": channel_name, "ownerId": user_id},
    {
        **dict.fromkeys(
            (
                "bitwooderResourceId",
                "bitwooderResourceKey",
                "bucketBaseUrl",
                "bucketUri",
                "googleServiceAccountCredentials",
                "ablyApiKey",
            ),
            text,
        ),
        "deleted": boolean,
        "authorizedNodes": list_of(node_authorization),
        "authorizedPasscodes": list_of(
            record({"channelName": channel_name, "passcode": passcode, "permissions": permissions})
        ),
    },
)
certificate = record(
    {
        "payload": record({"expires": number, "delegatedSignerId": hex_of(64)}, {"attributes": anything}, closed=True),
        "auth": record(
            {"signerId": hex_of(64), "signature": hex_of(128)}, {"delegationCertificate": anything}, closed=True
        ),
    },
    closed=True,
)
ANSWERS: dict[str, Check] = {
    "getNodeConfig": record({"found": boolean}, {"nodeConfig": node_config}, closed=True),
    "getChannelConfig": record({"found": boolean}, {"channelConfig": channel_config}, closed=True),
    "getBitwooderCertForChannel": record({"cert": certificate, "key": hex_of(64)}, closed=True),
}
