"""Three servers: a file that is stored on one is loaded on another because it was asked for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients.test_kachery_client import Client
from tests.federations import CHANNEL, Federation, federate, frames, node_id, sha1_of
from tests.hubs import path_of_sha1
from tests.servers import RunningNode, blob_path, drafts


@pytest.fixture
def lab(make_node: Callable[..., RunningNode]) -> Iterator[Federation]:
    yield federate(make_node, "alpha", "beta")


@pytest.fixture
def alpha(lab: Federation) -> RunningNode:
    return lab.members["alpha"]


@pytest.fixture
def beta(lab: Federation) -> RunningNode:
    return lab.members["beta"]


def client_of(node: RunningNode, root: Path) -> Client:
    """A person beside a server, in whose directory the client looks."""
    return Client(node.storage, node.port, root)


def test_the_published_client_loads_what_another_node_has(
    lab: Federation, alpha: RunningNode, beta: RunningNode, tmp_path: Path
) -> None:
    """Seen not to be in the bucket before, and to be there after."""
    data = os.urandom(10_000)
    path = tmp_path / "trial.bin"
    path.write_bytes(data)
    storer, loader = client_of(alpha, tmp_path / "storer"), client_of(beta, tmp_path / "loader")
    uri = storer.prints("kachery-store", path)
    bucket = f"{lab.as_node(beta).bucket_path()}/{path_of_sha1(sha1_of(data))}"
    assert lab.hub.request("HEAD", bucket, auth=False).status == 404
    assert not blob_path(beta.storage, sha1_of(data)).exists()

    found = loader.prints("kachery-load", uri, "--channel", CHANNEL)

    assert Path(found).read_bytes() == data
    assert found == str(blob_path(beta.storage, sha1_of(data)))
    assert lab.hub.request("HEAD", bucket, auth=False).status == 200
    shown = lab.objects()[sha1_of(data)]
    assert (shown["onDemand"], shown["principal"]) == (True, f"node:{node_id(alpha)}")
    assert lab.puts() == 1


def test_a_large_file_comes_in_chunks(lab: Federation, alpha: RunningNode, beta: RunningNode, tmp_path: Path) -> None:
    data = os.urandom(45_000_000)
    path = tmp_path / "recording.dat"
    path.write_bytes(data)
    storer, loader = client_of(alpha, tmp_path / "storer"), client_of(beta, tmp_path / "loader")
    # A linked file: its bytes lie outside the store, and chunks are cut out of it as they are asked for.
    uri = storer.prints("kachery-link", path)
    assert "manifest=" in uri

    found = loader.prints("kachery-load", uri, "--channel", CHANNEL)

    assert Path(found).read_bytes() == data
    assert lab.puts() == 4
    sizes = sorted(row["size"] for row in lab.objects().values())
    assert sizes[-3:] == [5_000_000, 20_000_000, 20_000_000] and sizes[0] < 1000 and len(sizes) == 4
    # Where it was cut nothing was stored.
    assert not blob_path(alpha.storage, sha1_of(data[:20_000_000])).exists()
    assert all(drafts(node.storage) == [] for node in (lab.hub, alpha, beta))


def test_the_hubs_own_node_provides_without_moving_bytes(lab: Federation, beta: RunningNode) -> None:
    data = os.urandom(45_000_000)
    stored = lab.hub.store(data).json()
    small = lab.hub.store(b"small").json()["sha1"]
    assert lab.last(beta, small)["type"] == "finished"
    answer = lab.last(beta, stored["sha1"], manifestSha1=stored["manifestSha1"])
    assert answer["type"] == "finished", answer
    assert blob_path(beta.storage, stored["sha1"]).read_bytes() == data
    assert lab.puts() == 0
    assert {row["principal"] for row in lab.objects().values()} == {f"node:{node_id(lab.hub)}"}
    assert all(row["onDemand"] for row in lab.objects().values())


def test_the_hubs_own_node_asks_too(lab: Federation, alpha: RunningNode) -> None:
    data = os.urandom(45_000_000)
    stored = alpha.store(data).json()
    small = alpha.store(b"small").json()["sha1"]
    assert lab.last(lab.hub, small) == {"type": "finished", "localFilePath": str(blob_path(lab.hub.storage, small))}
    answer = frames(lab.load(lab.hub, stored["sha1"], manifestSha1=stored["manifestSha1"]).body)
    assert answer[-1]["type"] == "finished", answer
    assert answer[-2]["bytesLoaded"] == answer[-2]["bytesTotal"] == len(data)
    assert blob_path(lab.hub.storage, stored["sha1"]).read_bytes() == data
    # Without its manifest it comes as a whole.
    other = alpha.store(os.urandom(21_000_000)).json()["sha1"]
    assert lab.last(lab.hub, other)["type"] == "finished"


def test_one_upload_however_many_ask(lab: Federation, alpha: RunningNode, beta: RunningNode) -> None:
    data = os.urandom(8_000_000)
    sha1 = alpha.store(data).json()["sha1"]
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(lab.last, (lab.hub, beta)[number % 2], sha1) for number in range(24)]
        assert {task.result()["type"] for task in asked} == {"finished"}
    assert lab.puts() == 1


def test_nobody_has_it(lab: Federation, alpha: RunningNode, beta: RunningNode) -> None:
    """Three seconds of silence, a text that says which step failed, and the same at once when asked again."""
    sha1 = sha1_of(b"nobody has this")
    begun = time.monotonic()
    answer = lab.last(beta, sha1)
    assert 2.9 < time.monotonic() - begun < 4
    assert answer["type"] == "error"
    assert f"{sha1} is not in the bucket of {CHANNEL}" in answer["error"]
    assert "no node of the channel answered within 3 s" in answer["error"]
    begun = time.monotonic()
    assert "s ago" in lab.last(beta, sha1)["error"]
    assert time.monotonic() - begun < 0.5
    # Another one, who has it now, is found although it was missed a moment ago: the bucket is looked at first.
    alpha.store(b"nobody has this")
    assert alpha.post("/uploadFile", {"sha1": sha1, "channel": CHANNEL}).status == 200
    assert lab.last(beta, sha1)["type"] == "finished"


def test_each_role_stops_its_part_within_a_second(lab: Federation, alpha: RunningNode, beta: RunningNode) -> None:
    lab.grant(lab.hub, "requestFiles")
    names = [alpha.store(os.urandom(2000)).json()["sha1"] for _ in range(4)]
    assert lab.last(beta, names[0])["type"] == "finished"

    lab.grant(alpha, "requestFiles", "provideFeeds")
    time.sleep(1)
    assert "no node of the channel answered" in lab.last(beta, names[1])["error"]
    assert names[1] not in lab.objects()
    lab.grant(alpha, "all")
    time.sleep(1)
    assert lab.last(beta, names[2])["type"] == "finished"

    lab.grant(beta, "provideFiles")
    time.sleep(1)
    refused = lab.load(beta, names[3])
    assert refused.status == 403
    assert b"requestFiles" in refused.body and CHANNEL.encode() in refused.body
    assert names[3] not in lab.objects()
    lab.grant(beta, "requestFiles")
    time.sleep(1)
    assert lab.last(beta, names[3])["type"] == "finished"


def test_what_came_from_another_channel_is_not_offered(lab: Federation, alpha: RunningNode, beta: RunningNode) -> None:
    lab.grant(lab.hub, "requestFiles")
    lab.make_channel("other-lab")
    lab.join(lab.hub, "other-lab")
    lab.join(alpha, "other-lab")
    lab.settle()
    theirs, shared = (lab.hub.store(os.urandom(3000)).json()["sha1"] for _ in range(2))
    for sha1 in (theirs, shared):
        assert lab.last(alpha, sha1, channel="other-lab")["type"] == "finished"
    # The second one somebody of alpha stored as well: now it is alpha's own.
    assert alpha.store(blob_path(alpha.storage, shared).read_bytes()).json()["sha1"] == shared

    assert "no node of the channel answered" in lab.last(beta, theirs)["error"]
    assert lab.last(beta, shared)["type"] == "finished"
    assert theirs not in lab.objects()


def test_an_offer_of_uploads_adds_nothing(lab: Federation, alpha: RunningNode, beta: RunningNode) -> None:
    """Nor does a node that goes past its own server: the hub refuses the ticket."""
    lab.grant(lab.hub, "requestFiles")
    lab.join(alpha, offer="uploaded")
    lab.settle()
    local, uploaded = (alpha.store(os.urandom(3000)).json()["sha1"] for _ in range(2))
    assert alpha.post("/uploadFile", {"sha1": uploaded, "channel": CHANNEL}).status == 200
    assert "no node of the channel answered" in lab.last(beta, local)["error"]
    assert lab.last(beta, uploaded)["type"] == "finished"
    refused = lab.as_node(alpha).upload_url(local, 3000)
    assert refused.status == 403 and "only what was uploaded" in refused.json()["detail"]
    assert lab.as_node(alpha).upload_url(local, 3000, on_demand=False).status == 200

    lab.join(alpha, offer="local")
    lab.settle()
    assert lab.as_node(alpha).upload_url(local, 3000).status == 200
    other = alpha.store(os.urandom(3000)).json()["sha1"]
    assert lab.last(beta, other)["type"] == "finished"


def test_what_was_deleted_in_the_channel_is_not_brought_back(
    lab: Federation, alpha: RunningNode, beta: RunningNode
) -> None:
    sha1 = alpha.store(b"a patient's name").json()["sha1"]
    assert lab.last(lab.hub, sha1)["type"] == "finished"
    lab.grant(lab.hub, "requestFiles")
    lab.admin("DELETE", f"/channels/{CHANNEL}/objects/{lab.objects()[sha1]['path']}")
    time.sleep(1)
    answer = lab.last(beta, sha1)
    assert answer["type"] == "error" and sha1 not in lab.objects()
    refused = [json.loads(line) for line in alpha.log.splitlines() if "file_not_provided" in line]
    assert "was deleted in this channel" in refused[-1]["reason"]
    # An upload on purpose restores it.
    assert alpha.post("/uploadFile", {"sha1": sha1, "channel": CHANNEL}).status == 200
    assert lab.last(beta, sha1)["type"] == "finished"
    assert not lab.objects()[sha1]["onDemand"]


def test_an_upload_makes_what_was_on_demand_an_upload(lab: Federation, alpha: RunningNode, beta: RunningNode) -> None:
    sha1 = alpha.store(b"asked for, then uploaded").json()["sha1"]
    assert lab.last(beta, sha1)["type"] == "finished"
    assert lab.objects()[sha1]["onDemand"]
    assert alpha.post("/uploadFile", {"sha1": sha1, "channel": CHANNEL}).status == 200
    assert not lab.objects()[sha1]["onDemand"]
    assert lab.puts() == 2
    assert alpha.post("/uploadFile", {"sha1": sha1, "channel": CHANNEL}).status == 200
    assert lab.puts() == 2
