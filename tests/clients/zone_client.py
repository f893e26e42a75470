"""Clients of kachery 2 in processes of their own, and the zones that they use on a real server."""

from __future__ import annotations

import json
import subprocess
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.clients.environment import client_python
from tests.servers import RunningNode

SCRIPT_SECONDS = 120


class Lab:
    """A server and its admin."""

    def __init__(self, node: RunningNode) -> None:
        self.node = node

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.node.request(
            method, f"/api/admin/v1{path}", None if body is None else json.dumps(body), auth=self.node.admin_token
        )
        assert answer.status < 300, (method, path, answer)
        return answer.json() if answer.body else None

    def zone(self, name: str, *, public: bool = False, **users: list[str]) -> None:
        """A channel of `admin`, and the roles of users in it."""
        self.admin("POST", "/channels", {"name": name, "public": public})
        for user, roles in users.items():
            self.admin("PUT", f"/channels/{name}/authorizations/user/{quote(user)}", {"roles": roles})

    def key(self, user: str, *scopes: str) -> str:
        """An API key."""
        body = {"user": user, "scopes": list(scopes or ("read", "write"))}
        return str(self.admin("POST", "/tokens", body)["token"])

    def requests(self, since: int = 0) -> list[tuple[str, str, int]]:
        """(Method, path, status) of the requests that the server's log shows behind an offset."""
        found = []
        for line in self.node.log_path.read_bytes()[since:].splitlines():
            if line.startswith(b"{"):
                entry = json.loads(line)
                if entry.get("event") == "request" and entry["path"].startswith(("/api/", "/sha1/", "/bucket/")):
                    path = entry["path"].split("/sha1/")[0] + "/sha1/" if "/sha1/" in entry["path"] else entry["path"]
                    path = "/bucket/upload/" if path.startswith("/bucket/upload/") else path
                    found.append((entry["method"], path, entry["status"]))
        return [one for one in found if not one[1].startswith("/api/admin/")]

    def log_size(self) -> int:
        return self.node.log_path.stat().st_size


class ZoneClient:
    """A person with a cache of their own; nothing but the client's own variables is set."""

    def __init__(self, lab: Lab, private: Path, zone: str, key: str | None, environment: str = "kachery2") -> None:
        private.mkdir(parents=True, exist_ok=True)
        self.private = private
        self.python = client_python(environment)
        self.variables = {
            "KACHERY_BASE_URL": f"http://127.0.0.1:{lab.node.port}",
            "KACHERY_ZONE": zone,
            **({} if key is None else {"KACHERY_API_KEY": key}),
            "KACHERY_DIR": str(private / "kachery"),
        }
        self._machine = {
            "HOME": str(private),
            "LANG": "C.UTF-8",
            "PATH": f"{self.python.parent}:/usr/local/bin:/usr/bin:/bin",
            "TMPDIR": str(private),
        }

    def process(
        self, *command: str | Path, more: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program. Its input is empty: what waits for a key to be pressed fails."""
        return subprocess.run(
            [self.python.with_name(str(command[0])), *map(str, command[1:])],
            env={**self._machine, **self.variables, **(more or {})},
            cwd=self.private,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SCRIPT_SECONDS,
        )

    def script(self, text: str, **more: str) -> subprocess.CompletedProcess[bytes]:
        """Run a script that has `ka` and `answer(...)`."""
        head = "import json\nimport kachery as ka\ndef answer(x): print('ANSWER', json.dumps(x), flush=True)\n"
        return self.process("python", "-c", head + textwrap.dedent(text), more=more)

    def run(self, text: str, **more: str) -> Any:
        """The answer of a script that succeeds."""
        done = self.script(text, **more)
        assert done.returncode == 0, done.stderr.decode()
        answers = [line for line in done.stdout.decode().splitlines() if line.startswith("ANSWER ")]
        return json.loads(answers[-1].removeprefix("ANSWER ")) if answers else None

    def fails(self, text: str, **more: str) -> str:
        """The error text of a script that fails."""
        done = self.script(text, **more)
        assert done.returncode != 0, done.stdout.decode()
        return done.stderr.decode()
