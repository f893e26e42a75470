"""The published client, unmodified, through a hub: uploads, loads, ephemeral mode, public channels.

It can name no port, so it either speaks to port 80, or sends every request to the server as to a proxy. It prints
`None` and succeeds when it finds nothing, so bytes are compared and storer and loader have different directories.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kachery_lab.core.keys import PublicKey
from kachery_lab.core.roles import Role
from tests.clients.environment import client_python
from tests.hubs import OWNER, Hub, LabNode, path_of

HUB_NAME = "hub.lab"
SECONDS = 60


def port_80() -> bool:
    """Whether this user may listen on port 80, and nobody does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 80))
        except OSError:
            return False
    return True


class Client:
    """Commands of kachery-client with a directory of their own."""

    def __init__(self, hub: Hub, way: str, root: Path, *, storage: Path | None = None, node: LabNode | None = None):
        self.storage = storage or root / "storage"
        private = root / "private"
        for directory in (self.storage, private):
            directory.mkdir(parents=True, exist_ok=True)
        if node is not None:
            (self.storage / "owner").write_text(node.owner)
            (self.storage / "public.pem").write_text(PublicKey.parse(node.id).to_pem())
            (self.storage / "private.pem").write_text(node.key.to_pem())
        name = "127.0.0.1" if way == "port 80" else HUB_NAME
        self.python = client_python()
        self.private = private
        self.environment = {
            "HOME": str(private),
            # Where nobody listens, the client finds no daemon: ephemeral mode.
            "KACHERY_DAEMON_HOST": "127.0.0.1",
            "KACHERY_DAEMON_PORT": str(hub.port) if storage is not None else "9",
            "KACHERY_STORAGE_DIR": str(self.storage),
            "KACHERY_TEMP_DIR": f"{private}/kachery-tmp",
            "KACHERY_HUB_API_URI": f"http://{name}",
            "BITWOODER_API_URI": f"http://{name}",
            "LANG": "C.UTF-8",
            "PATH": f"{self.python.parent}:/usr/local/bin:/usr/bin:/bin",
            "TMPDIR": str(private),
        }
        if way == "proxy":
            self.environment |= {"http_proxy": hub.base, "no_proxy": "localhost,127.0.0.1"}

    def run(self, name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python.with_name(name), *map(str, arguments)],
            env=self.environment,
            cwd=self.private,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def last(self, name: str, *arguments: str | Path) -> str:
        """The last line of a command that succeeds."""
        done = self.run(name, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module", params=["port 80", "proxy"])
def way(request: pytest.FixtureRequest) -> str:
    if request.param == "port 80" and not port_80():
        pytest.skip("port 80 is taken or not ours to take; the other way is tested")
    return str(request.param)


@pytest.fixture(scope="module")
def hub(way: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    port = 80 if way == "port 80" else 0
    with Hub(tmp_path_factory.mktemp("hub"), port, allowed_hosts=(HUB_NAME,)) as running:
        yield running


@pytest.fixture
def channel(hub: Hub) -> str:
    """A private channel; this server's own node has every role in it."""
    name = f"c{time.monotonic_ns():x}"
    hub.make_channel(name)
    hub.join(hub.node.identity.node_id, name)
    return name


@pytest.fixture
def member(hub: Hub, channel: str) -> LabNode:
    node = LabNode()
    hub.register(node)
    hub.join(node, channel)
    return node


@pytest.fixture
def storer(hub: Hub, way: str, tmp_path: Path) -> Client:
    """A client beside the server, in whose directory it looks."""
    return Client(hub, way, tmp_path / "storer", storage=hub.storage)


@pytest.fixture
def loader(hub: Hub, way: str, tmp_path: Path, member: LabNode) -> Client:
    """An ephemeral client, elsewhere."""
    return Client(hub, way, tmp_path / "loader", node=member)


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[[int], Path]:
    def make(size: int) -> Path:
        path = tmp_path / "data.bin"
        path.write_bytes(os.urandom(size))
        return path

    return make


def plain_is_refused(hub: Hub, channel: str, data: bytes) -> None:
    for method in ("GET", "HEAD"):
        assert hub.request(method, f"/bucket/{channel}/{path_of(data)}").status == 404


def refusals(hub: Hub, channel: str) -> set[tuple[str, str]]:
    """(Who, action) of the audited refusals in a channel."""
    return {(who, action) for who, action, what, _ in hub.refusals() if what == channel}


@pytest.mark.parametrize("size", [0, 1, 300_000], ids=["empty", "1", "300 kB"])
def test_upload_and_ephemeral_load_from_a_private_channel(
    hub: Hub, channel: str, storer: Client, loader: Client, make_file: Callable[[int], Path], size: int
) -> None:
    source = make_file(size)
    data = source.read_bytes()
    plain_is_refused(hub, channel, data)
    uri = storer.last("kachery-store", source, "--upload-to-channel", channel)
    assert uri == f"sha1://{hashlib.sha1(data).hexdigest()}/data.bin"
    plain_is_refused(hub, channel, data)
    found = Path(loader.last("kachery-load", "-e", "--channel", channel, uri))
    assert loader.storage in found.parents
    assert found.read_bytes() == data
    plain_is_refused(hub, channel, data)


def test_a_role_that_is_taken_away_ends_loading(
    hub: Hub, way: str, channel: str, storer: Client, member: LabNode, tmp_path: Path, make_file: Callable[[int], Path]
) -> None:
    source = make_file(5000)
    uri = storer.last("kachery-store", source, "--upload-to-channel", channel)

    def load(place: str) -> str:
        return Client(hub, way, tmp_path / place, node=member).last("kachery-load", "-e", "--channel", channel, uri)

    hub.grant(member.id, channel, Role.ALL & ~Role.REQUEST_FILES)
    assert load("refused") == "None"
    assert (f"node:{member.id}", "bucket.read") in refusals(hub, channel)
    hub.grant(member.id, channel, Role.REQUEST_FILES)
    assert Path(load("granted")).read_bytes() == source.read_bytes()
    hub.revoke(member.id, channel)
    assert load("revoked") == "None"


def test_ephemeral_upload(
    hub: Hub, channel: str, loader: Client, member: LabNode, way: str, tmp_path: Path, make_file: Callable[[int], Path]
) -> None:
    source = make_file(70_000)
    data = source.read_bytes()
    hub.grant(member.id, channel, Role.REQUEST_FILES)
    done = loader.run("kachery-store", "-e", source, "--upload-to-channel", channel)
    assert done.returncode != 0
    assert (f"node:{member.id}", "upload.issue") in refusals(hub, channel)
    hub.grant(member.id, channel, Role.PROVIDE_FILES)
    uri = loader.last("kachery-store", "-e", source, "--upload-to-channel", channel)
    plain_is_refused(hub, channel, data)
    reader = LabNode()
    hub.register(reader)
    hub.join(reader, channel, Role.REQUEST_FILES)
    other = Client(hub, way, tmp_path / "reader", node=reader)
    assert Path(other.last("kachery-load", "-e", "--channel", channel, uri)).read_bytes() == data
    # Without a channel every membership's bucket is tried.
    third = Client(hub, way, tmp_path / "third", node=reader)
    assert Path(third.last("kachery-load", "-e", uri)).read_bytes() == data


def test_uploads_through_the_server_need_the_role(
    hub: Hub, channel: str, storer: Client, make_file: Callable[[int], Path]
) -> None:
    source = make_file(1000)
    own = hub.node.identity.node_id
    hub.grant(own, channel, Role.REQUEST_FILES)
    done = storer.run("kachery-store", source, "--upload-to-channel", channel)
    assert done.returncode != 0
    assert ("local:local", "file.upload") in refusals(hub, channel)
    hub.grant(own, channel, Role.PROVIDE_FILES)
    assert storer.last("kachery-store", source, "--upload-to-channel", channel).startswith("sha1://")


def test_load_through_the_server_says_what_is_missing(
    hub: Hub, channel: str, storer: Client, make_file: Callable[[int], Path]
) -> None:
    own, absent = hub.node.identity.node_id, f"sha1://{'0' * 39}1/x"
    hub.grant(own, channel, Role.ALL)
    assert storer.last("kachery-load", "--channel", channel, absent) == "None"
    hub.grant(own, channel, Role.PROVIDE_FILES)
    done = storer.run("kachery-load", "--channel", channel, absent)
    assert done.returncode != 0
    assert "403" in done.stderr
    assert "requestFiles" in done.stderr
    assert channel in done.stderr
    hub.grant(own, channel, Role.ALL)
    assert storer.last("kachery-load", "--channel", channel, absent) == "None"


def test_direct_load_from_a_public_channel(
    hub: Hub, channel: str, way: str, storer: Client, tmp_path: Path, make_file: Callable[[int], Path]
) -> None:
    public = f"p{time.monotonic_ns():x}"
    hub.make_channel(public, public=True)
    hub.join(hub.node.identity.node_id, public)
    source = make_file(50_000)
    data = source.read_bytes()
    storer.last("kachery-store", source, "--upload-to-channel", channel)
    uri = f"sha1://{hashlib.sha1(data).hexdigest()}"
    direct = Client(hub, way, tmp_path / "direct")
    for name in (channel, public):
        assert direct.last("kachery-load", "--direct-channel", name, uri) == "None"
    storer.last("kachery-store", source, "--upload-to-channel", public)
    assert direct.last("kachery-load", "--direct-channel", channel, uri) == "None"
    assert Path(direct.last("kachery-load", "--direct-channel", public, uri)).read_bytes() == data
    again = Client(hub, way, tmp_path / "again")
    hub.revoke(hub.node.identity.node_id, public)
    assert Path(again.last("kachery-load", "--direct-channel", public, uri)).read_bytes() == data


def test_a_large_file_goes_up_in_chunks(
    hub: Hub, way: str, channel: str, storer: Client, member: LabNode, tmp_path: Path, make_file: Callable[[int], Path]
) -> None:
    """The client uploads chunks and manifest; reading through a manifest works in its direct mode only."""
    public = f"p{time.monotonic_ns():x}"
    hub.make_channel(public, public=True)
    hub.join(hub.node.identity.node_id, public)
    source = make_file(20_000_001)
    uri = storer.last("kachery-store", source, "--upload-to-channel", public)
    assert "?manifest=" in uri
    direct = Client(hub, way, tmp_path / "direct")
    found = Path(direct.last("kachery-load", "--direct-channel", public, uri))
    assert direct.storage in found.parents
    assert found.read_bytes() == source.read_bytes()


def test_a_node_that_nobody_registered(hub: Hub, way: str, channel: str, tmp_path: Path) -> None:
    stranger = Client(hub, way, tmp_path / "stranger", node=LabNode(OWNER))
    done = stranger.run("kachery-load", "-e", "--channel", channel, f"sha1://{'0' * 40}")
    assert done.returncode != 0
    assert "Node not found" in done.stderr
