"""Everything can be done in two ways: each admin endpoint has a command, with all that the endpoint takes, and each
command is an admin endpoint's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import click
import pytest
from click.testing import CliRunner
from starlette.routing import compile_path

from kachery_lab.cli import cli, operator
from kachery_lab.http.admin import OPERATIONS
from kachery_lab.http.describe import Operation, example
from tests.commands import all_commands

NO_ENDPOINT = {
    "start": "it is the server",
    "info": "it reads the files of the storage directory, which the server's machine alone has",
}
"""Commands that send no admin request, and why."""
NO_COMMAND: dict[str, str] = {}
"""What endpoints take and no command sends, and why."""
EVERYWHERE = {"server", "token", "storage_dir", "metadata_dir"}
VALUES = {
    "subject": "user:ann",
    "file": "a9993e364706816aba3e25717850c26c9cd0d89d",
    "limit": "10",
    "max_bytes": "2TB",
    "max_object_bytes": "1GB",
    "max_objects": "5",
    "retention_days": "30",
    "since": "2026-01-01",
    "until": "2026-01-31",
}
"""What commands check before they send it; for the rest any text will do."""


@dataclass(frozen=True)
class Sent:
    """One request of a command, and the names in its query and its body."""

    command: str
    endpoint: str
    names: frozenset[str]


def value_of(parameter: click.Parameter) -> str:
    if isinstance(parameter.type, click.Choice):
        return str(parameter.type.choices[0])
    return VALUES.get(str(parameter.name), "10" if isinstance(parameter.type, click.types.IntParamType) else "x")


def words_of(name: str, command: click.Command) -> list[str]:
    """A command with everything that it can be given."""
    words = name.split()
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words.append(value_of(parameter))
        elif isinstance(parameter, click.Option) and parameter.name not in EVERYWHERE:
            words += [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], value_of(parameter)]
    return words


def endpoint_of(operation: Operation) -> str:
    return f"{operation.method} {operation.path}"


def operation_at(method: str, path: str) -> Operation:
    found = [one for one in OPERATIONS if one.method == method and compile_path(one.path)[0].fullmatch(path)]
    assert len(found) == 1, (method, path)
    return found[0]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """What all commands send."""
    sent: list[Sent] = []
    current = ""

    def ask(_flags: Any, method: str, target: str, body: Any = None, **_: Any) -> Any:
        url = urlsplit(target)
        operation = operation_at(method, unquote(url.path))
        names = {*parse_qs(url.query, strict_parsing=bool(url.query)), *(body or {})}
        sent.append(Sent(current, endpoint_of(operation), frozenset(names)))
        answer = operation.answers[min(operation.answers)]
        return {} if answer is None else example(answer)

    monkeypatch.setattr(operator, "ask", ask)
    for name, command in all_commands():
        if name in NO_ENDPOINT:
            continue
        current = name
        done = CliRunner().invoke(cli, words_of(name, command))
        # `reindex` tells by its exit code that a file failed, as one does in the example.
        assert done.exception is None or isinstance(done.exception, SystemExit), (name, done.output)
        assert done.exit_code in ({0, 1} if name == "reindex" else {0}), (name, done.output)
    return sent


def takes(operation: Operation) -> set[str]:
    return {*operation.query, *(operation.body or {}).get("properties", {})}


def unsent(requests: Iterable[Sent], known: Mapping[str, str]) -> set[str]:
    """Endpoints, and what they take, that no command sends."""
    names: dict[str, set[str]] = {}
    for one in requests:
        names.setdefault(one.endpoint, set()).update(one.names)
    found = set()
    for operation in OPERATIONS:
        endpoint = endpoint_of(operation)
        missing = {""} if endpoint not in names else takes(operation) - names[endpoint]
        found |= {f"{endpoint} {name}".rstrip() for name in missing}
    return found - set(known)


def test_each_endpoint_has_a_command(requests: list[Sent]) -> None:
    assert unsent(requests, NO_COMMAND) == set()


def test_each_command_has_an_endpoint(requests: list[Sent]) -> None:
    commands = {name for name, _ in all_commands()}
    assert {one.command for one in requests} == commands - set(NO_ENDPOINT)
    by_endpoint = {endpoint_of(operation): takes(operation) for operation in OPERATIONS}
    assert {one for one in requests if not one.names <= by_endpoint[one.endpoint]} == set()


def test_no_exception_is_kept_that_is_none(requests: list[Sent]) -> None:
    assert set(NO_ENDPOINT) <= {name for name, _ in all_commands()}
    assert set(NO_COMMAND) <= unsent(requests, {})


def test_a_command_that_is_missing_is_seen(requests: list[Sent]) -> None:
    """Control: what would be found, were there no such command."""
    node = "/api/admin/v1/nodes/{nodeId}"
    assert unsent([one for one in requests if one.command != "node show"], {}) == {f"GET {node}"}
    assert unsent([one for one in requests if one.command != "node update"], {}) == {
        *(f"PATCH {node} label", f"PATCH {node} owner")
    }
