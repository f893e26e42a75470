"""The container engine as the tests use it: build, run, look, stop. Everything a test starts is removed at its end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
BASE_IMAGE = os.environ.get("KACHERY_LAB_BASE_IMAGE", "kachery-lab-base:local")
IMAGE = "kachery-lab:test"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def docker(*arguments: str, check: bool = True, seconds: float = 90) -> subprocess.CompletedProcess[str]:
    """One engine command; both streams in `stdout`. Raises AssertionError with them when it fails."""
    done = subprocess.run(
        ["docker", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert not check or done.returncode == 0, f"docker {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}"
    return done


def why_no_engine() -> str | None:
    """Why containers cannot be tested here, or None when they can."""
    if shutil.which("docker") is None:
        return "no `docker` command on this machine"
    try:
        done = docker("version", "--format", "{{.Server.Version}}", check=False, seconds=20)
    except subprocess.TimeoutExpired:
        return "the container engine does not answer"
    if done.returncode != 0:
        return f"no container engine answers: {done.stdout.strip().splitlines()[-1]}"
    if os.getuid() != 0:
        return "these tests act as several users, so they need root"
    return None


def build_image() -> str:
    """Build the project's image from the tree as it is; its tag."""
    docker("build", "--build-arg", f"BASE_IMAGE={BASE_IMAGE}", "-t", IMAGE, str(PROJECT), seconds=540)
    return IMAGE


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass(frozen=True)
class Answer:
    """What a server answered."""

    status: int
    body: bytes


def http(
    port: int, path: str, *, code: str | None = None, token: str | None = None, data: bytes | None = None
) -> Answer:
    """One request, POST when there is `data`. Raises OSError when nobody answers."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=data)
    if code is not None:
        request.add_header("KACHERY-CLIENT-AUTH-CODE", code)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with _DIRECT.open(request, timeout=20) as answer:
            return Answer(answer.status, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.read())


@dataclass(frozen=True)
class Container:
    """A container that was made, running or not."""

    name: str
    port: int

    def inspect(self) -> dict[str, Any]:
        """The engine's record of it."""
        found: list[dict[str, Any]] = json.loads(docker("inspect", self.name).stdout)
        return found[0]

    def logs(self) -> str:
        """Everything it has written."""
        return docker("logs", self.name, check=False).stdout

    def execute(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in it, as its own user."""
        return docker("exec", self.name, *command, check=check)

    def wait_ready(self, seconds: float = 45) -> None:
        """Return when `/readyz` answers 200. Raises AssertionError with the log when it ends or stays unready."""
        until = time.monotonic() + seconds
        last = "no answer"
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                answer = http(self.port, "/readyz")
                if answer.status == 200:
                    return
                last = f"{answer.status} {answer.body!r}"
            assert self.inspect()["State"]["Running"], f"the container ended:\n{self.logs()}"
            time.sleep(0.1)
        raise AssertionError(f"not ready after {seconds} s: {last}\n{self.logs()}")

    def wait_health(self, wanted: str, seconds: float = 45) -> None:
        """Return when the image's own health check says so."""
        until = time.monotonic() + seconds
        health: dict[str, Any] = {}
        while time.monotonic() < until:
            health = self.inspect()["State"]["Health"]
            if health["Status"] == wanted:
                return
            time.sleep(0.25)
        raise AssertionError(f"health after {seconds} s: {health}\n{self.logs()}")

    def wait_logged(self, text: str, seconds: float = 60) -> None:
        """Return when it has written this."""
        until = time.monotonic() + seconds
        while text not in self.logs():
            assert time.monotonic() < until, f"not logged within {seconds} s: {text}\n{self.logs()[-4000:]}"
            time.sleep(0.25)

    def stop(self) -> int:
        """Ask it to end, wait for at most 40 s; its exit code (137: it had to be killed)."""
        docker("stop", "-t", "40", self.name)
        return int(self.inspect()["State"]["ExitCode"])


@contextlib.contextmanager
def running(name: str, port: int, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[Container]:
    """A started container of the image, removed with its anonymous volumes at the end, whatever happens."""
    variables = [part for key, value in (environment or {}).items() for part in ("-e", f"{key}={value}")]
    docker("rm", "-f", "-v", name, check=False)
    try:
        docker("run", "-d", "--name", name, "-p", f"127.0.0.1:{port}:20431", *options, *variables, IMAGE)
        yield Container(name, port)
    finally:
        docker("rm", "-f", "-v", name, check=False)
