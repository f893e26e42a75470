"""On the module's hub a private channel for each test, and nodes with every role in it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.hubs import Hub, LabNode
from tests.members2021 import FORMATS, Wire, joined


@pytest.fixture
def channel(hub: Hub) -> str:
    name = f"c{time.monotonic_ns():x}"
    hub.make_channel(name)
    return name


@pytest.fixture
def member(hub: Hub, channel: str) -> LabNode:
    node = LabNode()
    hub.register(node)
    hub.join(node, channel)
    return node


@pytest.fixture(params=FORMATS)
def wire(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def other(hub: Hub, channel: str) -> LabNode:
    """A second member with every role."""
    node = LabNode()
    hub.register(node)
    hub.join(node, channel)
    return node


@pytest.fixture
def pair(hub: Hub, channel: str, member: LabNode, other: LabNode, wire: str) -> Iterator[tuple[Wire, Wire]]:
    """Two connected members."""
    with joined(hub, member, channel, wire) as one, joined(hub, other, channel, wire) as two:
        yield one, two
