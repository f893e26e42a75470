"""The six bands of a channel, and who may publish and subscribe on each (spec/pubsub-bands.md section 1).

A band carries the name of the role whose holders publish on it; holders of its opposite subscribe to it.
"""

from __future__ import annotations

from typing import Literal

from kachery_lab.core.roles import Role
from kachery_lab.errors import InvalidInput

Right = Literal["publish", "subscribe"]

_PAIRS = {
    "Files": (Role.REQUEST_FILES, Role.PROVIDE_FILES),
    "Feeds": (Role.REQUEST_FEEDS, Role.PROVIDE_FEEDS),
    "Tasks": (Role.REQUEST_TASKS, Role.PROVIDE_TASKS),
}

_ROLES: dict[tuple[str, Right], Role] = {}
for _noun, (_request, _provide) in _PAIRS.items():
    _ROLES[f"request{_noun}", "publish"] = _ROLES[f"provide{_noun}", "subscribe"] = _request
    _ROLES[f"provide{_noun}", "publish"] = _ROLES[f"request{_noun}", "subscribe"] = _provide

BANDS = tuple(f"{side}{noun}" for noun in _PAIRS for side in ("request", "provide"))
"""All six, in the order of the older hub's certificates."""


def band_name(channel: str, band: str) -> str:
    """The name of a band on the wire. Raises InvalidInput for what is no band."""
    if band not in BANDS:
        raise InvalidInput(f"band: expected one of {', '.join(BANDS)}")
    return f"{channel}-{band}"


def role_for(band: str, right: Right) -> Role:
    """The role that gives a right on a band."""
    return _ROLES[band, right]


def rights(roles: Role) -> dict[str, tuple[Right, ...]]:
    """What roles allow, by band; bands without rights are left out."""
    found: dict[str, tuple[Right, ...]] = {}
    for noun, (request, provide) in _PAIRS.items():
        asking: tuple[Right, ...] = ()
        answering: tuple[Right, ...] = ()
        if roles & request:
            asking, answering = (*asking, "publish"), (*answering, "subscribe")
        if roles & provide:
            asking, answering = (*asking, "subscribe"), (*answering, "publish")
        if asking:
            found[f"request{noun}"] = asking
            found[f"provide{noun}"] = answering
    return found


def capability(channel: str, roles: Role) -> dict[str, list[str]]:
    """`ablyCapability` of a delegation certificate: rights by band name."""
    return {band_name(channel, band): list(allowed) for band, allowed in rights(roles).items()}
