"""The six roles of a channel: request or provide, files or feeds or tasks.

A node asks for roles by its membership, the channel's owner grants them; what is both asked and granted is effective.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from kachery_lab.core.strict_json import shorten
from kachery_lab.errors import InvalidInput


class Role(enum.IntFlag):
    """A set of roles. The bits are what the database keeps; they never change their meaning."""

    NONE = 0
    REQUEST_FILES = 1
    REQUEST_FEEDS = 2
    REQUEST_TASKS = 4
    PROVIDE_FILES = 8
    PROVIDE_FEEDS = 16
    PROVIDE_TASKS = 32
    ALL = 63


NAMES = {
    "requestFiles": Role.REQUEST_FILES,
    "requestFeeds": Role.REQUEST_FEEDS,
    "requestTasks": Role.REQUEST_TASKS,
    "provideFiles": Role.PROVIDE_FILES,
    "provideFeeds": Role.PROVIDE_FEEDS,
    "provideTasks": Role.PROVIDE_TASKS,
}
"""Wire names, in the order of the older hub's documents."""


def parse_roles(names: object, where: str = "roles") -> Role:
    """Roles from a list of wire names; `["all"]` is all six. Raises InvalidInput."""
    if not isinstance(names, Iterable) or isinstance(names, str | bytes | dict):
        raise InvalidInput(f"{where}: expected a list of {', '.join(NAMES)}")
    found = Role.NONE
    for name in names:
        if name == "all":
            found |= Role.ALL
        elif isinstance(name, str) and name in NAMES:
            found |= NAMES[name]
        else:
            raise InvalidInput(f"{where}: {shorten(name)} is no role; expected some of {', '.join(NAMES)}, or all")
    return found


def role_names(roles: Role) -> list[str]:
    """Wire names of a set of roles, in the order of NAMES."""
    return [name for name, role in NAMES.items() if roles & role]


def role_flags(roles: Role) -> dict[str, bool]:
    """All six wire names with true or false, as the 2021 hub wrote permissions."""
    return {name: bool(roles & role) for name, role in NAMES.items()}
