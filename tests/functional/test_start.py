"""Starting and stopping: what a person sees, what is published, what stays."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kachery_lab.cli.start import plain_http
from kachery_lab.settings import load_settings
from tests.servers import RunningNode, files_below, free_port


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, []),
        ({"bind": "127.0.0.1,::1", "hub_url": "http://localhost:20431"}, []),
        ({"bind": "0.0.0.0"}, ["reach this server over plain http"]),
        ({"bind": "0.0.0.0", "public_url": "http://lab.example"}, ["reach this server over plain http"]),
        ({"bind": "0.0.0.0", "public_url": "https://lab.example"}, []),
        ({"bind": "0.0.0.0", "trusted_proxies": "10.0.0.1"}, []),
        ({"public_url": "http://lab.example"}, ["KACHERY_LAB_PUBLIC_URL is plain http"]),
        ({"hub_url": "http://hub.example"}, ["KACHERY_LAB_HUB_URL is plain http"]),
        ({"hub_url": "https://hub.example"}, []),
    ],
    ids=str,
)
def test_plain_http_beyond_this_machine_is_warned_of(flags: dict[str, str], expected: list[str]) -> None:
    found = plain_http(load_settings(flags))
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))


def test_the_welcome_says_what_to_do_next(make_node: Callable[..., RunningNode]) -> None:
    node = make_node(env={"KACHERY_LAB_LABEL": "rig-1", "KACHERY_LAB_OWNER": "ada"}, fresh=True).start()
    welcome = node.log
    node_id = (node.storage / "kachery-node-id").read_text()
    assert re.fullmatch("[0-9a-f]{64}", node_id)
    for line in (
        f"  node id   {node_id}",
        "  label     rig-1",
        "  owner     ada",
        f"  storage   {node.storage}",
        f"  metadata  {node.metadata}",
        f"  URL       http://localhost:{node.port}",
        f"  export KACHERY_DAEMON_PORT={node.port}",
        f"  export KACHERY_STORAGE_DIR={node.storage}",
    ):
        assert line in welcome.splitlines()
    assert "KACHERY_LAB_BIND=" in welcome
    assert node.code not in welcome
    assert node.admin_token not in welcome
    assert node.store(b"abc").json()["sha1"] == "a9993e364706816aba3e25717850c26c9cd0d89d"
    assert (node.storage / "owner").read_text() == "ada"


def test_sigterm_ends_cleanly_and_a_second_start_is_the_same_node(make_node: Callable[..., RunningNode]) -> None:
    node = make_node(env={"KACHERY_LAB_OWNER": "ada"}).start()
    node_id = node.request("GET", "/probe").json()["nodeId"]
    code, token = node.code, node.admin_token
    assert re.fullmatch("[A-Za-z]{12}", code)
    assert (node.storage / "client-auth").stat().st_mode & 0o777 == 0o640
    assert node.terminate() == 0
    assert not (node.metadata / "admin.sock").exists()
    node.env = {}
    node.start()
    assert node.request("GET", "/probe").json()["nodeId"] == node_id
    assert "owner     ada" in node.log.rpartition("kachery-lab is running.")[2]
    assert node.code != code
    assert node.admin_token == token
    for known in (code, node.code):
        headers = {"KACHERY-CLIENT-AUTH-CODE": known}
        assert node.request("GET", "/stats", headers=headers, auth=False).status == 200
    older = code
    node.terminate()
    node.start()
    assert node.request("GET", "/stats", headers={"KACHERY-CLIENT-AUTH-CODE": older}, auth=False).status == 403


def test_sigterm_ends_long_polls_with_an_answer(node: RunningNode) -> None:
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    waiting = subprocess.Popen([sys.executable, "-c", _WATCH, str(node.port), node.code, feed], stdout=subprocess.PIPE)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == b"asked\n"
    # What came later is answered: the watch has been read.
    for _ in range(5):
        assert node.request("GET", "/stats").status == 200
    started = time.monotonic()
    assert node.terminate() == 0
    output, _ = waiting.communicate(timeout=30)
    assert output == b'200 {"success":true,"messages":{"w":[]}}'
    assert time.monotonic() - started < 25


_WATCH = """
import http.client, json, sys
port, code, feed = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", int(port))
watch = {"feedId": feed, "subfeedHash": "0" * 40, "position": 0, "channelName": "*local*"}
body = json.dumps({"subfeedWatches": {"w": watch}, "waitMsec": 30000})
connection.request("POST", "/feed/watchForNewMessages", body,
                   {"Content-Type": "application/json", "KACHERY-CLIENT-AUTH-CODE": code})
print("asked", flush=True)
answer = connection.getresponse()
print(answer.status, answer.read().decode(), end="")
"""


def test_halt(make_node: Callable[..., RunningNode]) -> None:
    node = make_node().start()
    assert node.request("GET", "/halt", auth=False).status == 403
    assert node.request("GET", "/halt").json() == {"success": True}
    assert node.process is not None
    assert node.process.wait(30) == 0
    node.env = {"KACHERY_LAB_ALLOW_HALT": "false"}
    node.start()
    refused = node.request("GET", "/halt")
    assert refused.status == 403
    assert b"KACHERY_LAB_ALLOW_HALT" in refused.body
    assert node.store(b"still here").status == 200


def test_the_old_commands(make_node: Callable[..., RunningNode]) -> None:
    node = make_node()
    node.port = free_port()
    command = [script("kachery-daemon-start"), "--label", "old", "--owner", "ada@example.org", "--verbose", "1"]
    with node.log_path.open("ab") as log:
        node.process = subprocess.Popen(
            command, env=node.environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    node.wait_ready()
    assert "label     old" in node.log
    done = subprocess.run([script("kachery-daemon-info")], env=node.environment(), capture_output=True, text=True)
    assert done.stdout == (node.storage / "kachery-node-id").read_text() + "\n"
    info = node.run_cli("info").stdout
    assert f"node id   {done.stdout}" in info
    assert "server    running" in info
    assert "address   whichever a caller uses: KACHERY_LAB_PUBLIC_URL is not set" in info
    assert node.terminate() == 0
    assert "server    not running" in node.run_cli("info").stdout


def test_info_without_a_node(make_node: Callable[..., RunningNode]) -> None:
    node = make_node()
    for done in (
        node.run_cli("info"),
        subprocess.run([script("kachery-daemon-info")], env=node.environment(), capture_output=True, text=True),
    ):
        assert done.returncode == 1
        assert "kachery-lab start" in done.stderr
        assert "Traceback" not in done.stderr
    assert files_below(node.storage) == []


def test_config_shows_values_and_origins(make_node: Callable[..., RunningNode], tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text("very-secret\n")
    env = {
        "KACHERY_LAB_ADMIN_TOKEN": "also-secret",
        "KACHERY_LAB_LINK_ROOTS": "/data:/mnt/more",
        "KACHERY_LAB_PATH_MAP": "/host=/in,/b=/c",
        "KACHERY_LAB_MIN_FREE": "1GB",
    }
    node = make_node(env=env)
    done = node.run_cli("config", "--label", "here")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert f"KACHERY_STORAGE_DIR={node.storage}  # KACHERY_STORAGE_DIR" in lines
    assert "KACHERY_LAB_ADMIN_TOKEN=********  # KACHERY_LAB_ADMIN_TOKEN" in lines
    assert "KACHERY_LAB_LABEL=here  # flag" in lines
    assert "KACHERY_LAB_LINK_ROOTS=/data:/mnt/more  # KACHERY_LAB_LINK_ROOTS" in lines
    assert "KACHERY_LAB_PATH_MAP=/host=/in,/b=/c  # KACHERY_LAB_PATH_MAP" in lines
    assert "KACHERY_LAB_MIN_FREE=1000000000  # KACHERY_LAB_MIN_FREE" in lines
    assert "KACHERY_LAB_ALLOW_HALT=true  # default" in lines
    node.env = {"KACHERY_LAB_ADMIN_TOKEN_FILE": str(secret)}
    from_file = node.run_cli("config", "--explain").stdout
    assert "KACHERY_LAB_ADMIN_TOKEN=********  # KACHERY_LAB_ADMIN_TOKEN_FILE" in from_file
    assert "    First admin token" in from_file
    assert "secret" not in done.stdout.lower() + from_file.lower()
    assert files_below(node.storage) == []


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"KACHERY_DAEMON_PORT": "many"}, "KACHERY_DAEMON_PORT"),
        ({"KACHERY_LAB_MIN_FREE": "lots"}, "KACHERY_LAB_MIN_FREE"),
        ({"KACHERY_LAB_BIND": "999.1.1.1"}, "KACHERY_LAB_BIND"),
        ({"KACHERY_LAB_AUTH_GROUP": "no-such-group"}, "no-such-group"),
        ({"KACHERY_STORAGE_DIR": "/no/such/parent/storage"}, "/no/such/parent/storage"),
    ],
)
def test_a_bad_setting_is_one_clear_line(
    make_node: Callable[..., RunningNode], env: dict[str, str], named: str
) -> None:
    node = make_node(env=env)
    done = node.run_cli("start")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines[-1].startswith("  ") or len(lines) == 1, done.stderr
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith("kachery-lab: ")
    assert named in done.stderr
    assert files_below(node.storage) == []


def test_one_server_per_storage(node: RunningNode, make_node: Callable[..., RunningNode]) -> None:
    for second in (
        make_node("same", storage=node.storage, metadata=node.metadata),
        make_node("other-metadata", storage=node.storage),
    ):
        done = second.run_cli("start")
        assert done.returncode == 1
        assert "stop that one first" in done.stderr or "knows nothing of it" in done.stderr
        assert "Traceback" not in done.stderr
    same_port = make_node("same-port", env={"KACHERY_DAEMON_PORT": str(node.port)})
    done = same_port.run_cli("start")
    assert done.returncode == 1
    assert "KACHERY_DAEMON_PORT" in done.stderr
    assert files_below(same_port.storage) == []
    assert node.store(b"undisturbed").status == 200


@pytest.mark.parametrize(
    ("file", "unused"),
    [
        ("token", {"alembic", "jinja2", "sqlalchemy", "starlette", "structlog", "uvicorn", "websockets"}),
        ("start", {"alembic", "httpx2", "jinja2"}),
    ],
)
def test_what_a_command_has_no_use_for_is_not_imported(file: str, unused: set[str]) -> None:
    """Importing is most of what a person waits for."""
    code = f"import sys, kachery_lab.cli.{file}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"click", "pydantic"} <= set(done.stdout.split())
    assert not unused & set(done.stdout.split())
