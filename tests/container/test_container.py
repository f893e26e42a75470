"""The image as a lab runs it, used by unmodified kachery-client through the mounted directory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.clients.environment import build, client_python, client_variables, runs_for_anyone
from tests.container.engine import (
    PROJECT,
    Container,
    build_image,
    docker,
    free_port,
    http,
    running,
    why_no_engine,
)

pytestmark = pytest.mark.timeout(600)

SERVER = 23401
GROUP = 23410
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true", "--tmpfs", "/tmp")
AS_SERVER = ("--user", f"{SERVER}:{SERVER}", "--group-add", str(GROUP))


@pytest.fixture(scope="module")
def image() -> str:
    """The image, built from this tree."""
    reason = why_no_engine()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)
    return build_image()


@dataclass(frozen=True)
class User:
    """A user of the host with no rights but what uid and groups give."""

    uid: int
    groups: tuple[int, ...]
    private: Path
    lab: Lab

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the client's environment as this user, with the storage where the host has it."""
        return subprocess.run(
            command,
            env=client_variables(self.lab.storage, self.lab.port, self.private, self.lab.python),
            user=self.uid,
            group=self.uid,
            extra_groups=list(self.groups),
            cwd=self.private,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def succeeds(self, *command: str) -> str:
        """Run a command that has to work; what it printed."""
        done = self.run(*command)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def python(self, code: str) -> str:
        """Run a program of the client's Python that has to work; what it printed."""
        return self.succeeds("python", "-c", code)

    def write(self, name: str, content: bytes, directory: Path | None = None, mode: int = 0o644) -> Path:
        """A file of this user."""
        path = (directory or self.private) / name
        path.write_bytes(content)
        os.chown(path, self.uid, self.uid)
        path.chmod(mode)
        return path


@dataclass(frozen=True)
class Lab:
    """Directories of the host and the client's Python, all reachable for every user."""

    root: Path
    port: int
    python: Path
    storage_name: str = "storage"

    @property
    def storage(self) -> Path:
        """The attached storage."""
        return self.root / self.storage_name

    @property
    def recordings(self) -> Path:
        """The lab's data, mounted elsewhere in the container."""
        return self.root / "recordings"

    def directory(self, name: str, uid: int, mode: int) -> Path:
        """A new directory that belongs to this user."""
        path = self.root / name
        path.mkdir()
        os.chown(path, uid, uid)
        path.chmod(mode)
        return path

    def user(self, name: str, uid: int, *groups: int) -> User:
        """A user with a directory of their own."""
        return User(uid, groups, self.directory(name, uid, 0o700), self)


@pytest.fixture(scope="module")
def lab(image: str) -> Iterator[Lab]:
    """The host's side of the mounts."""
    root = Path(tempfile.mkdtemp(prefix="kachery-lab-container-"))
    root.chmod(0o755)
    try:
        python = client_python()
        if not runs_for_anyone(python):
            python = build(root / "client", anyone=True)
        made = Lab(root, free_port(), python)
        made.directory("storage", SERVER, 0o755)
        made.directory("meta", SERVER, 0o700)
        made.directory("recordings", 23402, 0o755)
        yield made
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def member(lab: Lab) -> User:
    """A member of the lab, in the auth group."""
    return lab.user("member", 23402, GROUP)


@pytest.fixture(scope="module")
def colleague(lab: Lab) -> User:
    """Another member of the lab."""
    return lab.user("colleague", 23403, GROUP)


@pytest.fixture(scope="module")
def stranger(lab: Lab) -> User:
    """A user of the same host outside the auth group."""
    return lab.user("stranger", 23404, 23404)


@pytest.fixture(scope="module")
def server(lab: Lab) -> Iterator[Container]:
    """The node, run as unprivileged as an engine can."""
    with running(
        f"kachery-lab-test-{os.getpid()}",
        lab.port,
        *HARDENED,
        *AS_SERVER,
        *("--health-interval", "1s"),
        *("-v", f"{lab.storage}:/data", "-v", f"{lab.root / 'meta'}:/meta", "-v", f"{lab.recordings}:/recordings:ro"),
        environment={
            "KACHERY_LAB_AUTH_GROUP": str(GROUP),
            "KACHERY_LAB_ADVERTISED_STORAGE_DIR": str(lab.storage),
            "KACHERY_LAB_PATH_MAP": f"{lab.recordings}=/recordings",
        },
    ) as container:
        container.wait_ready()
        yield container


def auth_code(lab: Lab) -> str:
    """The code that the lab's clients read from the storage."""
    return (lab.storage / "client-auth").read_text()


def stored_path(lab: Lab, uri: str) -> Path:
    """Where clients look for a stored file."""
    found = re.match(r"sha1://([0-9a-f]{40})", uri)
    assert found is not None, uri
    sha1 = found.group(1)
    return lab.storage / "sha1" / sha1[0:2] / sha1[2:4] / sha1[4:6] / sha1


def test_it_runs_as_the_given_user_without_any_power(server: Container) -> None:
    assert server.execute("id", "-u").stdout.strip() == str(SERVER)
    assert str(GROUP) in server.execute("id", "-G").stdout.split()
    status = dict(line.split(":\t", 1) for line in server.execute("cat", "/proc/1/status").stdout.splitlines())
    assert status["Uid"].split() == [str(SERVER)] * 4
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    refused = server.execute("touch", "/opt/kachery-lab/written", check=False)
    assert refused.returncode != 0 and "Read-only file system" in refused.stdout


def test_the_image_itself_names_no_root(image: str) -> None:
    config = json.loads(docker("image", "inspect", image).stdout)[0]["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["kachery-lab"] and config["Cmd"] == ["start"]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


def test_it_says_that_it_lives_and_is_ready_and_becomes_healthy(server: Container) -> None:
    assert http(server.port, "/livez").status == 200
    assert http(server.port, "/readyz").status == 200
    server.wait_health("healthy")
    check = server.inspect()["Config"]["Healthcheck"]["Test"][1:]
    assert server.execute(*check, check=False).returncode == 0
    nobody_listens = docker("exec", "-e", "KACHERY_DAEMON_PORT=1", server.name, *check, check=False)
    assert nobody_listens.returncode == 1


def test_the_image_runs_without_options_on_volumes_of_the_engine(image: str) -> None:
    port = free_port()
    with running(f"kachery-lab-test-plain-{os.getpid()}", port) as container:
        container.wait_ready()
        assert container.execute("id", "-u").stdout.strip() == "10001"
        assert http(port, "/probe").status == 200


def test_kachery_info_tells_a_member_of_access(server: Container, lab: Lab, member: User) -> None:
    said = member.succeeds("kachery-info")
    node_id = (lab.storage / "kachery-node-id").read_text()
    assert f"Node ID: {node_id}" in said
    assert "You have access to this daemon" in said


def test_what_one_member_stores_another_loads(server: Container, lab: Lab, member: User, colleague: User) -> None:
    content = os.urandom(100_000)
    uri = member.succeeds("kachery-store", str(member.write("notes.bin", content)))
    assert uri == f"sha1://{hashlib.sha1(content).hexdigest()}/notes.bin"

    path = Path(colleague.succeeds("kachery-load", uri))
    assert path == stored_path(lab, uri)
    assert path.read_bytes() == content
    assert path.stat().st_uid == SERVER
    copy = colleague.private / "copy.bin"
    colleague.succeeds("kachery-load", uri, "--dest", str(copy))
    assert copy.read_bytes() == content


def test_a_large_file_gets_a_manifest(server: Container, lab: Lab, member: User, colleague: User) -> None:
    content = os.urandom(1_000_000) * 41
    uri = member.succeeds("kachery-store", str(member.write("large.bin", content)))
    assert "?manifest=" in uri
    manifest = colleague.python(f"import kachery_client as kc; print(kc.load_text('sha1://{uri.rpartition('=')[2]}'))")
    assert json.loads(manifest)["size"] == len(content)
    assert Path(colleague.succeeds("kachery-load", uri)).stat().st_size == len(content)


def test_a_recording_is_linked_where_it_lies(server: Container, lab: Lab, member: User, colleague: User) -> None:
    content = os.urandom(300_000)
    recording = member.write("day1.rec", content, lab.recordings)
    uri = member.succeeds("kachery-link", str(recording))
    assert uri == f"sha1://{hashlib.sha1(content).hexdigest()}/day1.rec"

    assert not stored_path(lab, uri).exists()
    record = json.loads(Path(f"{stored_path(lab, uri)}.link").read_text())
    assert record["path"] == str(recording)
    assert colleague.succeeds("kachery-load", uri) == str(recording)
    served = http(server.port, f"/api/v1/blobs/{hashlib.sha1(content).hexdigest()}", code=auth_code(lab))
    assert served.status == 200 and served.body == content


def test_only_files_that_the_lab_may_read_are_linked(server: Container, lab: Lab, member: User) -> None:
    closed = member.write("closed.rec", b"closed", lab.recordings, mode=0o600)
    elsewhere = member.write("elsewhere.rec", b"elsewhere")
    for path in (closed, elsewhere):
        done = member.run("kachery-link", str(path))
        assert done.returncode != 0
        assert not Path(f"{stored_path(lab, f'sha1://{hashlib.sha1(path.read_bytes()).hexdigest()}')}.link").exists()


def test_feeds_and_mutables_work(server: Container, member: User, colleague: User) -> None:
    member.python("import kachery_client as kc; assert kc.set('container-test', {'answer': 42})")
    assert colleague.python("import kachery_client as kc; print(kc.get('container-test'))") == "{'answer': 42}"
    uri = member.python(
        "import kachery_client as kc; feed = kc.create_feed('container-test');"
        "feed.load_subfeed('main').append_messages([{'n': 0}, {'n': 1}]); print(feed.uri)"
    ).splitlines()[-1]
    read = f"import kachery_client as kc; print(kc.load_feed({uri!r}).load_subfeed('main').get_next_messages())"
    assert colleague.python(read) == "[{'n': 0}, {'n': 1}]"


def test_a_user_outside_the_group_is_refused(server: Container, lab: Lab, stranger: User) -> None:
    mode = (lab.storage / "client-auth").stat()
    assert (mode.st_uid, mode.st_gid, mode.st_mode & 0o777) == (SERVER, GROUP, 0o640)
    said = stranger.succeeds("kachery-info")
    assert "You do not have access to this daemon" in said

    content = os.urandom(1000)
    done = stranger.run("kachery-store", str(stranger.write("mine.bin", content)))
    assert done.returncode != 0
    assert "Unable to read client auth file" in done.stderr
    assert http(server.port, "/store", data=content).status == 403
    assert http(server.port, "/store", code="a" * 12, data=content).status == 403
    assert not stored_path(lab, f"sha1://{hashlib.sha1(content).hexdigest()}").exists()


def test_secrets_are_closed_to_everyone_else(server: Container, lab: Lab, stranger: User, member: User) -> None:
    for user in (stranger, member):
        for name in ("storage/private.pem", "storage/feeds-log", "storage/records-log", "meta/admin-token"):
            assert (lab.root / name).exists()
            assert user.run("ls", f"{lab.root / name}/").returncode != 0
            assert user.run("cat", f"{lab.root / name}").returncode != 0


@pytest.mark.parametrize("name", ["data", "meta"])
def test_a_mount_that_cannot_be_written_stops_the_start(image: str, lab: Lab, name: str) -> None:
    good = lab.directory(f"writable-beside-{name}", SERVER, 0o700)
    closed = lab.directory(f"closed-{name}", 0, 0o755)
    mounts = {"data": good, "meta": good, name: closed}
    done = docker(
        "run", "--rm", *HARDENED, *AS_SERVER,
        *(part for at, path in mounts.items() for part in ("-v", f"{path}:/{at}")), image, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"chown -R {SERVER}:{SERVER} /{name}" in done.stdout
    assert list(closed.iterdir()) == []


def test_a_kill_loses_nothing_that_was_acknowledged(server: Container, lab: Lab, member: User, colleague: User) -> None:
    content = os.urandom(50_000)
    uri = member.succeeds("kachery-store", str(member.write("before.bin", content)))
    recording = member.write("before.rec", content[:1000], lab.recordings)
    link = member.succeeds("kachery-link", str(recording))
    feed = member.python(
        "import kachery_client as kc; feed = kc.create_feed('killed'); kc.set('killed', [1, 2]);"
        "feed.load_subfeed('main').append_messages([{'n': i} for i in range(5)]); print(feed.uri)"
    ).splitlines()[-1]
    node_id = (lab.storage / "kachery-node-id").read_text()

    docker("kill", "-s", "KILL", server.name)
    docker("wait", server.name)
    docker("start", server.name)
    server.wait_ready()

    assert Path(colleague.succeeds("kachery-load", uri)).read_bytes() == content
    assert colleague.succeeds("kachery-load", link) == str(recording)
    for wanted in (content, content[:1000]):
        served = http(server.port, f"/api/v1/blobs/{hashlib.sha1(wanted).hexdigest()}", code=auth_code(lab))
        assert served.status == 200 and served.body == wanted
    assert colleague.python("import kachery_client as kc; print(kc.get('killed'))") == "[1, 2]"
    read = f"import kachery_client as kc; print(len(kc.load_feed({feed!r}).load_subfeed('main').get_next_messages()))"
    assert colleague.python(read) == "5"
    assert (lab.storage / "kachery-node-id").read_text() == node_id
    member.succeeds("kachery-store", str(member.write("after.bin", content + b"after")))


def test_stop_ends_it_in_time_with_exit_code_0(server: Container, member: User) -> None:
    uri = member.succeeds("kachery-store", str(member.write("stopped.bin", os.urandom(1000))))
    began = time.monotonic()
    assert server.stop() == 0, server.logs()
    assert time.monotonic() - began < 30
    docker("start", server.name)
    server.wait_ready()
    member.succeeds("kachery-load", uri)


@pytest.fixture
def composed(lab: Lab, image: str) -> Iterator[tuple[list[str], dict[str, str], int]]:
    """The compose command for this lab's directories, its environment and port; brought down at the end."""
    command = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    if docker("compose", "version", check=False).returncode != 0 and command[0] == "docker":
        pytest.fail("no compose command") if os.environ.get("CI") == "true" else pytest.skip("no compose command")
    port = free_port()
    environment = {
        **os.environ,
        "KACHERY_LAB_IMAGE": image,
        "KACHERY_STORAGE_DIR": str(lab.directory("composed-storage", SERVER, 0o755)),
        "KACHERY_LAB_METADATA_DIR": str(lab.directory("composed-meta", SERVER, 0o700)),
        "KACHERY_LAB_AUTH_GROUP": str(GROUP),
        "KACHERY_DAEMON_PORT": str(port),
        "UID_GID": f"{SERVER}:{SERVER}",
    }
    command += ["-p", f"kachery-lab-test-{os.getpid()}", "-f", str(PROJECT / "compose" / "lab.yaml")]
    try:
        yield command, environment, port
    finally:
        subprocess.run([*command, "down", "-v", "-t", "40"], env=environment, capture_output=True, check=False)


def test_the_compose_file_brings_a_node_up(
    composed: tuple[list[str], dict[str, str], int], lab: Lab, member: User
) -> None:
    command, environment, port = composed

    def compose(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    assert "read_only: true" in compose("config")
    compose("up", "-d", "--no-build")
    container = Container(compose("ps", "-q"), port)
    container.wait_ready()
    config = container.inspect()["HostConfig"]
    assert config["ReadonlyRootfs"] is True
    assert config["CapDrop"] == ["ALL"]
    assert config["PortBindings"]["20431/tcp"][0]["HostIp"] == "127.0.0.1"

    there = replace(lab, port=port, storage_name="composed-storage")
    assert json.loads(http(port, "/probe").body)["kacheryStorageDir"] == str(there.storage)
    user = replace(member, lab=there)
    assert "You have access to this daemon" in user.succeeds("kachery-info")
    uri = user.succeeds("kachery-store", str(user.write("composed.bin", b"composed")))
    assert stored_path(there, uri).read_bytes() == b"composed"
