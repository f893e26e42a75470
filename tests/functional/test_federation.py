"""Two servers: one is the hub, the other joins its channels. Everything goes over real sockets.

Files here travel because somebody uploaded them; `test_files_on_demand.py` has those that travel because they were
asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator

import pytest

from kachery_lab.core.signables import request_bytes
from tests.faults.report import wait_for
from tests.federations import SECONDS, Federation, federation, frames, node_id
from tests.proxies import Cutter
from tests.servers import RunningNode, blob_path, drafts


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The same two servers for all tests here."""
    with federation(tmp_path_factory.mktemp("federation"), "member") as lab:
        yield lab


@pytest.fixture
def member(lab: Federation) -> RunningNode:
    return lab.members["member"]


@pytest.fixture
def channel(lab: Federation) -> str:
    """A private channel in which both have every role, and offer what was uploaded."""
    return lab.open_channel(offer="uploaded")


def test_a_file_goes_through_the_hubs_bucket(lab: Federation, member: RunningNode, channel: str) -> None:
    """Stored at the hub's node, uploaded, loaded at the member; only then is it on the member's volume."""
    data = os.urandom(3_000_000)
    sha1 = lab.hub.store(data).json()["sha1"]
    assert lab.last(member, sha1, channel=channel)["type"] == "error"
    assert lab.upload(lab.hub, sha1, channel=channel).json() == {"success": True}
    assert not blob_path(member.storage, sha1).exists()

    answer = frames(lab.load(member, sha1, channel=channel).body)

    assert answer[-1] == {"type": "finished", "localFilePath": str(blob_path(member.storage, sha1))}
    assert answer[-2] == {"type": "progress", "bytesLoaded": len(data), "bytesTotal": len(data)}
    assert blob_path(member.storage, sha1).read_bytes() == data
    assert re.search(rf"GET.*/bucket/.*{sha1}", lab.hub.log), "the hub served it"
    assert drafts(member.storage) == []


def test_the_other_way_round(lab: Federation, member: RunningNode, channel: str) -> None:
    """A member's upload travels to the hub, once, and is verified there."""
    data = os.urandom(200_000)
    sha1 = member.store(data).json()["sha1"]
    before = lab.puts()
    for _ in range(2):
        assert lab.upload(member, sha1, channel=channel).json() == {"success": True}
    assert blob_path(lab.hub.storage, sha1).read_bytes() == data
    wanted = {"channelName": channel, "sha1": sha1, "size": len(data)}
    assert member.post("/createSignedFileUploadUrl", wanted).json() == {"success": True, "alreadyUploaded": True}
    assert lab.puts() - before == 1


def test_each_role_stops_its_flow(lab: Federation, member: RunningNode, channel: str) -> None:
    """403 before the first frame, naming role and channel; and it works again when the role is back."""
    sha1 = lab.hub.store(os.urandom(5000)).json()["sha1"]
    assert lab.upload(lab.hub, sha1, channel=channel).status == 200
    mine, other = (member.store(os.urandom(4000)).json()["sha1"] for _ in range(2))

    lab.grant(member, "provideFiles", channel=channel)
    lab.settle()
    refused = lab.load(member, sha1, channel=channel)
    assert refused.status == 403
    assert b"requestFiles" in refused.body and channel.encode() in refused.body
    assert lab.upload(member, mine, channel=channel).status == 200

    lab.grant(member, "requestFiles", channel=channel)
    lab.settle()
    assert lab.last(member, sha1, channel=channel)["type"] == "finished"
    refused = lab.upload(member, other, channel=channel)
    assert refused.status == 403
    assert b"provideFiles" in refused.body and channel.encode() in refused.body
    assert not blob_path(lab.hub.storage, other).exists()
    assert "refused" in member.log


def test_an_unapproved_node_gets_nothing(lab: Federation, channel: str, make_node: Callable[..., RunningNode]) -> None:
    """It may tell who it is, and waits."""
    sha1 = lab.hub.store(b"for members").json()["sha1"]
    assert lab.upload(lab.hub, sha1, channel=channel).status == 200
    stranger = make_node("stranger", env={"KACHERY_LAB_HUB_URL": f"http://127.0.0.1:{lab.hub.port}"}).start()
    assert lab.last(stranger, sha1, channel=channel)["type"] == "error"
    assert not blob_path(stranger.storage, sha1).exists()


def test_whether_a_node_is_connected_is_shown(
    lab: Federation, channel: str, make_node: Callable[..., RunningNode]
) -> None:
    begun = int(time.time() * 1000)
    guest = make_node("guest", env={"KACHERY_LAB_HUB_URL": f"http://127.0.0.1:{lab.hub.port}"}).start()
    name = node_id(guest)
    lab.approve(name)
    lab.join(guest, channel)

    def connected_at() -> int | None:
        rows = {row["nodeId"]: row for row in lab.admin("GET", "/nodes")["nodes"]}
        assert rows[node_id(lab.hub)]["connectedAt"] < begun
        return rows[name]["connectedAt"]  # type: ignore[no-any-return]

    def shown() -> str:
        """The cell of the list, without the time of day."""
        heading, *rows = lab.hub.run_cli("node", "list").stdout.splitlines()
        (row,) = (row for row in rows if name in row)
        return row[heading.index("CONNECTED") :].split()[0]

    wait_for(lambda: connected_at() is not None, "the guest is connected", SECONDS)
    found = connected_at()
    assert found is not None and begun <= found <= time.time() * 1000
    assert shown() == time.strftime("%Y-%m-%d", time.localtime(found / 1000))
    guest.kill()
    wait_for(lambda: connected_at() is None, "the guest is gone", SECONDS)
    assert shown() == "-"


def test_a_large_file_by_its_chunks(lab: Federation, member: RunningNode, channel: str) -> None:
    """Only manifest and chunks are in the bucket; the whole is put together and verified."""
    data = os.urandom(45_000_000)
    chunks = [data[start : start + 20_000_000] for start in range(0, len(data), 20_000_000)]
    stored = lab.hub.store(data).json()
    for part in (*chunks, (blob_path(lab.hub.storage, stored["manifestSha1"])).read_bytes()):
        name = lab.hub.store(part).json()["sha1"]
        assert lab.upload(lab.hub, name, channel=channel).status == 200

    answer = frames(lab.load(member, stored["sha1"], channel=channel, manifestSha1=stored["manifestSha1"]).body)

    assert answer[-1]["type"] == "finished", answer
    assert answer[-2]["bytesLoaded"] == answer[-2]["bytesTotal"] == len(data)
    assert blob_path(member.storage, stored["sha1"]).read_bytes() == data


def test_a_cut_connection_is_resumed(lab: Federation, channel: str, make_node: Callable[..., RunningNode]) -> None:
    """Every answer is cut after 1 MB; each byte still travels about once, and the file is right."""
    data = os.urandom(5_000_000)
    sha1 = lab.hub.store(data).json()["sha1"]
    assert lab.upload(lab.hub, sha1, channel=channel).status == 200
    with Cutter(lab.hub.port, 1_000_000) as cutter:
        far = make_node("far", env={"KACHERY_LAB_HUB_URL": cutter.url}).start()
        lab.approve(node_id(far))
        lab.join(far, channel)
        lab.settle(far)
        assert lab.last(far, sha1, channel=channel)["type"] == "finished"
        assert blob_path(far.storage, sha1).read_bytes() == data
        assert cutter.cuts >= 4


def test_damaged_bytes_from_the_hub_are_not_kept(lab: Federation, member: RunningNode, channel: str) -> None:
    """The hub's volume is altered behind its back: the member gets an error and stores nothing."""
    data = os.urandom(2_000_000)
    sha1 = lab.hub.store(data).json()["sha1"]
    assert lab.upload(lab.hub, sha1, channel=channel).status == 200
    path = blob_path(lab.hub.storage, sha1)
    with path.open("r+b") as file:
        file.write(b"\0" * 16)
    answer = frames(lab.load(member, sha1, channel=channel).body)
    assert answer[-1]["type"] == "error"
    assert not blob_path(member.storage, sha1).exists()
    assert drafts(member.storage) == []


def test_a_signed_request_is_good_once(lab: Federation, member: RunningNode) -> None:
    """Replayed, altered, or meant for another hub: refused. The same request signed anew works."""
    key, hub, path = lab.as_node(member).key, node_id(lab.hub), "/api/v1/nodes/memberships"

    def ask(nonce: str, *, hub_id: str = hub, shift: int = 0, signed: str = path) -> int:
        now = int(time.time()) + shift
        empty = hashlib.sha256(b"").hexdigest()
        data = request_bytes("GET", signed, empty, now, nonce, key.public_hex, hub_id)
        header = f"v1 {key.public_hex} {now} {nonce} {key.sign(data).hex()}"
        return lab.hub.request("GET", path, headers={"Kachery-Node": header}, auth=False).status

    assert ask("a" * 32) == 200
    assert ask("a" * 32) == 409
    assert ask("b" * 32, hub_id="0" * 64) == 401
    assert ask("c" * 32, signed="/api/v1/nodes/report") == 401
    assert ask("d" * 32, shift=-600) == 401
    assert ask("e" * 32, shift=600) == 401
    assert ask("f" * 32) == 200
