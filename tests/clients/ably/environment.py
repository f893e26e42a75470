"""The provider's published library in a directory of its own, so that tests drive it as it is.

`python -m tests.clients.ably.environment` installs it from `package-lock.json`; `library` finds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from tests.faults.report import missing

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[2] / ".cache" / "clients" / "ably"
FILES = (HERE / "package.json", HERE / "package-lock.json")


class NoNode(Exception):
    """This machine has no Node.js or no npm."""


def node_binary() -> str:
    """The interpreter. Raises NoNode."""
    found = shutil.which("node")
    if found is None or shutil.which("npm") is None:
        raise NoNode("node and npm are needed; on Debian or Ubuntu: apt-get install nodejs npm")
    return found


def need_library() -> None:
    """Skips where there is no Node.js; under CI=true that is a failure."""
    try:
        library()
    except NoNode as error:
        missing(str(error))


def library(directory: Path = ENVIRONMENT) -> Path:
    """The directory whose `node_modules` has the library; installed when absent. Raises NoNode."""
    node_binary()
    directory.mkdir(parents=True, exist_ok=True)
    stamp = directory / ".installed"
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = hashlib.sha256(b"".join(path.read_bytes() for path in FILES)).hexdigest()
        if not stamp.is_file() or stamp.read_text() != wanted:
            for path in FILES:
                shutil.copy(path, directory)
            # Nothing of the packages runs while they are installed.
            options = ("--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--silent")
            subprocess.run(["npm", "ci", *options], cwd=directory, check=True, stdin=subprocess.DEVNULL)
            stamp.write_text(wanted)
        os.utime(stamp)
    return directory


if __name__ == "__main__":
    try:
        print(library())
    except NoNode as error:
        raise SystemExit(str(error)) from None
