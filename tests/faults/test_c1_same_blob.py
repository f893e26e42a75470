"""C1: the same blob from many clients at once, some of them with other bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from hashlib import sha1

from tests.faults.report import histogram, report, without
from tests.servers import RunningNode, blob_path, drafts, files_below

SIZE = 5_000_000
EACH = 25
Make = Callable[..., RunningNode]


def storm(node: RunningNode, data: bytes, size: int) -> tuple[list[int], list[int]]:
    """Statuses of clients that send the right bytes, and of those that send others of the same length, all at once."""
    name = sha1(data).hexdigest()
    wrong = data[: size // 2] + bytes([data[size // 2] ^ 1]) + data[size // 2 + 1 :]
    right_statuses: list[int] = []
    wrong_statuses: list[int] = []
    ready = threading.Barrier(2 * EACH)

    def put(body: bytes, statuses: list[int]) -> None:
        ready.wait()
        statuses.append(node.request("PUT", f"/api/v1/blobs/{name}", body).status)

    threads = [
        threading.Thread(target=put, args=arguments)
        for _ in range(EACH)
        for arguments in ((data, right_statuses), (wrong, wrong_statuses))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return right_statuses, wrong_statuses


def test_one_file_and_every_client_is_told_the_truth(make_node: Make) -> None:
    node = make_node().start()
    data = os.urandom(SIZE)
    name = sha1(data).hexdigest()
    right, wrong = storm(node, data, SIZE)
    assert sorted(right) == [200] * (EACH - 1) + [201]
    assert wrong == [422] * EACH
    assert files_below(node.storage / "sha1") == [blob_path(node.storage, name)]
    assert drafts(node.storage) == []
    assert not (node.storage / "sha1-quarantine").exists()
    assert node.request("GET", f"/api/v1/blobs/{name}").body == data
    refused = node.request("PUT", f"/api/v1/blobs/{name}", data[:-1])
    assert (refused.status, refused.json()["code"]) == (422, "content_mismatch")
    node.kill()
    node.start()
    assert node.request("GET", f"/api/v1/blobs/{name}", auth=node.admin_token).body == data
    report("C1", 2 * EACH, acked=EACH, lost=0, wrong=0, status_histogram=histogram(right + wrong), files=1)


def test_control_without_the_claim_other_bytes_are_accepted(make_node: Make) -> None:
    node = make_node(prefix=without("no_claim")).start()
    size = 1000
    right, wrong = storm(node, os.urandom(size), size)
    assert set(right) <= {200, 201}
    assert wrong.count(422) == 0
    assert len(files_below(node.storage / "sha1")) > 1
    report("C1 control no_claim", 2 * EACH, wrong=EACH, status_histogram=histogram(right + wrong))
