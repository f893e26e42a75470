"""Commands in processes of their own that need not import the program each time."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["kachery_lab.cli"])


def _run(arguments: tuple[str, ...], environment: Mapping[str, str], out: str, err: str) -> None:
    for descriptor, path in ((1, out), (2, err)):
        target = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["kachery-lab", *arguments]
    from kachery_lab.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_command(arguments: tuple[str, ...], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`kachery-lab ARGUMENTS` with exactly this environment."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        for file in (out, err):
            file.touch()
        process = _CONTEXT.Process(target=_run, args=(arguments, dict(environment), str(out), str(err)))
        process.start()
        process.join(120)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        process.close()
        assert code is not None, arguments
        return subprocess.CompletedProcess(list(arguments), code, out.read_text(), err.read_text())
