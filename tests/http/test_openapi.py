"""`/openapi.json` describes exactly what is there, and what it says works."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from kachery_lab.http.describe import example
from kachery_lab.http.openapi import document
from tests.http.test_authority import ROUTES, UNGUARDED, real_routes, starlette_path
from tests.http.world import ADMIN, DESCRIBED, World
from tests.servers import RunningNode

EXAMPLES = 5
"""Per operation and way of generating. Making one takes ten times as long as sending it."""
PARTS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("server")
    for name in ("storage", "metadata"):
        (root / name).mkdir()
    running = RunningNode(root / "storage", root / "metadata").start()
    yield World(running)
    running.kill()


def described() -> set[str]:
    return {f"{method.upper()} {path}" for path, item in document()["paths"].items() for method in item}


def test_the_document_lists_exactly_the_routes(tmp_path: Path) -> None:
    real = {route for route in real_routes(tmp_path) if not route.startswith("WEBSOCKET")}
    assert described() == {route for route in real if "/api/v1/" in route or f"{ADMIN}/" in route}


def test_each_description_is_beside_its_handler(world: World) -> None:
    for one in DESCRIBED.values():
        assert one.summary
        assert min(one.answers) < 300, one.path


def test_it_is_served(world: World) -> None:
    served = world.node.request("GET", "/openapi.json", auth=False)
    assert (served.status, served.json()) == (200, json.loads(json.dumps(document())))
    page = world.node.request("GET", "/docs", auth=False)
    assert page.status == 200
    assert b'href="openapi.json"' in page.body
    assert b"<script" not in page.body


def test_the_examples_work(world: World) -> None:
    """With a fresh token per operation each is answered as described."""
    for route, operation in DESCRIBED.items():
        call = world.call(route)
        token = world.token("boss", "admin") if operation.who and operation.who != ("node",) else None
        answer = world.send(call, {"Authorization": f"Bearer {token}"} if token else {})
        assert answer.status in operation.answers, (route, answer)
        schema = operation.answers[answer.status]
        if schema is not None and "properties" in schema:
            assert set(schema["required"]) <= set(answer.json()) <= set(schema["properties"]), (route, answer.json())
            assert set(example(schema)) == set(schema["properties"])
        else:
            assert bool(answer.body) == (schema is not None), route
        world.restore()


def wrong(world: World, operation: Any, case: Any, kind: str) -> str | None:
    """Send a generated request as one kind of caller; what is wrong with the answer."""
    route = f"{operation.method.upper()} {operation.path}"
    expected = ROUTES[route][kind]
    case.headers = {}
    answer = case.call(base_url=f"http://127.0.0.1:{world.node.port}", headers=world.credential(kind))
    seen = answer.status_code
    refused = expected == "ok" or seen in (401, 404, 405) or (expected != "401" and 400 <= seen < 500)
    if seen >= 500 or not refused:
        return f"{route} by {kind}: {seen} {answer.text[:200]} for {case.as_curl_command()[:600]}"
    checks: list[Any] = [not_a_server_error]
    if seen not in (404, 405):
        checks += [status_code_conformance, response_schema_conformance]
    case.validate_response(answer, checks=checks)
    if seen < 300 and operation.method != "get":
        # The next caller is to find what this one may have removed.
        world.restore()
    return None


def attempts(world: World, operation: Any, mode: GenerationMode, kinds: tuple[str, ...]) -> list[str]:
    """Send generated requests of one operation, each as every kind of caller; what was answered wrongly."""
    path = starlette_path(f"{operation.method.upper()} {operation.path}")
    real = {name: str(example(one)) for name, one in DESCRIBED[path].parameters.items()}
    problems = []

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    def attempt(case: Any, known: bool) -> None:
        if known and real:
            # What really is there, so that more than the look-up is tried.
            case.path_parameters = {name: quote(value, safe="") for name, value in real.items()}
        problems.extend(filter(None, [wrong(world, operation, case, kind) for kind in kinds]))

    attempt()
    return problems


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["good", "bad"])
def test_nothing_that_is_sent_fails(world: World, mode: GenerationMode, part: int) -> None:
    """Generated requests: no 5xx, only described statuses and shapes, and refusals as the authority file says."""
    described = document()
    problems: list[str] = []
    operations = [found.ok() for found in schemathesis.openapi.from_dict(described).get_all_operations()]
    for operation in operations[part::PARTS]:
        raw = described["paths"][operation.path][operation.method]
        if mode is GenerationMode.NEGATIVE and not {"parameters", "requestBody"} & set(raw):
            continue  # there is nothing to send wrongly
        problems += attempts(world, operation, mode, ("none", "owner", "admin"))
    assert problems == []


@pytest.mark.parametrize(("instead", "kind"), [("1 / 0", "admin"), ("[]", "owner")], ids=["fails", "unguarded"])
def test_what_is_wrong_is_found(make_node: Callable[..., RunningNode], tmp_path: Path, instead: str, kind: str) -> None:
    """Positive control: the same requests, to a server that fails at one route or does not look at who asks."""
    program = tmp_path / "broken.py"
    program.write_text(UNGUARDED.replace("sorted(self._data.users.items())", instead))
    broken = World(make_node(prefix=(sys.executable, str(program))).start())
    operation = schemathesis.openapi.from_dict(document())[f"{ADMIN}/users"]["GET"]
    assert attempts(broken, operation, GenerationMode.POSITIVE, (kind,))
