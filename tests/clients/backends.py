"""kachery-client's own task backend and `request_task`, unmodified, each in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.clients.environment import client_python, client_variables
from tests.servers import RunningNode

FUNCTIONS = """
import json, os, sys, time
import kachery_client as kc

RUNS = os.environ["TASK_RUNS"]

def ran(name, n):
    # One write of a short line to a file opened for appending is not mixed with those of other processes.
    line = f"{os.environ['TASK_BACKEND']} {name} {n}\\n".encode()
    file = os.open(RUNS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        assert os.write(file, line) == len(line)
    finally:
        os.close(file)

@kc.taskfunction("double.1", type="pure-calculation")
def double(n, seconds=0.0):
    ran("double", n)
    time.sleep(seconds)
    return {"n": 2 * n}

@kc.taskfunction("look.1", type="query")
def look(n, seconds=0.0):
    ran("look", n)
    time.sleep(seconds)
    return {"n": n, "by": os.environ["TASK_BACKEND"]}

@kc.taskfunction("act.1", type="action")
def act(n, seconds=0.0):
    ran("act", n)
    time.sleep(seconds)

@kc.taskfunction("fail.1", type="pure-calculation")
def fail(n, length=0):
    ran("fail", n)
    raise ValueError(f"no {n} today" + "x" * length)
"""

BACKEND = """
channel, backend_id, *names = sys.argv[1:]
kc.run_task_backend(channels=[channel], task_function_ids=names, backend_id=backend_id or None)
"""

ASK = """
import json, random, sys, time
import kachery_client as kc

channel, function, kind, seconds, pause, tasks = sys.argv[1:]
for kwargs in json.loads(tasks):
    time.sleep(random.uniform(0, 2 * float(pause)))
    began = time.monotonic()
    found = {}
    try:
        task = kc.request_task(task_function_id=function, task_kwargs=kwargs, task_function_type=kind, channel=channel)
        found["first"] = task.status
        found["result"] = task.wait(timeout_sec=float(seconds))
        found["status"] = task.status
    except Exception as error:
        found["error"] = str(error)
    print(json.dumps({**found, "seconds": time.monotonic() - began}), flush=True)
"""

NAMES = ("double.1", "look.1", "act.1", "fail.1")


class Backend:
    """`run_task_backend` in a process group of its own. Which functions ran, `runs` tells."""

    def __init__(
        self,
        node: RunningNode,
        channel: str,
        runs: Path,
        name: str,
        *,
        names: tuple[str, ...] = NAMES,
        backend_id: str = "",
    ) -> None:
        self.name = name
        private = node.metadata.parent / f"client-{name}"
        private.mkdir(exist_ok=True)
        program = private / "backend.py"
        program.write_text(FUNCTIONS + BACKEND)
        self.log = private / f"{time.monotonic_ns()}.log"
        self.since = time.time()
        env = client_variables(node.storage, node.port, private)
        env |= {"TASK_RUNS": str(runs), "TASK_BACKEND": name, "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(client_python()), str(program), channel, backend_id, *names],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """SIGKILL to the whole process group: worker and parent."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def wait_registered(self, node: RunningNode, channel: str, seconds: float = 60) -> None:
        """Until a call of the backend waits at its node, or one is known to have."""
        until = time.monotonic() + seconds
        while "registerTaskFunctions" not in node.log:
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)


def asking(
    node: RunningNode,
    channel: str,
    function: str,
    kind: str,
    tasks: list[dict[str, Any]],
    seconds: float = 60,
    *,
    pause: float = 0,
) -> subprocess.Popen[str]:
    """`request_task` and `wait` for each of these arguments in turn, in a process of its own. Before each a pause of
    random length, `pause` seconds on average."""
    private = node.metadata.parent / f"client-{node.storage.parent.name}"
    private.mkdir(exist_ok=True)
    return subprocess.Popen(
        [str(client_python()), "-c", ASK, channel, function, kind, str(seconds), str(pause), json.dumps(tasks)],
        env=client_variables(node.storage, node.port, private),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )


def answers(process: subprocess.Popen[str], seconds: float = 120) -> list[dict[str, Any]]:
    """What `asking` found, task by task."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def ask(
    node: RunningNode, channel: str, function: str, kind: str, kwargs: dict[str, Any], seconds: float = 60
) -> dict[str, Any]:
    """One task."""
    return answers(asking(node, channel, function, kind, [kwargs], seconds))[0]
