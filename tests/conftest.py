"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.logs import own_logging
from tests.servers import RunningNode


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
    nodes: list[RunningNode] = []

    def make(name: str = "node", **more: Any) -> RunningNode:
        storage = more.pop("storage", tmp_path / name / "storage")
        metadata = more.pop("metadata", tmp_path / name / "metadata")
        for directory in (storage, metadata):
            directory.mkdir(parents=True, exist_ok=True)
        node = RunningNode(storage, metadata, **more)
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.kill()


@pytest.fixture
def node(make_node: Callable[..., RunningNode]) -> RunningNode:
    """A running server."""
    return make_node().start()
