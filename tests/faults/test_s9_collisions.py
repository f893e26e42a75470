"""S9: different files with one SHA-1."""

from __future__ import annotations

import base64
import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.report import messages_of, report, without
from tests.servers import Answer, RunningNode, blob_path, drafts
from tests.third_party import shared_vectors

Make = Callable[..., RunningNode]


def pair(name: str, ending: str) -> tuple[bytes, bytes, str]:
    """Two different files and their one SHA-1."""
    folder = shared_vectors("sha1-collisions")
    first, second = ((folder / f"{name}-{n}.{ending}").read_bytes() for n in (1, 2))
    assert first != second
    (one,) = {hashlib.sha1(data).hexdigest() for data in (first, second)}
    return first, second, one


@pytest.fixture(params=[("shattered", "pdf"), ("sha-mbles", "bin")], ids=lambda found: found[0])
def collision(request: pytest.FixtureRequest) -> tuple[bytes, bytes, str]:
    return pair(*request.param)


def check(node: RunningNode, first: bytes, second: bytes, name: str) -> int:
    """The second is refused by both routes, the first stays; how many refusals that were."""
    put = node.request("PUT", f"/api/v1/blobs/{name}", second)
    store = node.store(second)
    assert (put.status, put.json()["code"]) == (409, "sha1_collision"), put.body
    assert (store.status, store.json()["code"], store.json()["success"]) == (409, "sha1_collision", False)
    assert "other bytes" in put.json()["detail"] and "they stay" in store.json()["error"]
    assert node.request("GET", f"/api/v1/blobs/{name}").body == first
    assert blob_path(node.storage, name).read_bytes() == first
    assert drafts(node.storage) == []
    assert node.request("PUT", f"/api/v1/blobs/{name}", first).status == 200
    return 2


def test_the_second_file_is_refused_and_the_first_stays(make_node: Make, collision: tuple[bytes, bytes, str]) -> None:
    first, second, name = collision
    node = make_node().start()
    assert node.request("PUT", f"/api/v1/blobs/{name}", first).status == 201
    refused = check(node, first, second, name)
    # Which one is first is chance: with nothing stored the other one is as good.
    assert node.request("DELETE", f"/api/v1/blobs/{name}", auth=node.admin_token).status == 204
    assert node.store(second).status == 200
    refused += check(node, second, first, name)
    report("S9", refused, wrong=0, refused=refused)


def test_the_bytes_decide_when_no_sha256_is_known(make_node: Make, collision: tuple[bytes, bytes, str]) -> None:
    first, second, name = collision
    node = make_node().start()
    assert node.store(first).status == 200
    node.terminate()
    database = sqlite3.connect(node.metadata / "kachery-lab.db")
    assert database.execute("UPDATE blobs SET sha256 = NULL").rowcount == 1
    database.commit()
    database.close()
    node.start()
    refused = check(node, first, second, name)
    report("S9 without sha256", refused, wrong=0, refused=refused)


def link(node: RunningNode, path: Path) -> Answer:
    stat = path.stat()
    return node.post("/linkFile", {"localFilePath": str(path), "size": stat.st_size, "mtime": stat.st_mtime})


def test_a_link_to_the_second_file_is_refused(
    make_node: Make, collision: tuple[bytes, bytes, str], tmp_path: Path
) -> None:
    """Whether the first is stored or linked itself: a success would say that the second is here."""
    first, second, name = collision
    paths = [tmp_path / "first", tmp_path / "second"]
    for path, data in zip(paths, (first, second), strict=True):
        path.write_bytes(data)
    stored, linked = make_node("stored").start(), make_node("linked").start()
    assert stored.store(first).status == 200
    assert link(linked, paths[0]).status == 200
    for node in (stored, linked):
        answer = link(node, paths[1])
        assert (answer.status, answer.json()["code"]) == (409, "sha1_collision")
        assert node.request("GET", f"/api/v1/blobs/{name}").body == first
        assert link(node, paths[0]).status == 200
        assert node.request("GET", f"/api/v1/blobs/{name}").body == first
    # A link to what is gone holds no name.
    paths[0].unlink()
    assert link(linked, paths[1]).status == 200
    assert linked.request("GET", f"/api/v1/blobs/{name}").body == second
    report("S9 links", 2, wrong=0, refused=2)


def test_a_store_of_the_second_file_is_refused_when_the_first_is_linked(node: RunningNode, tmp_path: Path) -> None:
    first, second, name = pair("sha-mbles", "bin")
    path = tmp_path / "linked"
    path.write_bytes(first)
    assert link(node, path).status == 200
    answer = node.store(second)
    assert (answer.status, node.request("GET", f"/api/v1/blobs/{name}").body == first) == (409, True)


def test_signatures_do_not_rest_on_sha1(make_node: Make) -> None:
    first, second, _ = pair("sha-mbles", "bin")
    node = make_node().start()
    feed = node.post("/feed/createFeed", {}).json()["feedId"]
    texts = [{"data": base64.b64encode(data).decode()} for data in (first, second)]
    subfeed = {"feedId": feed, "subfeedHash": "1" * 40}
    assert node.post("/feed/appendMessages", {**subfeed, "messages": texts}).status == 200
    found = messages_of(node, feed, "1" * 40, signed=True)
    assert [message["body"]["message"] for message in found] == texts
    assert len({message["signature"] for message in found}) == 2
    node.terminate()
    database = sqlite3.connect(node.metadata / "kachery-lab.db")
    digests = {row[0] for row in database.execute("SELECT body_sha256 FROM messages")}
    database.close()
    assert len(digests) == 2


def test_control_taking_the_name_for_the_bytes_drops_the_second_file(
    make_node: Make, collision: tuple[bytes, bytes, str]
) -> None:
    first, second, name = collision
    node = make_node(prefix=without("same_name_same_bytes")).start()
    assert node.request("PUT", f"/api/v1/blobs/{name}", first).status == 201
    lost = node.request("PUT", f"/api/v1/blobs/{name}", second)
    assert lost.status == 200
    assert node.request("GET", f"/api/v1/blobs/{name}").body != second
    report("S9 control same_name_same_bytes", 1, lost=1)
