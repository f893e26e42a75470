"""Files on demand from another machine: a provider that uploads with kachery-cloud, and kachery-cloud asking for them.

The provider does what the published one does (`resource_provider.mjs`), with its WebSocket library. Storer and loader
have directories of their own, and the server's log shows what was asked.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.ably.environment import library, need_library, node_binary
from tests.clients.test_kachery_cloud import DOWNLOAD, GATEWAY, UPLOAD, Cloud, Requests
from tests.nodes import admin, running_node
from tests.servers import RunningNode

ZONE = "lab.scratch"
PROGRAM = Path(__file__).with_name("resource_provider.mjs")
SECONDS = 60.0


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    need_library()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    with running_node(tmp_path_factory.mktemp("provider")) as running:
        for user in ("ann", "ben"):
            admin(running, "POST", "/users", {"name": user})
        admin(running, "POST", "/channels", {"name": ZONE})
        admin(running, "PUT", f"/channels/{ZONE}/authorizations/user/ben", {"roles": ["requestFiles"]})
        yield running


@pytest.fixture(autouse=True)
def _ann_provides(node: RunningNode) -> None:
    roles = {"roles": ["requestFiles", "provideFiles"]}
    admin(node, "PUT", f"/channels/{ZONE}/authorizations/user/ann", roles)


def token(node: RunningNode, user: str, *scopes: str) -> str:
    return str(admin(node, "POST", "/tokens", {"user": user, "scopes": list(scopes), "channels": [ZONE]})["token"])


def client(node: RunningNode, version: str, place: Path, user: str, **more: str) -> Cloud:
    """A registered client of a user."""
    made = Cloud(node, version, place, ZONE, **more)
    made.give_keys()
    admin(node, "POST", "/clients", {"clientId": made.id, "user": user, "label": place.name})
    return made


class Program:
    """A running provider, and the lines that it prints. Use with `with`."""

    def __init__(self, cloud: Cloud, address: str) -> None:
        self._process = subprocess.Popen(
            [node_binary(), str(PROGRAM), str(library()), address, ZONE],
            env={**cloud.variables, "PATH": f"{cloud.python.parent}:{os.environ['PATH']}"},
            cwd=cloud.private,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._changed = threading.Condition()
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line.strip())
                self._changed.notify_all()

    def wait(self, beginning: str) -> str:
        """The first line that begins so."""

        def found() -> list[str]:
            return [line for line in self.lines if line.startswith(beginning)]

        with self._changed:
            assert self._changed.wait_for(found, SECONDS), (beginning, self.lines)
            return found()[0]

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_error: object) -> None:
        self._process.kill()
        self._process.wait(10)
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


def provider(node: RunningNode) -> Any:
    return admin(node, "GET", f"/channels/{ZONE}")["resourceProvider"]


@pytest.mark.parametrize("version", ["0.4.10", "0.4.2"])
def test_load_from_a_provider(node: RunningNode, tmp_path: Path, version: str) -> None:
    rig = client(node, version, tmp_path / "rig", "ann")
    data = f"spikes {version} ".encode() * 10_000
    (rig.private / "session.nwb").write_bytes(data)
    linked = rig.run("answer(kcl.link_file('session.nwb'))")
    stored = rig.run(f"answer(kcl.store_text_local('local {version}'))")
    base = f"http://127.0.0.1:{node.port}"
    given, asking = token(node, "ann", "write"), token(node, "ben", "read")
    resource = f"{base}/p/{asking}/r/{ZONE}"
    loader = client(node, version, tmp_path / "laptop", "ben", KACHERY_RESOURCE_URL=resource)
    load = f"answer(kcl.load_file({linked!r}, dest='loaded.nwb'))"
    assert loader.run(load) is None
    with Program(rig, f"{base}/p/{given}") as program:
        program.wait("acknowledged")
        assert provider(node) == "user:ann at 127.0.0.1"
        requests = Requests(node)
        assert loader.run(load) == "loaded.nwb"
        assert (loader.private / "loaded.nwb").read_bytes() == data
        asked = f"POST /p/*/r/{ZONE} 200"
        assert requests() == [GATEWAY, *UPLOAD, asked, *DOWNLOAD]
        assert loader.run(f"answer(kcl.load_text({stored!r}))") == f"local {version}"
        sha1 = hashlib.sha1(data).hexdigest()
        assert program.lines[1:] == [f"asked sha1://{sha1} completed", f"asked {stored.partition('?')[0]} completed"]
        requests = Requests(node)
        assert loader.run(f"answer(kcl.load_file('sha1://{'1' * 40}'))") is None
        assert requests() == [GATEWAY, asked]
        assert program.lines[-1] == f"asked sha1://{'1' * 40} not-found"
        # Without a provider too, what was uploaded stays.
    second = client(node, version, tmp_path / "second", "ben")
    assert second.run(f"answer(kcl.load_text({stored!r}))") == f"local {version}"
    assert given not in node.log
    assert asking not in node.log


def test_a_provider_whose_client_may_not_upload(node: RunningNode, tmp_path: Path) -> None:
    """Its own kachery-cloud fails, and whoever asks is told so."""
    rig = client(node, "0.4.10", tmp_path / "rig", "ben")
    uri = rig.run("answer(kcl.store_text_local('may not be uploaded'))")
    base = f"http://127.0.0.1:{node.port}"
    resource = f"{base}/p/{token(node, 'ben', 'read')}/r/{ZONE}"
    loader = client(node, "0.4.10", tmp_path / "laptop", "ben", KACHERY_RESOURCE_URL=resource)
    with Program(rig, f"{base}/p/{token(node, 'ann', 'write')}") as program:
        program.wait("acknowledged")
        found = loader.run(f"r = kcl.request_file({uri!r}, timeout_sec=5); answer([r.errored, r.error_message])")
        assert found[0] is True
        assert "Error executing kachery-cloud-store" in found[1]
        assert loader.run(f"answer(kcl.load_file({uri!r}))") is None


def test_refusals_reach_the_provider(node: RunningNode, tmp_path: Path) -> None:
    rig = client(node, "0.4.10", tmp_path / "rig", "ann")
    base = f"http://127.0.0.1:{node.port}"
    for given, expected in (
        (f"klk_{'a' * 32}", "error Unexpected server response: 401"),
        (token(node, "ann", "read"), "error Unexpected server response: 403"),
        (token(node, "ben", "write"), "closed 1008 forbidden: user ben lacks provideFiles"),
    ):
        with Program(rig, f"{base}/p/{given}") as program:
            program.wait(expected)
    given = token(node, "ann", "write")
    with Program(rig, f"{base}/p/{given}") as program:
        program.wait("acknowledged")
        with Program(rig, f"{base}/p/{given}") as second:
            second.wait("closed 1008 conflict: the zone lab.scratch has a provider already")
        admin(node, "DELETE", f"/channels/{ZONE}/authorizations/user/ann")
        program.wait("closed 1008 forbidden: user ann lacks provideFiles")
    until = time.monotonic() + SECONDS
    while provider(node) is not None:
        assert time.monotonic() < until
