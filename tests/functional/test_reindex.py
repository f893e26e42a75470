"""The volume is the truth: with the database gone, `kachery-lab reindex` builds it again from the volume."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.servers import RunningNode, blob_path, files_below

SUBFEED = "48ba2d64d76ed2b86aec79263f599aa3484c4789"
SMALL = b"a small blob"
LARGE = bytes(range(256)) * 8192
BIG = bytes(20_000_001)
TO_DELETE = b"to be deleted"


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def name_key(name: str) -> dict[str, str]:
    """Where kachery-client keeps the feed of a name."""
    return {"type": "feed_id_for_name", "feed_name": name}


class World:
    """One of everything, made through the API, and what the node answers about it."""

    def __init__(self, node: RunningNode, outside: Path) -> None:
        self.node = node
        self.linked = outside / "linked.bin"
        self.linked.write_bytes(b"linked, not copied")
        self.feed = self.created()
        self.named = self.created("served by name")
        self.deleted = self.created("deleted")
        self.fill()

    def created(self, name: str | None = None) -> str:
        return str(self.ok("/feed/createFeed", {} if name is None else {"feedName": name})["feedId"])

    def ok(self, path: str, body: object) -> dict[str, Any]:
        answer = self.node.post(path, body)
        assert answer.status == 200, answer.body
        found: dict[str, Any] = answer.json()
        return found

    def append(self, feed: str, messages: list[Any], **more: Any) -> dict[str, Any]:
        return self.ok("/feed/appendMessages", {"feedId": feed, "subfeedHash": SUBFEED, "messages": messages, **more})

    def fill(self) -> None:
        for data in (SMALL, LARGE, BIG, b"", TO_DELETE):
            assert self.node.store(data).json()["sha1"] == sha1_of(data)
        stat = self.linked.stat()
        self.ok("/linkFile", {"localFilePath": str(self.linked), "size": stat.st_size, "mtime": stat.st_mtime})
        self.delete(TO_DELETE)
        for number in range(5):
            self.append(self.feed, [{"n": number}, {"text": "ü", "list": [1, 2.5, None]}])
        self.append(self.named, [{"n": 0}], requestId="first")
        self.append(self.deleted, [{"n": 0}])
        self.ok("/feed/deleteFeed", {"feedId": self.deleted})
        for key, value in (
            ("k", {"a": [1, None]}),
            ({"b": 1, "a": 2}, "v"),
            ("gone", 1),
            (name_key("mine"), self.feed),
        ):
            self.ok("/mutable/set", {"key": key, "value": value})
        self.ok("/mutable/delete", {"key": "gone"})

    def delete(self, data: bytes) -> None:
        path = f"/api/v1/blobs/{sha1_of(data)}"
        assert self.node.request("DELETE", path, auth=self.node.admin_token).status == 204

    def answers(self) -> dict[str, Any]:
        """What the node says of everything, times of the index aside."""
        found: dict[str, Any] = {}
        for name in ("small", "large", "big", "empty", "deleted", "linked"):
            data = {"small": SMALL, "large": LARGE, "big": BIG, "empty": b"", "deleted": TO_DELETE}.get(name)
            sha1 = sha1_of(data if data is not None else self.linked.read_bytes())
            answer = self.node.request("GET", f"/api/v1/blobs/{sha1}")
            found[name] = (answer.status, sha1_of(answer.body) if answer.status == 200 else None)
            found[f"{name} load"] = self.node.post("/loadFile", {"fileKey": {"sha1": sha1}}).body
        rows = self.node.request("GET", "/api/v1/blobs?limit=1000").json()["blobs"]
        found["rows"] = [(row["sha1"], row["size"], row["sha256"], row["manifestSha1"], row["origin"]) for row in rows]
        for feed in (self.feed, self.named, self.deleted):
            found[f"{feed} info"] = self.ok("/feed/getFeedInfo", {"feedId": feed})
            found[f"{feed} count"] = self.ok("/feed/getNumLocalMessages", {"feedId": feed, "subfeedHash": SUBFEED})
            found[f"{feed} signed"] = self.messages(feed, signed=True)
        for name in ("served by name", "deleted"):
            found[f"{name} id"] = self.ok("/feed/getFeedId", {"feedName": name})
        for key in ("k", {"a": 2, "b": 1}, "gone", name_key("mine")):
            found[f"mutable {key}"] = self.ok("/mutable/get", {"key": key})
        return found

    def messages(self, feed: str, *, signed: bool = False) -> Any:
        watch = {"feedId": feed, "subfeedHash": SUBFEED, "position": 0, "channelName": "*local*"}
        body = {"subfeedWatches": {"w": watch}, "waitMsec": 0, "signed": signed}
        return self.ok("/feed/watchForNewMessages", body)["messages"].get("w", [])


def reindex(node: RunningNode, *arguments: str) -> dict[str, Any]:
    done = node.run_cli("reindex", *arguments)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def drop_database(node: RunningNode) -> None:
    """Everything that is not on the storage volume."""
    shutil.rmtree(node.metadata)
    node.metadata.mkdir()


def state_of(node: RunningNode) -> dict[str, tuple[int, str]]:
    """The volume, byte for byte, without what a process says of itself."""
    ours = {".kachery-owner"}
    return {
        str(path.relative_to(node.storage)): (path.stat().st_mode, sha1_of(path.read_bytes()))
        for path in files_below(node.storage)
        if path.name not in ours
    }


@pytest.fixture
def world(node: RunningNode, tmp_path: Path) -> World:
    return World(node, tmp_path)


def test_everything_comes_back(world: World) -> None:
    node = world.node
    before, node_id, token = world.answers(), node.request("GET", "/probe").json()["nodeId"], node.admin_token
    assert before["big"][0] == 200 and before["deleted"][0] == 404
    assert node.terminate() == 0
    drop_database(node)

    refused = node.run_cli("start")
    assert refused.returncode == 1
    assert "kachery-lab reindex" in refused.stderr
    assert "Traceback" not in refused.stderr

    report = reindex(node)
    # small, large, big with its manifest, empty, and the deleted one is not among them.
    assert (report["blobs"], report["links"], report["indexed"]) == (5, 1, 6)
    assert (report["feeds"], report["messages"], report["mutables"]) == (2, 11, 3)
    assert (report["quarantined"], report["failed"], report["rows_removed"], report["links_unusable"]) == (0, 0, 0, 0)

    node.start()
    assert node.request("GET", "/probe").json()["nodeId"] == node_id
    assert world.answers() == before

    # Feeds are still writeable: their keys came from the volume, sealed with the node's key.
    assert world.append(world.feed, [{"n": "after"}])["position"] == 10
    assert world.messages(world.feed)[-1] == {"n": "after"}
    by_name = world.ok("/mutable/get", {"key": name_key("mine")})["value"]
    assert world.append(by_name, [{"n": "by name"}])["position"] == 11
    assert world.ok("/feed/getFeedId", {"feedName": "served by name"})["feedId"] == world.named
    # What was deleted stays deleted.
    body = {"feedId": world.deleted, "subfeedHash": SUBFEED, "messages": [{}]}
    assert node.post("/feed/appendMessages", body).status == 403
    # A repeated request is still known.
    assert world.append(world.named, [{"n": 0}], requestId="first")["position"] == 0
    assert world.ok("/feed/getNumLocalMessages", {"feedId": world.named, "subfeedHash": SUBFEED})["numMessages"] == 1
    # Token hashes come back from the copy on the volume, so no new first admin token is made.
    assert node.request("GET", "/api/v1/blobs", auth=token).status == 200


def test_a_second_reindex_finds_nothing_to_do(world: World) -> None:
    node = world.node
    node.terminate()
    drop_database(node)
    first = reindex(node)
    volume = state_of(node)
    second = reindex(node)
    assert first["indexed"] == 6
    assert (second["blobs"], second["links"]) == (5, 1)
    assert [second[key] for key in ("indexed", "quarantined", "links_unusable", "rows_removed", "failed")] == [0] * 5
    assert [second[key] for key in ("feeds", "messages", "mutables")] == [2, 11, 3]
    assert state_of(node) == volume


def test_a_dry_run_changes_nothing(world: World) -> None:
    node = world.node
    node.terminate()
    drop_database(node)
    rotten = blob_path(node.storage, sha1_of(SMALL))
    os.chmod(rotten, 0o600)
    rotten.write_bytes(b"A small blob")
    volume = state_of(node)
    report = reindex(node, "--dry-run")
    assert report["dry_run"] is True
    assert report["indexed"] == 6
    assert state_of(node) == volume
    # It is still not the index of this volume, so the server goes on refusing.
    refused = node.run_cli("start")
    assert refused.returncode == 1
    assert "kachery-lab reindex" in refused.stderr
    assert reindex(node)["quarantined"] == 1


def test_while_the_server_runs(world: World) -> None:
    node = world.node
    gone, rotten, unseen = sha1_of(SMALL), sha1_of(LARGE), b"put on the volume by hand"
    blob_path(node.storage, gone).unlink()
    with blob_path(node.storage, rotten).open("r+b") as file:
        file.write(b"\xff")
    by_hand = blob_path(node.storage, sha1_of(unseen))
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(unseen)
    stranger = by_hand.with_name("not-a-blob.tmp")
    stranger.write_bytes(b"left alone")

    rows = {row["sha1"] for row in node.request("GET", "/api/v1/blobs").json()["blobs"]}
    report = reindex(node, "--dry-run")
    assert (report["indexed"], report["rows_removed"]) == (1, 1)
    assert {row["sha1"] for row in node.request("GET", "/api/v1/blobs").json()["blobs"]} == rows

    report = reindex(node)
    assert (report["indexed"], report["rows_removed"], report["quarantined"], report["failed"]) == (1, 1, 0, 0)
    assert stranger.exists()
    rows_now = {row["sha1"] for row in node.request("GET", "/api/v1/blobs").json()["blobs"]}
    assert rows_now == (rows | {sha1_of(unseen)}) - {gone}
    assert node.request("GET", f"/api/v1/blobs/{sha1_of(unseen)}").body == unseen
    assert node.request("GET", f"/api/v1/blobs/{gone}").status == 404
    # A size that agrees is enough for a row that is there; a reader still never gets the wrong bytes.
    assert node.request("GET", f"/api/v1/blobs/{rotten}").status == 410
    assert reindex(node)["rows_removed"] == 1
    assert node.store(SMALL).json()["sha1"] == gone
    assert node.request("GET", f"/api/v1/blobs/{gone}").body == SMALL


def test_rotten_files_are_set_aside(world: World) -> None:
    node = world.node
    node.terminate()
    drop_database(node)
    for data in (SMALL, LARGE):
        path = blob_path(node.storage, sha1_of(data))
        path.write_bytes(data[:-1] + b"!")
    world.linked.write_bytes(b"LINKED, not copied")
    report = reindex(node)
    assert report["quarantined"] == 2
    assert report["links_unusable"] == 1
    node.start()
    for data in (SMALL, LARGE):
        sha1 = sha1_of(data)
        assert not blob_path(node.storage, sha1).exists()
        kept = node.storage / "sha1-quarantine" / sha1[:2] / sha1[2:4] / sha1[4:6] / sha1
        assert kept.read_bytes() == data[:-1] + b"!"
        assert node.request("GET", f"/api/v1/blobs/{sha1}").status == 410
        assert node.store(data).json()["sha1"] == sha1
        assert node.request("GET", f"/api/v1/blobs/{sha1}").body == data


def test_an_unmounted_volume_removes_no_row(make_node: Callable[..., RunningNode]) -> None:
    """Emptiness where the database knows a volume is never read as `all deleted`."""
    node = make_node().start()
    node.store(SMALL)
    node.terminate()
    away = node.storage.with_name("away")
    node.storage.rename(away)
    node.storage.mkdir()
    done = node.run_cli("reindex")
    assert done.returncode == 1
    assert "Mount the right volume" in done.stderr
    assert files_below(node.storage) == []
    node.storage.rmdir()
    away.rename(node.storage)
    node.start()
    assert node.request("GET", f"/api/v1/blobs/{sha1_of(SMALL)}").body == SMALL
