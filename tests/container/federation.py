"""`compose/federation.yaml` as the tests use it: three servers in containers, each with a client beside it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environment import client_python, client_variables
from tests.container.engine import PROJECT, Container, docker, free_port, http

CHANNEL = "rig-data"
NAMES = ("hub", "north", "south")
SERVER = 23401
"""The user, and the group, that the servers run as."""


@dataclass(frozen=True)
class Server:
    """One of the three: its container, its directories on the host, and the unmodified client on its port."""

    name: str
    container: Container
    root: Path

    @property
    def storage(self) -> Path:
        """Its storage, as the host sees it."""
        return self.root / "data"

    @property
    def metadata(self) -> Path:
        """Its metadata, as the host sees it."""
        return self.root / "meta"

    @property
    def node_id(self) -> str:
        """Which node it is."""
        return (self.storage / "kachery-node-id").read_text()

    @property
    def private(self) -> Path:
        """A directory of its client's own."""
        path = self.root / "client"
        path.mkdir(exist_ok=True)
        return path

    def start_client(self, *command: str, **more: Any) -> subprocess.Popen[str]:
        """A command of the client's environment, with this server and its storage."""
        return subprocess.Popen(
            command,
            env=client_variables(self.storage, self.container.port, self.private) | more.pop("env", {}),
            cwd=self.private,
            stdin=subprocess.DEVNULL,
            stdout=more.pop("stdout", subprocess.PIPE),
            stderr=subprocess.STDOUT,
            text=True,
            **more,
        )

    def client(self, *command: str, seconds: float = 60) -> str:
        """What a command of the client prints that has to succeed."""
        process = self.start_client(*command)
        try:
            said, _ = process.communicate(timeout=seconds)
        finally:
            process.kill()
        assert process.returncode == 0, f"{command}: exit {process.returncode}\n{said}\n{self.container.logs()[-4000:]}"
        return said.strip()

    def python(self, code: str, *arguments: str) -> str:
        """What a program for the client's Python prints that has to succeed."""
        return self.client(str(client_python()), "-c", code, *arguments)


@dataclass(frozen=True)
class Federation:
    """All three, in the channel `rig-data`, as the compose file leaves them."""

    project: str
    prefix: str
    root: Path
    servers: dict[str, Server]
    enrol: str
    """The container that let the nodes in, and has ended."""

    @property
    def hub(self) -> Server:
        return self.servers["hub"]

    @property
    def north(self) -> Server:
        return self.servers["north"]

    @property
    def south(self) -> Server:
        return self.servers["south"]

    @property
    def network(self) -> str:
        """The engine's name of the network between them."""
        return f"{self.project}_nodes"

    @property
    def hub_address(self) -> str:
        """Where nodes and clients reach the hub."""
        return f"{self.prefix}.10"

    def admin(self, path: str) -> Any:
        """What an admin endpoint of the hub answers."""
        token = (self.hub.metadata / "admin-token").read_text().strip()
        answer = http(self.hub.container.port, f"/api/admin/v1{path}", token=token)
        assert answer.status == 200, answer.body
        return json.loads(answer.body)

    def objects(self) -> list[dict[str, Any]]:
        """What lies in the channel's bucket."""
        found: list[dict[str, Any]] = self.admin(f"/channels/{CHANNEL}/objects?limit=1000")["objects"]
        return found


def compose_command() -> list[str]:
    """The compose command of this machine; without one a skip for people, a failure in CI."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    if docker("compose", "version", check=False).returncode == 0:
        return ["docker", "compose"]
    if os.environ.get("CI") == "true":
        pytest.fail("no compose command")
    pytest.skip("no compose command")


@contextlib.contextmanager
def federation(image: str) -> Iterator[Federation]:
    """The compose file brought up, with directories of its own, until the three servers are members of the channel;
    brought down and removed at the end."""
    command = compose_command()
    # Which directories the engine can mount, every user of the host can enter.
    root = Path(tempfile.mkdtemp(prefix="kachery-lab-federation-"))
    root.chmod(0o755)
    for name in NAMES:
        for directory in (root / name / "data", root / name / "meta"):
            directory.mkdir(parents=True)
            os.chown(directory, SERVER, SERVER)
    project = f"kachery-lab-federation-{os.getpid()}"
    prefix = f"10.{random.randrange(200, 255)}.{random.randrange(256)}"
    ports = {name: free_port() for name in NAMES}
    environment = {
        **os.environ,
        "KACHERY_LAB_IMAGE": image,
        "KACHERY_FEDERATION_DIR": str(root),
        "KACHERY_FEDERATION_NET": prefix,
        "UID_GID": f"{SERVER}:{SERVER}",
        **{f"{name.upper()}_PORT": str(port) for name, port in ports.items()},
    }
    command += ["-p", project, "-f", str(PROJECT / "compose" / "federation.yaml")]

    def compose(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    try:
        compose("up", "-d", "--no-build")
        enrol = compose("ps", "-a", "-q", "enrol")
        ended = docker("wait", enrol, seconds=180).stdout.strip()
        assert ended == "0", docker("logs", enrol).stdout
        containers = {name: Container(compose("ps", "-q", name), ports[name]) for name in NAMES}
        for name in ("north", "south"):
            containers[name].wait_logged("the hub's bands are connected")
        servers = {name: Server(name, container, root / name) for name, container in containers.items()}
        yield Federation(project, prefix, root, servers, enrol)
    finally:
        subprocess.run([*command, "down", "-v", "-t", "40"], env=environment, capture_output=True, check=False)
        shutil.rmtree(root)
