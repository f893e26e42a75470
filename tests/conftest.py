"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.hubs import Hub
from tests.logs import own_logging
from tests.nodes import making_nodes
from tests.servers import RunningNode
from tests.zones import Zone


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8; what tests log on purpose is not always that."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def log_of_its_own() -> Iterator[None]:
    """What a test configures, as commands do that run in this process, is not there for the next."""
    with own_logging():
        yield


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[Callable[..., RunningNode]]:
    """Makes servers, not started; they are killed at the end."""
    with making_nodes(tmp_path) as make:
        yield make


@pytest.fixture
def node(make_node: Callable[..., RunningNode]) -> RunningNode:
    """A running server."""
    return make_node().start()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A running hub for a whole module, without channels of its own but `default`."""
    with Hub(tmp_path_factory.mktemp("hub")) as running:
        yield running


@pytest.fixture
def zone(hub: Hub) -> Zone:
    """A new zone of the module's hub."""
    return Zone(hub)
