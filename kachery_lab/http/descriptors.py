"""File descriptors: how many the server's connections need, and asking the system for them at start."""

from __future__ import annotations

import resource

import structlog

from kachery_lab.errors import StartRefused
from kachery_lab.http.deadlines import EdgeLimits
from kachery_lab.settings import Settings, variable

PER_CONNECTION = 2
"""A connection, and the one file that is sent or stored over it."""
RESERVE = 512
"""For everything but these connections: database, logs, locks and the event loop (about 30), threads that work on the
volume (three each, about 90), the admin socket and its connections (224), connections to a hub."""
OPERATOR_CONNECTIONS = 100
"""Connections of the admin socket, which only the server's own user can open."""
FEWEST = 50
"""Where not even so many connections fit, the default is not lowered: the start is refused."""
LOWERED = "default, lowered to what the limit of open files allows"
"""The origin of a default that was lowered."""

log = structlog.get_logger(__name__)


def descriptors_for(connections: int, listeners: int) -> int:
    """Descriptors of a server with so many listeners, each with so many connections."""
    return RESERVE + PER_CONNECTION * listeners * EdgeLimits(max_connections=connections).most_open


def connections_within(descriptors: int, listeners: int) -> int:
    """The most connections of each listener for which so many descriptors suffice; 0 when there are none."""
    most_open = (descriptors - RESERVE) // (PER_CONNECTION * listeners)
    found = max(0, most_open * 10 // 11)
    while found and descriptors_for(found, listeners) > descriptors:
        found -= 1
    return found


def fit_connections(settings: Settings) -> Settings:
    """Raise this process's soft limit of open files to what `max_connections` needs; it is never lowered.

    Where the hard limit is too low, a `max_connections` that somebody has set is refused; the default is lowered, with
    a warning, in the settings that are returned. Raises StartRefused naming both numbers.
    """
    listeners = 2 if settings.figurl_port else 1
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    name, wanted = variable("max_connections"), settings.max_connections
    needed = descriptors_for(wanted, listeners)
    if hard != resource.RLIM_INFINITY and needed > hard:
        fitting = connections_within(hard, listeners)
        more = f"`ulimit -n {needed}` as root before the start, or `docker run --ulimit nofile={needed}:{needed}`"
        if settings.origin("max_connections") != "default" or fitting < FEWEST:
            fewer = f"; or set {name} to {fitting} at most" if fitting else ""
            raise StartRefused(
                f"{name}={wanted} needs {needed} open files, and this process may open {hard} (its hard limit)",
                hint=f"Allow more: {more}{fewer}",
            )
        log.warning("fewer connections than by default", connections=fitting, needed=needed, hard_limit=hard, hint=more)
        needed = descriptors_for(fitting, listeners)
        settings = settings.with_value("max_connections", fitting, LOWERED)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return settings
