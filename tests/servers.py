"""Real servers for tests: a process of its own, real uvicorn, a real volume, real SQLite."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.commands import CommandProcess, run_command

START_SECONDS = 120.0


@dataclass
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class RunningNode:
    """`kachery-lab start` on a directory. `env` overrides settings; `prefix` is a command that runs it. `fresh`: in a
    new interpreter, as a person starts it, and not in one that has imported the program before."""

    storage: Path
    metadata: Path
    env: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    port: int = 0
    fresh: bool = False
    process: subprocess.Popen[bytes] | CommandProcess | None = None

    @property
    def log_path(self) -> Path:
        return self.metadata.parent / f"{self.metadata.name}.server.log"

    @property
    def log(self) -> str:
        # Lines of requests are written a few milliseconds late.
        time.sleep(0.02)
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def environment(self) -> dict[str, str]:
        """Nothing of the caller's own settings leaks in."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("KACHERY_", "BITWOODER_"))}
        return {
            **kept,
            "KACHERY_STORAGE_DIR": str(self.storage),
            "KACHERY_LAB_METADATA_DIR": str(self.metadata),
            "KACHERY_DAEMON_PORT": str(self.port),
            "KACHERY_LAB_BIND": "127.0.0.1",
            "KACHERY_LAB_LOG_FORMAT": "json",
            **self.env,
        }

    def launch(self) -> None:
        """Start the process without waiting for it."""
        self.metadata.parent.mkdir(parents=True, exist_ok=True)
        program = self.prefix[1:] if list(self.prefix[:1]) == [sys.executable] else ()
        # Only a new interpreter obeys variables like LD_PRELOAD.
        fresh = self.fresh or any(name.startswith(("LD_", "PYTHON")) for name in self.env)
        if not fresh and (program or not self.prefix):
            self.process = CommandProcess(["start"], self.environment(), self.log_path, self.log_path, program)
            return
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "kachery_lab.cli", "start"],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self) -> RunningNode:
        """Start, and wait until `/readyz` answers 200. Fails with the log when the process ends before."""
        if self.port == 0:
            self.port = free_port()
        self.launch()
        self.wait_ready()
        return self

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        assert self.process is not None
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log[-4000:]}")
            try:
                if self.request("GET", "/readyz", auth=False).status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready within {seconds} s:\n{self.log[-4000:]}")

    @property
    def code(self) -> str:
        """The published client code."""
        return (self.storage / "client-auth").read_text()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | str | Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        auth: bool | str = True,
        timeout: float = 60,
    ) -> Answer:
        """One request on a connection of its own. `body` may be bytes or an iterable (then chunked). `auth`: the
        local code, a text to send as a Bearer token, or nothing."""
        given = dict(headers or {})
        if auth is True:
            given.setdefault("KACHERY-CLIENT-AUTH-CODE", self.code)
        elif auth:
            given.setdefault("Authorization", f"Bearer {auth}")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, given)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **more: Any) -> Answer:
        """A JSON request of the daemon API."""
        return self.request("POST", path, json.dumps(body), {"Content-Type": "application/json"}, **more)

    def store(self, data: bytes) -> Answer:
        return self.request("POST", "/store", data)

    @property
    def admin_token(self) -> str:
        return (self.metadata / "admin-token").read_text().strip()

    def terminate(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """SIGKILL, to the process group when a `prefix` command has to go too."""
        if isinstance(self.process, subprocess.Popen) and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        elif self.process is not None:
            self.process.kill()
        if self.process is not None:
            self.process.wait(60)

    def run_cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A `kachery-lab` command with this node's settings."""
        return run_command(arguments, self.environment())


def free_port() -> int:
    """A port that nothing listens on. It is none of those that the system gives to outgoing connections and to whoever
    asks for any: no other process is likely to take it before a server does, or while one is started again."""
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert given > 16_384, "the system leaves too few ports to choose from"
    while True:
        # Not `random`: Hypothesis seeds it, and every worker would choose the same ones.
        port = given - 1 - secrets.randbelow(12_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                probe.listen()
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port


def connections_of(port: int) -> int:
    """IPv4 connections to this port that a server has taken and not closed."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established, closed_by_the_client = "01", "08"
    ours = [row for row in rows if int(row[1].rpartition(":")[2], 16) == port]
    # One that waits to be taken is nobody's file yet.
    return sum(row[3] in (established, closed_by_the_client) and row[9] != "0" for row in ours)


def files_below(root: Path) -> list[Path]:
    """Regular files below a directory."""
    return [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]


def drafts(storage: Path) -> list[Path]:
    """Temporary files that were left behind."""
    return [path for path in files_below(storage) if re.search(r"\.tmp$|/tmp/", str(path.relative_to(storage)))]


def blob_path(storage: Path, sha1: str) -> Path:
    """Where clients that mount the directory look for a blob."""
    return storage / "sha1" / sha1[:2] / sha1[2:4] / sha1[4:6] / sha1
