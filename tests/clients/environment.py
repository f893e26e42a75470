"""Published clients, each in a virtual environment of its own, so that tests drive them as they are.

`python -m tests.clients.environment` makes all of them; `client_python` and `client_variables` use them. What is in the
environment NAME is locked in `NAME.lock`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "clients"
BUILD = "build"
DAEMON_CLIENT = "kachery-client"
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.in") if path.stem != BUILD))
NOBODY = 65534


def client_python(name: str = DAEMON_CLIENT) -> Path:
    """The Python that has this client; its console scripts lie beside it. Made from the lock files when absent."""
    return build(CACHE / name, name)


def locks(name: str) -> tuple[Path, ...]:
    """What is installed, in this order: tools to build with, then the client and what it needs."""
    return (HERE / f"{BUILD}.lock", HERE / f"{name}.lock")


def client_variables(storage: Path | str, port: int, private: Path | str, python: Path | None = None) -> dict[str, str]:
    """The whole environment of a client process: the server on this port, its storage as the client sees it, and a
    directory of the client's own. Nothing is inherited, so no setting of the machine reaches the client."""
    return {
        **machine_variables(private, python or client_python()),
        "KACHERY_DAEMON_HOST": "127.0.0.1",
        "KACHERY_DAEMON_PORT": str(port),
        "KACHERY_STORAGE_DIR": str(storage),
        "KACHERY_TEMP_DIR": f"{private}/kachery-tmp",
    }


def machine_variables(private: Path | str, python: Path) -> dict[str, str]:
    """What any program needs, with a home of its own."""
    return {
        "HOME": str(private),
        "LANG": "C.UTF-8",
        "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
        "TMPDIR": str(private),
    }


def build(directory: Path, name: str = DAEMON_CLIENT, *, anyone: bool = False) -> Path:
    """Make an environment in a directory, or find it made. With `anyone` every user of the machine can run it.
    Raises RuntimeError when no interpreter allows that."""
    python = directory / "bin" / "python"
    stamp = directory / ".installed"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = hashlib.sha256(b"".join(path.read_bytes() for path in locks(name))).hexdigest()
        if not stamp.is_file() or stamp.read_text() != wanted or not python.exists():
            _run(_interpreter(anyone=anyone), "-m", "venv", "--clear", "--without-pip", str(directory))
            for path in locks(name):
                _pip(python, "--require-hashes", "--no-build-isolation", "--use-pep517", "-r", str(path))
            stamp.write_text(wanted)
        os.utime(stamp)
    return python


def runs_for_anyone(python: Path | str) -> bool:
    """Whether a user without any rights of their own can start this interpreter. Only root can tell; else False."""
    if os.getuid() != 0:
        return False
    command = [str(python), "-I", "-c", "import encodings"]
    done = subprocess.run(
        command, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", capture_output=True, check=False
    )
    return done.returncode == 0


def _interpreter(*, anyone: bool) -> str:
    own = str(getattr(sys, "_base_executable", sys.executable))
    if os.getuid() != 0:
        return own
    for python in (own, "/usr/bin/python3", "/usr/local/bin/python3"):
        if Path(python).exists() and _fits(python) and _reachable(python):
            return python
    if anyone:
        raise RuntimeError(f"no Python 3.11 to 3.13 that every user can run: {own} is closed to others")
    return own


def _reachable(python: str) -> bool:
    try:
        return runs_for_anyone(python)
    except OSError:
        return False


def _fits(python: str) -> bool:
    code = "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    return subprocess.run([python, "-I", "-c", code], check=False, capture_output=True).returncode == 0


def _pip(python: Path, *arguments: str) -> None:
    _run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "--quiet",
        "--disable-pip-version-check",
        "install",
        "--root-user-action=ignore",
        *arguments,
    )


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    for one in NAMES:
        print(client_python(one))
