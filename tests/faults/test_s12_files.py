"""S12: nothing that a band message or a hub says makes a node connect anywhere but to its hub."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.faults.hostile import HostileMember
from tests.faults.report import report, without
from tests.federations import Federation, federate, sha1_of
from tests.servers import RunningNode

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]


class Canary:
    """A listener on an address that nobody should visit."""

    def __init__(self) -> None:
        self.hits = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                visitor, _ = self._listener.accept()
            except OSError:
                return
            self.hits += 1
            visitor.close()

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    found = Canary()
    # A visit is seen.
    socket.create_connection(("127.0.0.1", int(found.url.rpartition(":")[2]))).close()
    while not found.hits:
        time.sleep(0.01)
    found.hits = 0
    yield found
    found.close()


def test_messages_that_name_addresses(make_node: Make, canary: Canary) -> None:
    """Fields that no message has, names that are addresses: the hub passes none of it on, and answers the right one."""
    lab = federate(make_node, "alpha")
    alpha = lab.members["alpha"]
    sha1 = alpha.store(os.urandom(1000)).json()["sha1"]
    port = canary.url.rpartition(":")[2]
    addresses = [
        canary.url,
        f"http://127.1:{port}/",
        f"http://[::ffff:127.0.0.1]:{port}/",
        f"http://2130706433:{port}/",
        f"http://0:{port}/",
        f"gopher://127.0.0.1:{port}/",
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data/",
    ]
    bodies = []
    for address in addresses:
        bodies += [
            {"type": "requestFile", "fileKey": {"sha1": address}},
            {"type": "requestFile", "fileKey": {"sha1": sha1}, "url": address},
            {"type": "requestFile", "fileKey": {"sha1": sha1, "uploadUrl": address}},
            {"type": "requestFile", "fileKey": {"sha1": sha1, "manifestSha1": address}},
            {"type": "uploadFileStatus", "fileKey": {"sha1": sha1}, "status": "finished", "bucketUrl": address},
            {"type": address, "fileKey": {"sha1": sha1}},
        ]
    who = lab.stranger()
    with HostileMember(who) as member:
        member.subscribe("provideFiles")
        for body in bodies:
            message = {"body": body, "fromNodeId": who.id, "signature": "00" * 64}
            band = "provideFiles" if body["type"] == "uploadFileStatus" else "requestFiles"
            member.publish_as_is(message, band)
        member.listen(2)
        refused = len(member.refused)
        member.publish([{"type": "requestFile", "fileKey": {"sha1": sha1}}], "requestFiles")
        member.listen(2)
        answers = member.statuses(sha1)
    report("S12 band messages", len(bodies), canary_hits=canary.hits, refused=refused)
    assert refused == len(bodies)
    assert "finished" in answers
    assert canary.hits == 0


def visits(lab: Federation, canary: Canary, guard: str | None) -> int:
    """How often the canary is visited when a hub names it for uploads and buckets; `guard`: what the nodes lack."""
    alpha, beta = lab.members["alpha"], lab.members["beta"]
    for node in (alpha, beta):
        if guard is not None:
            assert node.terminate() == 0
            node.prefix = without(guard)
            node.log_path.unlink()
            node.start()
    lab.settle()
    before = canary.hits
    sha1 = alpha.store(os.urandom(1000)).json()["sha1"]
    with HostileMember(lab.stranger(f"odd{before}{guard is None}"[:20])) as member:
        member.publish([{"type": "requestFile", "fileKey": {"sha1": sha1}}], "requestFiles")
        member.listen(2)
    lab.load(beta, sha1_of(os.urandom(20)))
    alpha.post("/uploadFile", {"sha1": sha1, "channel": "rig-data"})
    return canary.hits - before


def test_a_hub_that_names_another_machine(make_node: Make, canary: Canary) -> None:
    lab = federate(make_node, "alpha", "beta")
    lab.grant(lab.hub, "requestFiles")
    assert lab.hub.terminate() == 0
    lab.hub.prefix = without("name_the_canary")
    lab.hub.env = {**lab.hub.env, "CANARY": canary.url}
    lab.hub.start()
    time.sleep(10)
    guarded = visits(lab, canary, None)
    log = lab.members["alpha"].log + lab.members["beta"].log
    unguarded = visits(lab, canary, "follow_anywhere")
    report("S12 addresses from a hub", 3, canary_hits=guarded, unguarded_hits=unguarded)
    assert guarded == 0
    assert "another machine" in log
    assert unguarded >= 3
