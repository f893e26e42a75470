"""Clients of kachery 2 in processes of their own, and the zones that they use on a real server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.clients.person import Person
from tests.nodes import admin, requests_of, running_node
from tests.servers import RunningNode


class Lab:
    """A server and its admin."""

    def __init__(self, node: RunningNode) -> None:
        self.node = node

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        return admin(self.node, method, path, body)

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
        """(Method, path, status) of the requests that the server's log shows behind an offset; of files and uploads
        only the beginning of the path, and none of an admin."""
        found = []
        for entry in requests_of(self.node, since):
            path = re.sub(r"(/sha1/|/bucket/upload/).*$", r"\1", entry["path"])
            if path.startswith(("/api/", "/sha1/", "/bucket/")) and not path.startswith("/api/admin/"):
                found.append((entry["method"], path, entry["status"]))
        return found

    def log_size(self) -> int:
        return len(self.node.log)


@contextmanager
def running_lab(root: Path) -> Iterator[Lab]:
    """A running server in a directory."""
    with running_node(root) as node:
        yield Lab(node)


class ZoneClient(Person):
    """A person with a cache of their own, who is told the server's address, a zone and a key. Scripts have `ka`."""

    imports = "import kachery as ka\n"

    def __init__(self, lab: Lab, private: Path, zone: str, key: str | None, environment: str = "kachery2") -> None:
        variables = {
            "KACHERY_BASE_URL": f"http://127.0.0.1:{lab.node.port}",
            "KACHERY_ZONE": zone,
            **({} if key is None else {"KACHERY_API_KEY": key}),
            "KACHERY_DIR": str(private / "kachery"),
        }
        super().__init__(environment, private, variables)
