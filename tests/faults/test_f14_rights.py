"""F14: wrong user, strict umask, an unwritable storage, a readable key, a shard without rights."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.report import histogram, missing, need_root, report
from tests.faults.test_f13_volume import refusal
from tests.faults.tools import UNDURABLE, leftovers, restart, sha1_of
from tests.servers import RunningNode, blob_path

UID = GID = 1234
AS_USER = ["setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups"]


@dataclass
class Place:
    """Directories that the other user can reach; pytest's own are closed to it."""

    root: Path

    def make(self, name: str, owner: int = UID, mode: int = 0o755) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        os.chown(path, owner, owner)
        path.chmod(mode)
        return path


@pytest.fixture
def place() -> Iterator[Place]:
    need_root()
    if shutil.which("setpriv") is None:
        missing("needs setpriv")
    root = Path(tempfile.mkdtemp(prefix="kachery-lab-rights-"))
    root.chmod(0o755)
    if subprocess.run([*AS_USER, sys.executable, "-c", "import kachery_lab"], capture_output=True, cwd=root).returncode:
        shutil.rmtree(root)
        missing(f"uid {UID} cannot run {sys.executable}")
    yield Place(root)
    shutil.rmtree(root)


@pytest.fixture
def user_node(place: Place) -> Iterator[RunningNode]:
    """A server of the other user, not started."""
    node = RunningNode(place.make("storage"), place.make("metadata"), prefix=AS_USER)
    yield node
    node.kill()


def own(node: RunningNode, owner: int) -> None:
    """What the printed line does: chown -R."""
    for path in [node.storage, *node.storage.rglob("*")]:
        os.chown(path, owner, owner)


def test_storage_of_another_user(user_node: RunningNode) -> None:
    """The message names path, user and mode, and the line that mends it does."""
    user_node.start()
    assert user_node.store(b"one").status == 200
    user_node.terminate()
    own(user_node, 4321)
    began = time.monotonic()
    text = refusal(user_node)
    milliseconds = (time.monotonic() - began) * 1000
    assert str(user_node.storage) in text
    assert f"{UID}:{GID}" in text
    assert "4321:4321" in text
    assert "mode 0755" in text
    assert f"chown -R {UID}:{GID} {user_node.storage}\n" in text
    own(user_node, UID)
    restart(user_node)
    assert user_node.store(b"two").status == 200
    report("F14 wrong uid", 1, start_up_ms=round(milliseconds))


def test_metadata_inside_a_storage_of_another_user(place: Place) -> None:
    """Where no metadata directory is named, the storage is what the message is about."""
    node = RunningNode(place.make("storage", owner=4321), place.make("elsewhere"), prefix=AS_USER)
    node.env = {"KACHERY_LAB_METADATA_DIR": str(node.storage / ".kachery-lab")}
    try:
        text = refusal(node)
        assert f"chown -R {UID}:{GID} {node.storage}\n" in text
        assert "4321:4321, mode 0755" in text
        own(node, UID)
        restart(node)
        assert node.store(b"one").status == 200
        node.terminate()
        own(node, 4321)
        text = refusal(node)
        assert f"chown -R {UID}:{GID} {node.storage}\n" in text
        own(node, UID)
        restart(node)
        assert node.store(b"two").status == 200
    finally:
        node.kill()
    report("F14 wrong uid, metadata inside", 2)


def test_unwritable_storage(user_node: RunningNode) -> None:
    user_node.storage.chmod(0o555)
    text = refusal(user_node)
    assert f"{user_node.storage} cannot be written" in text
    assert f"{UID}:{GID}, mode 0555" in text
    user_node.storage.chmod(0o755)
    restart(user_node)
    assert user_node.store(b"one").status == 200
    report("F14 unwritable storage", 1)


def test_probe_of_a_killed_start(user_node: RunningNode) -> None:
    """In a container every start has the same process id: a probe of a killed one must not stop the next."""
    places = f'touch "{user_node.storage}/.kachery-probe.$$" "{user_node.metadata}/.kachery-probe.$$"'
    user_node.prefix = ["sh", "-c", f'{places}; exec "$@"', "sh", *AS_USER]
    restart(user_node)
    assert user_node.store(b"one").status == 200
    assert leftovers(user_node.storage) + leftovers(user_node.metadata) == []
    report("F14 probe left behind", 1, temporary_files_left=0)


def test_strict_umask(user_node: RunningNode) -> None:
    """Clients that mount the directory as other users can read blobs all the same, and secrets not."""
    user_node.prefix = ["sh", "-c", 'umask 077; exec "$@"', "sh", *AS_USER]
    user_node.start()
    sha1 = sha1_of(b"readable")
    assert user_node.store(b"readable").status == 200
    path = blob_path(user_node.storage, sha1)
    for directory in path.parents:
        assert stat.S_IMODE(directory.stat().st_mode) & 0o005 == 0o005, directory
        if directory == user_node.storage:
            break
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    other = ["setpriv", "--reuid=4321", "--regid=4321", "--clear-groups", "cat", str(path)]
    assert subprocess.run(other, capture_output=True).stdout == b"readable"
    for secret in ("private.pem", "client-auth", "feeds-log", "records-log"):
        assert stat.S_IMODE((user_node.storage / secret).stat().st_mode) & 0o007 == 0, secret
    report("F14 umask 077", 1)


def test_key_that_others_can_read(user_node: RunningNode) -> None:
    user_node.start()
    user_node.terminate()
    key = user_node.storage / "private.pem"
    key.chmod(0o640)
    text = refusal(user_node)
    assert f"chmod 600 {key}" in text
    assert "0640" in text
    key.chmod(0o600)
    restart(user_node)
    report("F14 readable key", 1)


def test_one_shard_without_rights(user_node: RunningNode) -> None:
    """The blobs of that shard are 503, never 404; all others are served."""
    user_node.start()
    blobs = [b"blob %d" % number for number in range(12)]
    for data in blobs:
        assert user_node.store(data).status == 200
    closed = user_node.storage / "sha1" / sha1_of(blobs[0])[:2]
    expected = {
        sha1_of(data): 503 if (user_node.storage / "sha1" / sha1_of(data)[:2]) == closed else 200 for data in blobs
    }
    token = user_node.admin_token

    def ask(method: str = "GET") -> dict[str, int]:
        return {sha1: user_node.request(method, f"/api/v1/blobs/{sha1}", auth=token).status for sha1 in expected}

    assert set(ask().values()) == {200}
    closed.chmod(0)
    try:
        assert ask() == expected
        assert ask("HEAD") == expected
        restart_statuses = _restarted(user_node, ask)
        assert restart_statuses == expected
        assert user_node.store(blobs[0]).status == 503
        assert user_node.store(b"another").status == 200
        load = user_node.post("/loadFile", {"fileKey": {"sha1": sha1_of(blobs[0])}})
        assert b"unavailable" in load.body or b"cannot be used" in load.body, load.body
    finally:
        closed.chmod(0o755)
    assert set(ask().values()) == {200}
    report("F14 shard chmod 000", len(blobs), status_histogram=histogram(restart_statuses.values()))


def _restarted(node: RunningNode, ask: object) -> dict[str, int]:
    node.kill()
    restart(node)
    assert callable(ask)
    found = ask()
    assert isinstance(found, dict)
    return found


def test_controls(user_node: RunningNode) -> None:
    """Without the guards: no line that mends it, a start with a readable key, 404 for a closed shard."""
    guard = [*AS_USER, sys.executable, str(UNDURABLE)]
    user_node.start()
    assert user_node.store(b"one").status == 200
    user_node.terminate()

    key = user_node.storage / "private.pem"
    key.chmod(0o644)
    user_node.prefix = [*guard, "any_key_mode"]
    restart(user_node)
    user_node.terminate()
    key.chmod(0o600)

    user_node.prefix = [*guard, "denied_is_absent"]
    restart(user_node)
    closed = user_node.storage / "sha1" / sha1_of(b"one")[:2]
    closed.chmod(0)
    status = user_node.request("GET", f"/api/v1/blobs/{sha1_of(b'one')}", auth=user_node.admin_token).status
    closed.chmod(0o755)
    user_node.terminate()

    own(user_node, 4321)
    user_node.prefix = [*guard, "no_write_probe"]
    text = refusal(user_node)
    report("F14 controls", 3, closed_shard=status, chown_named="chown -R" in text)
    assert status == 404
    assert f"chown -R {UID}:{GID} {user_node.storage}\n" not in text
