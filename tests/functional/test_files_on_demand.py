"""Three servers: a file that is stored on one is loaded on another because it was asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients.daemon_client import Client
from tests.faults.report import wait_for
from tests.federations import SECONDS, Federation, federation, frames, node_id, sha1_of
from tests.hubs import path_of_sha1
from tests.servers import RunningNode, blob_path, drafts


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The same three servers for all tests here."""
    with federation(tmp_path_factory.mktemp("on-demand"), "alpha", "beta") as lab:
        yield lab


@pytest.fixture
def channel(lab: Federation) -> str:
    """A private channel in which all three have every role."""
    return lab.open_channel()


@pytest.fixture
def alpha(lab: Federation) -> RunningNode:
    return lab.members["alpha"]


@pytest.fixture
def beta(lab: Federation) -> RunningNode:
    return lab.members["beta"]


@pytest.fixture
def storer(alpha: RunningNode, tmp_path: Path) -> Client:
    """A person beside a server, in whose directory the client looks."""
    return Client(alpha.storage, alpha.port, tmp_path / "storer")


@pytest.fixture
def loader(beta: RunningNode, tmp_path: Path) -> Client:
    """A person beside another one."""
    return Client(beta.storage, beta.port, tmp_path / "loader")


def test_the_published_client_loads_what_another_node_has(
    lab: Federation,
    channel: str,
    alpha: RunningNode,
    beta: RunningNode,
    storer: Client,
    loader: Client,
    tmp_path: Path,
) -> None:
    """Seen not to be in the bucket before, and to be there after."""
    before = lab.puts()
    data = os.urandom(10_000)
    path = tmp_path / "trial.bin"
    path.write_bytes(data)
    uri = storer.prints("kachery-store", path)
    bucket = f"{lab.as_node(beta).bucket_path(channel)}/{path_of_sha1(sha1_of(data))}"
    assert lab.hub.request("HEAD", bucket, auth=False).status == 404
    assert not blob_path(beta.storage, sha1_of(data)).exists()

    found = loader.prints("kachery-load", uri, "--channel", channel)

    assert Path(found).read_bytes() == data
    assert found == str(blob_path(beta.storage, sha1_of(data)))
    assert lab.hub.request("HEAD", bucket, auth=False).status == 200
    shown = lab.objects(channel)[sha1_of(data)]
    assert (shown["onDemand"], shown["principal"]) == (True, f"node:{node_id(alpha)}")
    assert lab.puts() - before == 1


def test_a_large_file_comes_in_chunks(
    lab: Federation,
    channel: str,
    alpha: RunningNode,
    beta: RunningNode,
    storer: Client,
    loader: Client,
    tmp_path: Path,
) -> None:
    before = lab.puts()
    data = os.urandom(45_000_000)
    path = tmp_path / "recording.dat"
    path.write_bytes(data)
    # A linked file: its bytes lie outside the store, and chunks are cut out of it as they are asked for.
    uri = storer.prints("kachery-link", path)
    assert "manifest=" in uri

    found = loader.prints("kachery-load", uri, "--channel", channel)

    assert Path(found).read_bytes() == data
    assert lab.puts() - before == 4
    sizes = sorted(row["size"] for row in lab.objects(channel).values())
    assert sizes[-3:] == [5_000_000, 20_000_000, 20_000_000] and sizes[0] < 1000 and len(sizes) == 4
    # Where it was cut nothing was stored.
    assert not blob_path(alpha.storage, sha1_of(data[:20_000_000])).exists()
    assert all(drafts(node.storage) == [] for node in (lab.hub, alpha, beta))


def test_the_hubs_own_node_provides_without_moving_bytes(lab: Federation, channel: str, beta: RunningNode) -> None:
    before = lab.puts()
    data = os.urandom(45_000_000)
    stored = lab.hub.store(data).json()
    small = lab.hub.store(os.urandom(10)).json()["sha1"]
    assert lab.last(beta, small, channel=channel)["type"] == "finished"
    answer = lab.last(beta, stored["sha1"], manifestSha1=stored["manifestSha1"], channel=channel)
    assert answer["type"] == "finished", answer
    assert blob_path(beta.storage, stored["sha1"]).read_bytes() == data
    assert lab.puts() - before == 0
    assert {row["principal"] for row in lab.objects(channel).values()} == {f"node:{node_id(lab.hub)}"}
    assert all(row["onDemand"] for row in lab.objects(channel).values())


def test_the_hubs_own_node_asks_too(lab: Federation, channel: str, alpha: RunningNode) -> None:
    data = os.urandom(45_000_000)
    stored = alpha.store(data).json()
    small = alpha.store(os.urandom(10)).json()["sha1"]
    assert lab.last(lab.hub, small, channel=channel) == {
        "type": "finished",
        "localFilePath": str(blob_path(lab.hub.storage, small)),
    }
    answer = frames(lab.load(lab.hub, stored["sha1"], manifestSha1=stored["manifestSha1"], channel=channel).body)
    assert answer[-1]["type"] == "finished", answer
    assert answer[-2]["bytesLoaded"] == answer[-2]["bytesTotal"] == len(data)
    assert blob_path(lab.hub.storage, stored["sha1"]).read_bytes() == data
    # Without its manifest it comes as a whole.
    other = alpha.store(os.urandom(21_000_000)).json()["sha1"]
    assert lab.last(lab.hub, other, channel=channel)["type"] == "finished"


def test_one_upload_however_many_ask(lab: Federation, channel: str, alpha: RunningNode, beta: RunningNode) -> None:
    before = lab.puts()
    data = os.urandom(8_000_000)
    sha1 = alpha.store(data).json()["sha1"]
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(lab.last, (lab.hub, beta)[number % 2], sha1, channel=channel) for number in range(24)]
        assert {task.result()["type"] for task in asked} == {"finished"}
    assert lab.puts() - before == 1


def test_nobody_has_it(lab: Federation, channel: str, alpha: RunningNode, beta: RunningNode) -> None:
    """Three seconds of silence, a text that says which step failed, and the same at once when asked again."""
    sha1 = sha1_of(b"nobody has this")
    begun = time.monotonic()
    answer = lab.last(beta, sha1, channel=channel)
    assert time.monotonic() - begun > 2.9
    assert answer["type"] == "error"
    assert f"{sha1} is not in the bucket of {channel}" in answer["error"]
    assert "no node of the channel answered within 3 s" in answer["error"]
    assert "s ago" in lab.last(beta, sha1, channel=channel)["error"]
    # Another one, who has it now, is found although it was missed a moment ago: the bucket is looked at first.
    alpha.store(b"nobody has this")
    assert lab.upload(alpha, sha1, channel=channel).status == 200
    assert lab.last(beta, sha1, channel=channel)["type"] == "finished"


def test_each_role_stops_its_part(lab: Federation, channel: str, alpha: RunningNode, beta: RunningNode) -> None:
    lab.grant(lab.hub, "requestFiles", channel=channel)
    names = [alpha.store(os.urandom(2000)).json()["sha1"] for _ in range(4)]
    assert lab.last(beta, names[0], channel=channel)["type"] == "finished"

    lab.grant(alpha, "requestFiles", "provideFeeds", channel=channel)
    lab.settle()
    assert "no node of the channel answered" in lab.last(beta, names[1], channel=channel)["error"]
    assert names[1] not in lab.objects(channel)
    lab.grant(alpha, "all", channel=channel)
    lab.settle()
    assert lab.last(beta, names[2], channel=channel)["type"] == "finished"

    lab.grant(beta, "provideFiles", channel=channel)
    lab.settle()
    refused = lab.load(beta, names[3], channel=channel)
    assert refused.status == 403
    assert b"requestFiles" in refused.body and channel.encode() in refused.body
    assert names[3] not in lab.objects(channel)
    lab.grant(beta, "requestFiles", channel=channel)
    lab.settle()
    assert lab.last(beta, names[3], channel=channel)["type"] == "finished"


def test_what_came_from_another_channel_is_not_offered(
    lab: Federation, channel: str, alpha: RunningNode, beta: RunningNode
) -> None:
    lab.grant(lab.hub, "requestFiles", channel=channel)
    lab.make_channel("other-lab")
    lab.join(lab.hub, "other-lab")
    lab.join(alpha, "other-lab")
    lab.settle()
    theirs, shared = (lab.hub.store(os.urandom(3000)).json()["sha1"] for _ in range(2))
    for sha1 in (theirs, shared):
        assert lab.last(alpha, sha1, channel="other-lab")["type"] == "finished"
    # The second one somebody of alpha stored as well: now it is alpha's own.
    assert alpha.store(blob_path(alpha.storage, shared).read_bytes()).json()["sha1"] == shared

    assert "no node of the channel answered" in lab.last(beta, theirs, channel=channel)["error"]
    assert lab.last(beta, shared, channel=channel)["type"] == "finished"
    assert theirs not in lab.objects(channel)


def test_an_offer_of_uploads_adds_nothing(lab: Federation, channel: str, alpha: RunningNode, beta: RunningNode) -> None:
    """Nor does a node that goes past its own server: the hub refuses the ticket."""
    lab.grant(lab.hub, "requestFiles", channel=channel)
    lab.join(alpha, channel, offer="uploaded")
    lab.settle()
    local, uploaded = (alpha.store(os.urandom(3000)).json()["sha1"] for _ in range(2))
    assert lab.upload(alpha, uploaded, channel=channel).status == 200
    assert "no node of the channel answered" in lab.last(beta, local, channel=channel)["error"]
    assert lab.last(beta, uploaded, channel=channel)["type"] == "finished"
    refused = lab.as_node(alpha).upload_url(local, 3000, channel=channel)
    assert refused.status == 403 and "only what was uploaded" in refused.json()["detail"]
    assert lab.as_node(alpha).upload_url(local, 3000, on_demand=False, channel=channel).status == 200

    lab.join(alpha, channel, offer="local")
    lab.settle()
    assert lab.as_node(alpha).upload_url(local, 3000, channel=channel).status == 200
    other = alpha.store(os.urandom(3000)).json()["sha1"]
    assert lab.last(beta, other, channel=channel)["type"] == "finished"


def test_what_was_deleted_in_the_channel_is_not_brought_back(
    lab: Federation, channel: str, alpha: RunningNode, beta: RunningNode
) -> None:
    sha1 = alpha.store(b"a patient's name").json()["sha1"]
    assert lab.last(lab.hub, sha1, channel=channel)["type"] == "finished"
    lab.grant(lab.hub, "requestFiles", channel=channel)
    lab.admin("DELETE", f"/channels/{channel}/objects/{lab.objects(channel)[sha1]['path']}")
    lab.settle()
    answer = lab.last(beta, sha1, channel=channel)
    assert answer["type"] == "error" and sha1 not in lab.objects(channel)
    said = ("file_not_provided", sha1, "was deleted in this channel")
    wait_for(lambda: any(all(part in line for part in said) for line in alpha.log.splitlines()), "a reason", SECONDS)
    # An upload on purpose restores it.
    assert lab.upload(alpha, sha1, channel=channel).status == 200
    assert lab.last(beta, sha1, channel=channel)["type"] == "finished"
    assert not lab.objects(channel)[sha1]["onDemand"]


def test_an_upload_makes_what_was_on_demand_an_upload(
    lab: Federation, channel: str, alpha: RunningNode, beta: RunningNode
) -> None:
    before = lab.puts()
    sha1 = alpha.store(b"asked for, then uploaded").json()["sha1"]
    assert lab.last(beta, sha1, channel=channel)["type"] == "finished"
    assert lab.objects(channel)[sha1]["onDemand"]
    assert lab.upload(alpha, sha1, channel=channel).status == 200
    assert not lab.objects(channel)[sha1]["onDemand"]
    assert lab.puts() - before == 2
    assert lab.upload(alpha, sha1, channel=channel).status == 200
    assert lab.puts() - before == 2
