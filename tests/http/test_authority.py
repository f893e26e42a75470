"""S2: who may do what. `tests/authority.toml` against the routes of the application; every cell on a real server."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.routing import Route, WebSocketRoute

from kachery_lab.app import create_app
from kachery_lab.http.paths import PathTable
from kachery_lab.node import open_node
from kachery_lab.settings import Settings
from tests.http.world import ADMIN, KINDS, World
from tests.servers import RunningNode

TABLE = tomllib.loads((Path(__file__).parents[1] / "authority.toml").read_text(encoding="utf-8"))
ROUTES: dict[str, dict[str, str]] = {
    route: dict(zip(TABLE["columns"].split(), cells.split(), strict=True)) for route, cells in TABLE["routes"].items()
}
HALT = "GET /halt"
REFUSALS = {401: "401", 403: "403", 404: "404"}

UNGUARDED = """
import sys
from kachery_lab.services.users import UserService
UserService.list = lambda self, actor: sorted(self._data.users.items())
sys.argv = sys.argv[3:]
from kachery_lab.cli import main
main()
"""


@pytest.fixture
def world(make_node: Callable[..., RunningNode]) -> Iterator[World]:
    yield World(make_node().start())


def real_routes(tmp_path: Path) -> set[str]:
    for name in ("storage", "metadata"):
        (tmp_path / name).mkdir()
    node = open_node(Settings(KACHERY_STORAGE_DIR=tmp_path / "storage", metadata_dir=tmp_path / "metadata"))
    try:
        found = set()
        (table,) = create_app(node).routes
        assert isinstance(table, PathTable)
        for route in table.routes:
            if isinstance(route, WebSocketRoute):
                found.add(f"WEBSOCKET {route.path}")
                continue
            # A mount would need columns of its own.
            assert isinstance(route, Route), route
            assert route.methods is not None, f"{route.path} takes every method"
            path = re.sub(r":\w+}", "}", route.path)
            found |= {f"{method} {path}" for method in route.methods - {"HEAD"}}
        return found
    finally:
        node.release()


def starlette_path(route: str) -> str:
    """A route as the application spells it: the last part of an object's address may hold slashes."""
    return route.replace("{path}", "{path:path}")


def deviations(world: World, routes: list[str]) -> list[str]:
    """Cells that are not as the table says."""
    found = []
    for route in routes:
        for kind in KINDS:
            expected = ROUTES[route][kind]
            if (route, expected) == (HALT, "ok"):
                continue
            call = world.call(starlette_path(route))
            answer = world.send(call, world.credential(kind))
            seen = "ok" if answer.status < 400 else REFUSALS.get(answer.status, str(answer.status))
            if seen != expected:
                found.append(f"{route} by {kind}: {expected} expected, {answer.status} {answer.body[:200]!r}")
            if call.method == "GET" and expected != "ok":
                call.method = "HEAD"
                if (head := world.send(call, world.credential(kind)).status) != answer.status:
                    found.append(f"HEAD {route} by {kind}: {head}, GET {answer.status}")
            if seen == "ok" and call.method != "GET" and ADMIN in call.target:
                world.restore()
    return found


def test_every_route_is_in_the_table(tmp_path: Path) -> None:
    assert set(ROUTES) == real_routes(tmp_path)


def test_the_columns() -> None:
    assert tuple(TABLE["columns"].split()) == KINDS
    assert {cell for row in ROUTES.values() for cell in row.values()} == {"ok", "401", "403", "404"}


@pytest.mark.parametrize("part", range(4))
def test_every_cell(world: World, part: int) -> None:
    assert deviations(world, sorted(ROUTES)[part::4]) == []


def test_halt(make_node: Callable[..., RunningNode]) -> None:
    running = make_node().start()
    world = World(running)
    for kind in [kind for kind in KINDS if ROUTES[HALT][kind] == "ok"]:
        if running.process is None or running.process.poll() is not None:
            running.start()
        assert world.send(world.call(HALT), world.credential(kind)).status == 200
        assert running.process is not None
        assert running.process.wait(30) == 0


def test_a_missing_check_is_noticed(make_node: Callable[..., RunningNode], tmp_path: Path) -> None:
    """Positive control: the same walk on a server where one look at the caller was taken out."""
    program = tmp_path / "unguarded.py"
    program.write_text(UNGUARDED)
    world = World(make_node(prefix=(sys.executable, str(program))).start())
    found = deviations(world, [f"GET {ADMIN}/users"])
    assert {line.partition(" by ")[2].partition(":")[0] for line in found} == {
        *("browser", "local", "client", "read", "write", "owner", "other", "metrics")
    }
