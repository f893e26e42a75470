"""The published client, unmodified, through a hub: uploads, loads, ephemeral mode, public channels.

It can name no port, so it sends every request to the server as to a proxy; one test is at port 80. It prints `None`
and succeeds when it finds nothing, so bytes are compared and storer and loader have different directories.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kachery_lab.core.keys import PublicKey
from kachery_lab.core.roles import Role
from tests.clients.environment import DAEMON_CLIENT, client_variables
from tests.clients.person import Person
from tests.hubs import OWNER, Hub, LabNode, path_of

HUB_NAME = "hub.lab"


def port_80() -> bool:
    """Whether this user may listen on port 80, and nobody does."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 80))
        except OSError:
            return False
    return True


class Client(Person):
    """Commands of kachery-client with a directory of their own."""

    def __init__(self, hub: Hub, root: Path, *, storage: Path | None = None, node: LabNode | None = None):
        self.storage = storage or root / "storage"
        self.storage.mkdir(parents=True, exist_ok=True)
        if node is not None:
            (self.storage / "owner").write_text(node.owner)
            (self.storage / "public.pem").write_text(PublicKey.parse(node.id).to_pem())
            (self.storage / "private.pem").write_text(node.key.to_pem())
        name = "127.0.0.1" if hub.port == 80 else HUB_NAME
        # Where nobody listens, the client finds no daemon: ephemeral mode.
        variables = client_variables(self.storage, hub.port if storage is not None else 9, root / "private")
        variables |= {"KACHERY_HUB_API_URI": f"http://{name}", "BITWOODER_API_URI": f"http://{name}"}
        if hub.port != 80:
            variables |= {"http_proxy": hub.base, "no_proxy": "localhost,127.0.0.1"}
        super().__init__(DAEMON_CLIENT, root / "private", variables)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub"), allowed_hosts=(HUB_NAME,)) as running:
        yield running


def make_channel(hub: Hub) -> str:
    """A private channel; this server's own node has every role in it."""
    name = f"c{time.monotonic_ns():x}"
    hub.make_channel(name)
    hub.join(hub.node.identity.node_id, name)
    return name


def make_member(hub: Hub, channel: str) -> LabNode:
    """A node with every role."""
    node = LabNode()
    hub.register(node)
    hub.join(node, channel)
    return node


@pytest.fixture
def channel(hub: Hub) -> str:
    return make_channel(hub)


@pytest.fixture
def member(hub: Hub, channel: str) -> LabNode:
    return make_member(hub, channel)


@pytest.fixture
def storer(hub: Hub, tmp_path: Path) -> Client:
    """A client beside the server, in whose directory it looks."""
    return Client(hub, tmp_path / "storer", storage=hub.storage)


@pytest.fixture
def loader(hub: Hub, tmp_path: Path, member: LabNode) -> Client:
    """An ephemeral client, elsewhere."""
    return Client(hub, tmp_path / "loader", node=member)


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


def up_and_down(hub: Hub, channel: str, storer: Client, loader: Client, source: Path) -> None:
    """A file into a private channel and out of it."""
    data = source.read_bytes()
    plain_is_refused(hub, channel, data)
    uri = storer.prints("kachery-store", source, "--upload-to-channel", channel)
    assert uri == f"sha1://{hashlib.sha1(data).hexdigest()}/data.bin"
    plain_is_refused(hub, channel, data)
    found = Path(loader.prints("kachery-load", "-e", "--channel", channel, uri))
    assert loader.storage in found.parents
    assert found.read_bytes() == data
    plain_is_refused(hub, channel, data)


@pytest.mark.parametrize("size", [0, 1, 300_000], ids=["empty", "1", "300 kB"])
def test_upload_and_ephemeral_load_from_a_private_channel(
    hub: Hub, channel: str, storer: Client, loader: Client, make_file: Callable[[int], Path], size: int
) -> None:
    up_and_down(hub, channel, storer, loader, make_file(size))


def test_at_port_80(tmp_path: Path, make_file: Callable[[int], Path]) -> None:
    """As people's clients come, without a proxy."""
    if not port_80():
        pytest.skip("port 80 is taken or not ours to take; the other way is tested")
    with Hub(tmp_path / "hub", 80) as hub:
        channel = make_channel(hub)
        storer = Client(hub, tmp_path / "storer", storage=hub.storage)
        loader = Client(hub, tmp_path / "loader", node=make_member(hub, channel))
        up_and_down(hub, channel, storer, loader, make_file(70_000))
        public = f"p{time.monotonic_ns():x}"
        hub.make_channel(public, public=True)
        hub.join(hub.node.identity.node_id, public)
        source = tmp_path / "public.bin"
        source.write_bytes(os.urandom(1000))
        uri = storer.prints("kachery-store", source, "--upload-to-channel", public)
        found = Path(Client(hub, tmp_path / "direct").prints("kachery-load", "--direct-channel", public, uri))
        assert found.read_bytes() == source.read_bytes()


def test_a_role_that_is_taken_away_ends_loading(
    hub: Hub, channel: str, storer: Client, member: LabNode, tmp_path: Path, make_file: Callable[[int], Path]
) -> None:
    source = make_file(5000)
    uri = storer.prints("kachery-store", source, "--upload-to-channel", channel)

    def load(place: str) -> str:
        return Client(hub, tmp_path / place, node=member).prints("kachery-load", "-e", "--channel", channel, uri)

    hub.grant(member.id, channel, Role.ALL & ~Role.REQUEST_FILES)
    assert load("refused") == "None"
    assert (f"node:{member.id}", "bucket.read") in refusals(hub, channel)
    hub.grant(member.id, channel, Role.REQUEST_FILES)
    assert Path(load("granted")).read_bytes() == source.read_bytes()
    hub.revoke(member.id, channel)
    assert load("revoked") == "None"


def test_ephemeral_upload(
    hub: Hub, channel: str, loader: Client, member: LabNode, tmp_path: Path, make_file: Callable[[int], Path]
) -> None:
    source = make_file(70_000)
    data = source.read_bytes()
    hub.grant(member.id, channel, Role.REQUEST_FILES)
    done = loader.command("kachery-store", "-e", source, "--upload-to-channel", channel)
    assert done.returncode != 0
    assert (f"node:{member.id}", "upload.issue") in refusals(hub, channel)
    hub.grant(member.id, channel, Role.PROVIDE_FILES)
    uri = loader.prints("kachery-store", "-e", source, "--upload-to-channel", channel)
    plain_is_refused(hub, channel, data)
    reader = LabNode()
    hub.register(reader)
    hub.join(reader, channel, Role.REQUEST_FILES)
    other = Client(hub, tmp_path / "reader", node=reader)
    assert Path(other.prints("kachery-load", "-e", "--channel", channel, uri)).read_bytes() == data
    # Without a channel every membership's bucket is tried.
    third = Client(hub, tmp_path / "third", node=reader)
    assert Path(third.prints("kachery-load", "-e", uri)).read_bytes() == data


def test_uploads_through_the_server_need_the_role(
    hub: Hub, channel: str, storer: Client, make_file: Callable[[int], Path]
) -> None:
    source = make_file(1000)
    own = hub.node.identity.node_id
    hub.grant(own, channel, Role.REQUEST_FILES)
    done = storer.command("kachery-store", source, "--upload-to-channel", channel)
    assert done.returncode != 0
    assert ("local:local", "file.upload") in refusals(hub, channel)
    hub.grant(own, channel, Role.PROVIDE_FILES)
    assert storer.prints("kachery-store", source, "--upload-to-channel", channel).startswith("sha1://")


def test_load_through_the_server_says_what_is_missing(
    hub: Hub, channel: str, storer: Client, make_file: Callable[[int], Path]
) -> None:
    own, absent = hub.node.identity.node_id, f"sha1://{'0' * 39}1/x"
    hub.grant(own, channel, Role.ALL)
    assert storer.prints("kachery-load", "--channel", channel, absent) == "None"
    hub.grant(own, channel, Role.PROVIDE_FILES)
    done = storer.command("kachery-load", "--channel", channel, absent)
    assert done.returncode != 0
    assert "403" in done.stderr.decode()
    assert "requestFiles" in done.stderr.decode()
    assert channel in done.stderr.decode()
    hub.grant(own, channel, Role.ALL)
    assert storer.prints("kachery-load", "--channel", channel, absent) == "None"


def test_direct_load_from_a_public_channel(
    hub: Hub, channel: str, storer: Client, tmp_path: Path, make_file: Callable[[int], Path]
) -> None:
    public = f"p{time.monotonic_ns():x}"
    hub.make_channel(public, public=True)
    hub.join(hub.node.identity.node_id, public)
    source = make_file(50_000)
    data = source.read_bytes()
    storer.prints("kachery-store", source, "--upload-to-channel", channel)
    uri = f"sha1://{hashlib.sha1(data).hexdigest()}"
    direct = Client(hub, tmp_path / "direct")
    for name in (channel, public):
        assert direct.prints("kachery-load", "--direct-channel", name, uri) == "None"
    storer.prints("kachery-store", source, "--upload-to-channel", public)
    assert direct.prints("kachery-load", "--direct-channel", channel, uri) == "None"
    assert Path(direct.prints("kachery-load", "--direct-channel", public, uri)).read_bytes() == data
    again = Client(hub, tmp_path / "again")
    hub.revoke(hub.node.identity.node_id, public)
    assert Path(again.prints("kachery-load", "--direct-channel", public, uri)).read_bytes() == data


def test_a_large_file_goes_up_in_chunks(
    hub: Hub, channel: str, storer: Client, member: LabNode, tmp_path: Path, make_file: Callable[[int], Path]
) -> None:
    """The client uploads chunks and manifest; reading through a manifest works in its direct mode only."""
    public = f"p{time.monotonic_ns():x}"
    hub.make_channel(public, public=True)
    hub.join(hub.node.identity.node_id, public)
    source = make_file(20_000_001)
    uri = storer.prints("kachery-store", source, "--upload-to-channel", public)
    assert "?manifest=" in uri
    direct = Client(hub, tmp_path / "direct")
    found = Path(direct.prints("kachery-load", "--direct-channel", public, uri))
    assert direct.storage in found.parents
    assert found.read_bytes() == source.read_bytes()


def test_a_node_that_nobody_registered(hub: Hub, channel: str, tmp_path: Path) -> None:
    stranger = Client(hub, tmp_path / "stranger", node=LabNode(OWNER))
    done = stranger.command("kachery-load", "-e", "--channel", channel, f"sha1://{'0' * 40}")
    assert done.returncode != 0
    assert "Node not found" in done.stderr.decode()
