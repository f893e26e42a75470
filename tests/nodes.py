"""Servers for a whole module of tests, and what tests of all kinds ask of a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers import RunningNode


@contextmanager
def making_nodes(root: Path) -> Iterator[Callable[..., RunningNode]]:
    """Gives what makes servers below a directory, not started: a name, then fields of RunningNode. One more of a name,
    or of a directory that is given, has the same files. At the end they are killed."""
    nodes: list[RunningNode] = []

    def make(name: str = "node", **more: Any) -> RunningNode:
        storage = more.pop("storage", root / name / "storage")
        metadata = more.pop("metadata", root / name / "metadata")
        for directory in (storage, metadata):
            directory.mkdir(parents=True, exist_ok=True)
        nodes.append(RunningNode(storage, metadata, **more))
        return nodes[-1]

    try:
        yield make
    finally:
        for node in nodes:
            node.kill()


@contextmanager
def running_node(root: Path, **more: Any) -> Iterator[RunningNode]:
    """A running server in a directory, with these fields of RunningNode. At the end its log must show no traceback."""
    with making_nodes(root) as make:
        node = make("", **more).start()
        yield node
        assert "Traceback" not in node.log, node.log[-4000:]


def admin(node: RunningNode, method: str, path: str, body: Any = None) -> Any:
    """The answer to an admin request that must succeed; `path` is what follows `/api/admin/v1`."""
    headers = {} if body is None else {"Content-Type": "application/json"}
    data = None if body is None else json.dumps(body)
    answer = node.request(method, f"/api/admin/v1{path}", data, headers, auth=node.admin_token)
    assert answer.status < 300, (method, path, answer.status, answer.body)
    return answer.json() if answer.body else None


def requests_of(node: RunningNode, since: int = 0) -> list[dict[str, Any]]:
    """What the log says of requests, in their order: those behind so many characters of it."""
    # The last line may be half written.
    lines = node.log[since:].split("\n")[:-1]
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in entries if entry.get("event") == "request"]
