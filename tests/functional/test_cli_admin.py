"""Everything can be done by command: on the node here, whether its server runs or not, and on a server by its URL."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kachery_lab.core.keys import PrivateKey
from tests.commands import run_command
from tests.servers import RunningNode

NODE = PrivateKey.from_seed("01" * 32).public_hex
Run = Callable[..., subprocess.CompletedProcess[str]]


def ok(run: Run, *arguments: str) -> str:
    done = run(*arguments)
    assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout


def refused(run: Run, *arguments: str) -> str:
    done = run(*arguments)
    assert done.returncode in (1, 2), (arguments, done.stdout)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def remote(node: RunningNode, tmp_path: Path, token: str) -> Run:
    """Commands on another machine: no storage, no socket, only the variables."""
    secret = tmp_path / "token"
    secret.write_text(token + "\n")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("KACHERY_")}
        kept |= {"KACHERY_LAB_SERVER": f"http://127.0.0.1:{node.port}", "KACHERY_LAB_TOKEN_FILE": str(secret)}
        kept["HOME"] = str(tmp_path / "nowhere")
        return run_command(arguments, kept)

    return run


def here(node: RunningNode) -> Run:
    """Commands with this node's settings."""
    return lambda *arguments: run_command(arguments, node.environment())


def walk(run: Run) -> None:
    """Users, channel, node, roles, passcode, and away again."""
    ok(run, "user", "add", "ann")
    assert "ann" in ok(run, "user", "list")
    assert "there is a user 'ann' already" in refused(run, "user", "add", "ann")
    assert ok(run, "user", "show", "ann").splitlines()[0].split() == ["name", "ann"]
    ok(run, "channel", "create", "recordings", "--owner", "ann", "--max-bytes", "2TB", "--retention-days", "30")
    assert "2000000000000" in ok(run, "channel", "list")
    shown = ok(run, "channel", "update", "recordings", "--max-bytes", "none", "--max-object-bytes", "1GiB")
    assert {"maxBytes          -", "maxObjectBytes    1073741824"} <= set(shown.splitlines())
    ok(run, "node", "add", NODE, "--label", "rig-1", "--owner", "ann")
    assert NODE in ok(run, "node", "list")
    ok(run, "node", "approve", NODE)
    changed = ok(run, "node", "update", NODE, "--label", "rig-2", "--owner", "ben").splitlines()
    assert [line.split() for line in changed[1:3]] == [["owner", "ben"], ["label", "rig-2"]]
    ok(run, "node", "update", NODE, "--owner", "ann")
    assert ok(run, "node", "show", NODE).splitlines()[1].split() == ["owner", "ann"]
    text = ok(run, "channel", "passcode", "add", "recordings", "--role", "requestTasks", "--label", "visitors").strip()
    listed = ok(run, "channel", "passcode", "list", "recordings")
    assert "visitors" in listed
    assert text not in listed
    joined = ok(run, "channel", "join", "recordings", "--node", NODE, "--role", "all", "--passcode", text)
    assert "effective         requestTasks" in joined
    ok(run, "channel", "grant", "recordings", f"node:{NODE}", "--role", "requestFiles", "--role", "provideFiles")
    assert "requestFiles requestTasks provideFiles" in ok(run, "channel", "members", "recordings")
    joined = ok(run, "node", "channels", NODE).splitlines()
    assert (len(joined), joined[1].split()[0], joined[1].split()[-1]) == (2, "recordings", "local")
    ok(run, "channel", "passcode", "remove", "recordings", listed.splitlines()[1].split()[0])
    ok(run, "channel", "revoke", "recordings", f"node:{NODE}")
    ok(run, "channel", "leave", "recordings", "--node", NODE)
    assert "expected user:NAME" in refused(run, "channel", "grant", "recordings", "ann", "--role", "all")
    assert "usedBytes" in ok(run, "channel", "show", "recordings")
    ok(run, "channel", "remove", "recordings")
    ok(run, "node", "remove", NODE)
    ok(run, "user", "remove", "ann")
    assert "there is no user" in refused(run, "user", "show", "ann")
    assert "there is no channel 'recordings'" in refused(run, "channel", "show", "recordings")
    newest = ok(run, "audit", "list", "--limit", "3", "--outcome", "done")
    assert [line.split()[-4:-2] for line in newest.splitlines()[1:]] == [
        *(["user.remove", "ann"], ["node.remove", NODE], ["channel.remove", "recordings"])
    ]


def test_without_a_server(make_node: Callable[..., RunningNode]) -> None:
    node = make_node()
    walk(here(node))
    token = ok(here(node), "token", "create", "ann", "--scope", "channel-owner", "--days", "1").strip()
    node.start()
    assert node.request("GET", "/api/admin/v1/channels", auth=token).json() == {"channels": []}
    assert node.request("GET", "/api/admin/v1/channels", auth=node.admin_token).status == 200


def test_through_the_socket(node: RunningNode) -> None:
    walk(here(node))
    assert "operator:operator" in ok(here(node), "audit", "list")


def test_by_url_and_token(node: RunningNode, tmp_path: Path) -> None:
    run = remote(node, tmp_path, node.admin_token)
    walk(run)
    assert "user:admin" in ok(run, "audit", "list")
    assert not (tmp_path / "nowhere").exists()


def test_a_channel_owner(node: RunningNode, tmp_path: Path) -> None:
    token = ok(here(node), "token", "create", "ann", "--scope", "channel-owner", "--channel", "recordings").strip()
    run = remote(node, tmp_path, token)
    ok(run, "channel", "create", "recordings")
    ok(run, "channel", "grant", "recordings", "user:ben", "--role", "all")
    assert "only an admin makes channels for others" in refused(run, "channel", "create", "tracking")
    for words in (["user", "list"], ["token", "list"], ["audit", "list"], ["reindex", "--dry-run"]):
        assert "this needs the scope admin" in refused(run, *words)
    identity = ok(here(node), "token", "list").splitlines()
    row = next(line for line in identity if "  ann  " in line)
    assert "recordings" in row
    shown = dict(
        line.split() for line in ok(here(node), "token", "show", row.split()[0]).splitlines() if "At" not in line
    )
    assert shown == {
        "id": row.split()[0],
        "user": "ann",
        "label": "-",
        "scopes": "channel-owner",
        "channels": "recordings",
    }
    ok(here(node), "token", "revoke", row.split()[0])
    assert "unknown, expired or revoked" in refused(run, "channel", "list")


def test_joining_with_the_servers_own_node(node: RunningNode, tmp_path: Path) -> None:
    run = remote(node, tmp_path, node.admin_token)
    ok(run, "channel", "create", "recordings")
    own = node.request("GET", "/api/v1/info").json()["nodeId"]
    assert own in ok(run, "channel", "join", "recordings")
    ok(run, "channel", "leave", "recordings")


def test_joining_before_the_first_start_says_what_to_do(make_node: Callable[..., RunningNode]) -> None:
    node = make_node()
    run = here(node)
    ok(run, "channel", "create", "recordings")
    told = refused(run, "channel", "join", "recordings")
    assert "own node" in told and "kachery-lab start" in told
    assert "there is no node" in refused(run, "channel", "join", "recordings", "--node", NODE)
    node.start()
    ok(run, "channel", "join", "recordings")


def test_the_settings_of_a_running_server(make_node: Callable[..., RunningNode], tmp_path: Path) -> None:
    """What it works with, not what the machine of the command would."""
    node = make_node(env={"KACHERY_LAB_RESTORE_DAYS": "7", "KACHERY_LAB_ADMIN_TOKEN": "a-token-of-20-letters"}).start()
    run = remote(node, tmp_path, "a-token-of-20-letters")
    assert "KACHERY_LAB_RESTORE_DAYS=30  # default" in ok(run, "config").splitlines()
    running = ok(run, "config", "--running", "--explain").splitlines()
    assert "KACHERY_LAB_RESTORE_DAYS=7  # KACHERY_LAB_RESTORE_DAYS" in running
    assert "KACHERY_LAB_ADMIN_TOKEN=********  # KACHERY_LAB_ADMIN_TOKEN" in running
    variables = [line.partition("=")[0] for line in running if not line.startswith(" ")]
    assert variables == [line.partition("=")[0] for line in ok(run, "config").splitlines()]


def upload(node: RunningNode, token: str, content: bytes) -> str:
    """Put a file into `recordings` as kachery 2 does; its SHA-1."""
    sha1 = hashlib.sha1(content).hexdigest()
    file = {"size": len(content), "hashAlg": "sha1", "hash": sha1, "zoneName": "recordings"}
    ask = {"type": "initiateFileUploadRequest", **file, "workToken": "x"}
    url = node.post("/api/initiateFileUpload", ask, auth=token).json()["signedUploadUrl"]
    assert node.request("PUT", url[url.index("/bucket/") :], content, auth=False).status == 200
    key = f"recordings/sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"
    done = {"type": "finalizeFileUploadRequest", "objectKey": key, **file}
    assert node.post("/api/finalizeFileUpload", done, auth=token).status == 200
    return sha1


def test_lists_say_how_to_go_on(node: RunningNode, tmp_path: Path) -> None:
    run = remote(node, tmp_path, node.admin_token)
    ok(run, "channel", "create", "recordings", "--owner", "ann")
    writer = ok(run, "token", "create", "ann", "--scope", "read", "--scope", "write").strip()
    files = [upload(node, writer, content) for content in (b"one", b"two", b"three")]
    for words, option, order in (
        (("channel", "objects", "recordings"), "--after", sorted(files)),
        (("upload", "list", "--since", "2020-01-01"), "--before", files[::-1]),
    ):
        first = run(*words, "--limit", "2")
        told, place = first.stderr.rsplit(maxsplit=1)
        assert told == f"there is more: {option}"
        rest = run(*words, option, place)
        rows = [line.split()[-1] for done in (first, rest) for line in done.stdout.splitlines()[1:]]
        assert [row.rpartition("/")[2] for row in rows] == order
        assert rest.stderr == ""
    assert len(ok(run, "upload", "list", "--until", "2020-01-01").splitlines()) == 1
    assert "expected a day like 2026-01-31" in refused(run, "upload", "list", "--since", "yesterday")
    for file in files[:2]:
        ok(run, "channel", "delete", "recordings", file)
    assert "there is more: --after" in run("channel", "deletions", "recordings", "--limit", "1").stderr
    assert "there is more: --before" in run("audit", "list", "--limit", "1").stderr
    assert run("usage", "--channel", "recordings", "--after", "2020-01-01/recordings/").stdout.count("recordings") == 1


def test_reindex_without_a_database(make_node: Callable[..., RunningNode]) -> None:
    """Users, tokens, channels and roles are there again, and the node starts."""
    node = make_node().start()
    ok(here(node), "channel", "create", "recordings", "--owner", "ann")
    ok(here(node), "channel", "grant", "recordings", "user:ben", "--role", "requestFiles")
    token = ok(here(node), "token", "create", "ann", "--scope", "channel-owner").strip()
    node.store(b"abc")
    paths = ["/users", "/tokens", "/channels", "/channels/recordings/authorizations", "/nodes"]
    before = [node.request("GET", f"/api/admin/v1{path}", auth=node.admin_token).json() for path in paths]
    assert node.terminate() == 0
    for file in node.metadata.glob("kachery-lab.db*"):
        file.unlink()
    assert "reindex" in refused(here(node), "user", "list")
    assert '"failed": 0' in ok(here(node), "reindex")
    node.start()
    after = [node.request("GET", f"/api/admin/v1{path}", auth=node.admin_token).json() for path in paths]
    for answers in (before, after):
        # The server's own node is connected anew.
        answers[-1] = [{**row, "connectedAt": None} for row in answers[-1]["nodes"]]
    assert after == before
    assert node.request("GET", "/api/admin/v1/channels/recordings", auth=token).status == 200


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("http://127.0.0.1:1", "does not answer"),
        ("ftp://lab", "KACHERY_LAB_SERVER"),
        ("127.0.0.1:20431", "KACHERY_LAB_SERVER"),
        ("http://me:secret@lab", "KACHERY_LAB_SERVER"),
    ],
)
def test_a_server_that_is_none(make_node: Callable[..., RunningNode], server: str, expected: str) -> None:
    told = refused(here(make_node()), "user", "list", "--server", server, "--token", "klk_x")
    assert expected in told
    assert "secret" not in told


def test_plain_text_to_another_host_is_said(make_node: Callable[..., RunningNode]) -> None:
    told = refused(here(make_node()), "user", "list", "--server", "http://lab.invalid", "--token", "klk_x")
    assert "in plain text; use https" in told
    assert "klk_x" not in told


def test_no_text_of_others_reaches_the_terminal_raw(node: RunningNode) -> None:
    node.request("GET", "/api/admin/v1/channels/%1b%5b2J%e2%80%aex", auth=node.admin_token)
    shown = ok(here(node), "audit", "list", "--limit", "1")
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "/channels/?[2J?x" in shown


def test_task_functions_by_command_and_after_the_database_was_lost(make_node: Callable[..., RunningNode]) -> None:
    """Entries and run times are set, shown, restored from the copy on the storage, and taken away."""
    node = make_node().start()
    run = here(node)
    ok(run, "channel", "create", "recordings")
    ok(run, "function", "grant", "recordings", "add.1", "user:ben", "--role", "requestTasks")
    ok(run, "function", "limit", "recordings", "*", "90m")
    assert "requestTasks" in ok(run, "function", "list", "recordings")
    assert "expected a number of seconds" in refused(run, "function", "limit", "recordings", "add.1", "soon")
    assert "add.2" in refused(run, "function", "revoke", "recordings", "add.2", "user:ben")
    assert node.terminate() == 0
    for file in node.metadata.glob("kachery-lab.db*"):
        file.unlink()
    ok(run, "reindex")
    shown = ok(run, "function", "list", "recordings")
    assert [line.split() for line in shown.splitlines()[1:]] == [
        ["*", "5400", "-", "-", "-"],
        ["add.1", "-", "user", "ben", "requestTasks"],
    ]
    ok(run, "function", "revoke", "recordings", "add.1", "user:ben")
    ok(run, "function", "limit", "recordings", "*", "none")
    assert len(ok(run, "function", "list", "recordings").splitlines()) == 1
