"""Commands in processes of their own that need not import the program each time.

A process that has imported it once is forked for each command: what a person waits for at every start is paid once for
a whole run of tests. `tests/functional/test_start.py` starts the program as a person does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from kachery_lab.cli import cli, main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.warm"])
# Starting a process asks after all the others: two threads that read one exit code would leave nothing for the second.
_LOCK = threading.Lock()


def all_commands(group: click.Group = cli, name: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its words, as `node list`; groups of commands are none."""
    context = click.Context(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None, word
        if isinstance(command, click.Group):
            yield from all_commands(command, f"{name}{word} ")
        else:
            yield f"{name}{word}", command


class CommandProcess:
    """`kachery-lab ARGUMENTS` with exactly this environment, started at once. Its output is appended to two files, or
    to one. `program`: a script and its first arguments, which gets the command line as the others. It has what tests
    use of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        out: Path,
        err: Path,
        program: Sequence[str] = (),
    ) -> None:
        self._arguments = tuple(arguments)
        # A daemon: what a failed test left running must not hold up the end of the run.
        given = (self._arguments, dict(environment), str(out), str(err), tuple(program))
        self._process = _CONTEXT.Process(target=_run, args=given, daemon=True)
        with _LOCK:
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, the negative number of the signal that ended it, or None."""
        with _LOCK:
            if self.returncode is None:
                self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self._arguments, timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """A signal; nothing when the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_command(
    arguments: Sequence[str], environment: Mapping[str, str], timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """`kachery-lab ARGUMENTS` with exactly this environment, to its end. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = CommandProcess(arguments, environment, out, err)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(arguments), code, out.read_text(), err.read_text())


def _run(
    arguments: tuple[str, ...], environment: Mapping[str, str], out: str, err: str, program: tuple[str, ...]
) -> None:
    # As `subprocess` does for servers: a ^C at the terminal is for the tests.
    os.setsid()
    for descriptor, path in ((1, out), (2, err)):
        target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(target, descriptor)
        os.close(target)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    try:
        if program:
            sys.argv = [*program, sys.executable, "-m", "kachery_lab.cli", *arguments]
            runpy.run_path(program[0], run_name="__main__")
        else:
            sys.argv = ["kachery-lab", *arguments]
            main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
