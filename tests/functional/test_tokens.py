"""Access tokens: made, listed and revoked by the command line, with and without a running server."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kachery_lab.cli import cli
from kachery_lab.errors import InvalidInput
from tests.servers import RunningNode, files_below

BLOB = "/api/v1/blobs/a9993e364706816aba3e25717850c26c9cd0d89d"


def create(node: RunningNode, *arguments: str) -> str:
    done = node.run_cli("token", "create", *arguments)
    assert done.returncode == 0, done.stderr
    secret = done.stdout.strip()
    assert re.fullmatch(r"klk_[a-z2-7]{32}", secret)
    return secret


def rows(node: RunningNode) -> list[dict[str, Any]]:
    """What `token list` shows, by column."""
    done = node.run_cli("token", "list")
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    columns = ["ID", "USER", "CREATED", "EXPIRES", "REVOKED", "SCOPES"]
    starts = [head.index(column) for column in columns]
    ends = [*starts[1:], None]
    return [{column: line[a:b].strip() for column, a, b in zip(columns, starts, ends, strict=True)} for line in lines]


def row_of(node: RunningNode, user: str) -> dict[str, Any]:
    return next(row for row in rows(node) if row["USER"] == user)


def test_with_a_running_server(node: RunningNode) -> None:
    secret = create(node, "ada", "--scope", "client", "--label", "for the rig", "--days", "2")
    create(node, "bob", "--scope", "read", "--scope", "write")
    listed = rows(node)
    assert [row["USER"] for row in listed] == ["admin", "ada", "bob"]
    assert listed[0]["SCOPES"].startswith("client read write channel-owner admin")
    assert listed[1]["SCOPES"].split() == ["client", "-", "for", "the", "rig"]
    assert listed[1]["EXPIRES"] != "-" == listed[1]["REVOKED"] == listed[2]["EXPIRES"]
    assert secret not in str(listed)
    assert node.admin_token not in str(listed)
    assert node.request("PUT", BLOB, b"abc", auth=secret).status == 201
    done = node.run_cli("token", "revoke", listed[1]["ID"])
    assert (done.returncode, done.stdout) == (0, f"revoked {listed[1]['ID']}\n")
    assert node.request("GET", BLOB, auth=secret).status == 401
    assert row_of(node, "ada")["REVOKED"] != "-"
    again = node.run_cli("token", "revoke", listed[1]["ID"])
    assert again.returncode == 1
    assert "revoked before" in again.stderr
    unknown = node.run_cli("token", "revoke", "ffffffff")
    assert unknown.returncode == 1
    assert "token list" in unknown.stderr


def test_without_a_server(make_node: Callable[..., RunningNode]) -> None:
    node = make_node()
    ended, kept = (create(node, user, "--scope", "client") for user in ("ada", "bob"))
    assert node.run_cli("token", "revoke", row_of(node, "ada")["ID"]).returncode == 0
    node.start()
    assert node.request("GET", "/stats", auth=ended).status == 403
    assert node.request("GET", "/stats", auth=kept).status == 200


def test_scopes(node: RunningNode) -> None:
    secrets = {scope: create(node, f"u-{scope}", "--scope", scope) for scope in ("client", "read", "write", "admin")}
    token = {"user": "x", "scopes": ["client"]}
    expected = {
        # scope: (store, list, mutable, delete, tokens, reindex)
        "client": (201, 200, 200, 403, 403, 403),
        "read": (403, 403, 403, 403, 403, 403),
        "write": (403, 403, 403, 403, 403, 403),
        "admin": (200, 200, 200, 204, 201, 200),
    }
    for scope, statuses in expected.items():
        secret = secrets[scope]
        found = (
            node.request("PUT", BLOB, b"abc", auth=secret).status,
            node.request("GET", "/api/v1/blobs", auth=secret).status,
            node.post("/mutable/set", {"key": "k", "value": scope}, auth=secret).status,
            node.request("DELETE", BLOB, auth=secret).status,
            node.post("/api/admin/v1/tokens", token, auth=secret).status,
            node.request("POST", "/api/admin/v1/reindex?dry_run=true", auth=secret).status,
        )
        assert found == statuses, scope
    # The client code is the node's own client: it may not administer.
    assert node.post("/api/admin/v1/tokens", token).status == 403
    assert node.request("DELETE", BLOB).status == 403


def test_a_client_token_is_a_code_and_a_bearer(node: RunningNode) -> None:
    secret = create(node, "remote", "--scope", "client")
    as_code = {"KACHERY-CLIENT-AUTH-CODE": secret}
    for how in ({"auth": secret}, {"auth": False, "headers": as_code}):
        assert node.request("POST", "/store", b"abc", **how).json()["success"] is True
        assert node.request("GET", BLOB, **how).body == b"abc"
        assert node.request("GET", "/stats", **how).status == 200
    assert node.post("/feed/createFeed", {}, auth=secret).status == 200
    stored = node.request("GET", "/api/v1/blobs").json()["blobs"]
    assert [row["storedBy"] for row in stored] == ["remote"]
    # Where the client's 2021 API is spoken, a wrong one is 403, as its clients know it; in our own API 401.
    wrong = {"KACHERY-CLIENT-AUTH-CODE": secret[:-1] + ("a" if secret[-1] != "a" else "b")}
    assert node.request("POST", "/store", b"abc", wrong, auth=False).status == 403
    answer = node.request("GET", BLOB, headers=wrong, auth=False)
    assert answer.status == 401
    assert answer.json()["code"] == "unauthenticated"


def test_an_expired_token(node: RunningNode) -> None:
    body = {"user": "brief", "scopes": ["client"], "expiresAt": int(time.time() * 1000) + 5000}
    made = node.post("/api/admin/v1/tokens", body, auth=node.admin_token)
    assert made.status == 201
    secret = made.json()["token"]
    assert node.request("GET", "/stats", auth=secret).status == 200
    time.sleep(max(0.0, body["expiresAt"] / 1000 - time.time()) + 0.05)
    assert node.request("GET", "/stats", auth=secret).status == 403
    assert node.request("GET", "/api/v1/blobs", auth=secret).status == 401
    assert row_of(node, "brief")["REVOKED"] == "-"


@pytest.mark.parametrize(
    "arguments",
    [
        ["ada"],
        ["ada", "--scope", "everything"],
        ["ada", "--scope", "client", "--days", "0"],
        ["a/b", "--scope", "client"],
        ["", "--scope", "client"],
        ["ada", "--scope", "client", "--label", "two\nlines"],
    ],
)
def test_what_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]) -> None:
    for name in ("KACHERY_STORAGE_DIR", "KACHERY_LAB_METADATA_DIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    done = CliRunner().invoke(cli, ["token", "create", *arguments])
    assert isinstance(done.exception, SystemExit | InvalidInput)
    assert done.exit_code != 0
    assert "klk_" not in done.output


def test_secrets_are_nowhere_on_disk(node: RunningNode) -> None:
    secret = create(node, "ada", "--scope", "client")
    wrong = "klk_" + "a" * 32
    assert node.request("GET", "/stats", auth=secret).status == 200
    assert node.request("GET", "/stats", auth=wrong).status == 403
    node.terminate()
    database = sqlite3.connect(node.metadata / "kachery-lab.db")
    try:
        assert database.execute("SELECT count(*) FROM tokens").fetchone() == (2,)
    finally:
        database.close()
    for path in [*files_below(node.storage), *files_below(node.metadata), node.log_path]:
        if path.name != "admin-token":
            data = path.read_bytes()
            assert secret.encode() not in data, path
            assert wrong.encode() not in data, path
    assert (node.metadata / "admin-token").stat().st_mode & 0o777 == 0o600


def test_a_given_admin_token(make_node: Callable[..., RunningNode], tmp_path: Path) -> None:
    given = tmp_path / "secret"
    given.write_text("my-own-admin-token\n")
    node = make_node(env={"KACHERY_LAB_ADMIN_TOKEN_FILE": str(given)}).start()
    assert not (node.metadata / "admin-token").exists()
    assert node.request("GET", "/api/v1/blobs", auth="my-own-admin-token").status == 200
    node.terminate()
    node.start()
    assert [row["USER"] for row in rows(node)] == ["admin"]
