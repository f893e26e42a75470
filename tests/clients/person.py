"""Somebody who runs programs of a published client, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.clients.environment import client_python, machine_variables

SECONDS = 120
HEAD = "import json\ndef answer(x): print('ANSWER', json.dumps(x), flush=True)\n"


class Person:
    """Has a client's environment by its name, a directory of their own, and variables; nothing else is set, so no
    setting of the machine reaches the client. Scripts begin with `imports`."""

    imports = ""

    def __init__(self, environment: str, private: Path, variables: Mapping[str, str]) -> None:
        private.mkdir(parents=True, exist_ok=True)
        self.private = private
        self.python = client_python(environment)
        self.variables = {**machine_variables(private, self.python), **variables}

    def open(
        self, *command: str | Path, stdin: int = subprocess.DEVNULL, more: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program of the environment. Its input is empty: what waits for a key to be pressed fails."""
        return subprocess.Popen(
            [self.python.with_name(str(command[0])), *map(str, command[1:])],
            env={**self.variables, **(more or {})},
            cwd=self.private,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def command(self, *command: str | Path) -> subprocess.CompletedProcess[bytes]:
        """A program of the environment, to its end."""
        return ended(self.open(*command))

    def prints(self, *command: str | Path) -> str:
        """The last line of a program that succeeds."""
        done = self.command(*command)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip().splitlines()[-1]

    def start(self, script: str, **more: str) -> subprocess.Popen[bytes]:
        """A Python script, with more variables, that has `imports`, and prints one JSON value with `answer(...)`."""
        return self.open("python", "-c", HEAD + self.imports + textwrap.dedent(script), more=more)

    def run(self, script: str, **more: str) -> Any:
        """The answer of a script that succeeds."""
        return finish(self.start(script, **more))

    def fails(self, script: str, **more: str) -> str:
        """The error text of a script that fails."""
        done = ended(self.start(script, **more))
        assert done.returncode != 0, done.stdout.decode()
        return done.stderr.decode()


def ended(process: subprocess.Popen[bytes], said: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """What a program printed until its end, after it was told something. A program that hangs is killed."""
    try:
        output, errors = process.communicate(said, timeout=SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def finish(process: subprocess.Popen[bytes]) -> Any:
    """The answer of a script that succeeds; None when it gave none."""
    done = ended(process)
    assert done.returncode == 0, done.stderr.decode()
    answers = [line for line in done.stdout.decode().splitlines() if line.startswith("ANSWER ")]
    return json.loads(answers[-1].removeprefix("ANSWER ")) if answers else None
