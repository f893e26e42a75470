"""S6, S7 for tasks: replays, and rights and leases that end while somebody works."""

from __future__ import annotations

import http.client
import json
import secrets
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import pytest

from kachery_lab.core.ids import TaskFunctionId
from kachery_lab.core.tasks import task_hash
from tests.faults.report import report, wait_for, without
from tests.faults.task_backends import FUNCTION, Make, a_lab, ask
from tests.federations import CHANNEL, Federation, SignedRequests, node_id

pytestmark = pytest.mark.slow


class Holder:
    """A member that is no server: it claims tasks of the hub with signed requests."""

    def __init__(self, lab: Federation, label: str) -> None:
        self.lab = lab
        self.requests: SignedRequests = lab.stranger(label)
        self.lease = secrets.token_hex(16)

    def task(self, task_id: str, n: int, kind: str) -> dict[str, Any]:
        digest = task_hash(TaskFunctionId(FUNCTION), {"n": n})
        return {
            "taskId": task_id,
            "taskHash": digest,
            "taskFunctionId": FUNCTION,
            "taskFunctionType": kind,
            "backendId": None,
        }

    def claim_body(self, task_id: str, n: int, kind: str = "query") -> dict[str, Any]:
        requester = node_id(self.lab.hub)
        return {**self.task(task_id, n, kind), "requester": requester, "leaseId": self.lease, "ageMs": 0}

    def claim(self, task_id: str, n: int, kind: str = "query") -> bool:
        answer = self.requests.request(
            "POST", f"/api/v1/channels/{CHANNEL}/tasks/claim", self.claim_body(task_id, n, kind)
        )
        assert answer.status == 200, answer.body
        return answer.json()["granted"] is True

    def url(self, n: int, size: int, lease: str | None = None) -> str:
        body = {"taskHash": task_hash(TaskFunctionId(FUNCTION), {"n": n}), "size": size, "leaseId": lease}
        answer = self.requests.request("POST", f"/api/v1/channels/{CHANNEL}/tasks/uploads", body)
        assert answer.status == 200, answer.body
        return urlsplit(answer.json()["url"]).path

    def put(self, path: str, data: bytes, before_end: Callable[[], None] | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.lab.hub.port, timeout=30)
        try:
            connection.putrequest("PUT", path)
            connection.putheader("Content-Length", str(len(data)))
            connection.endheaders(data[:2])
            if before_end is not None:
                time.sleep(0.2)
                before_end()
            connection.send(data[2:])
            return connection.getresponse().status
        finally:
            connection.close()

    def finish(self, task_id: str) -> int:
        body = {"taskId": task_id, "leaseId": self.lease, "status": "finished", "errorMessage": None}
        return self.requests.request("POST", f"/api/v1/channels/{CHANNEL}/tasks/finish", body).status


def result_of(lab: Federation, n: int) -> bytes:
    found = ask(lab.hub, n, "query").json()
    answer = lab.hub.request("GET", urlsplit(found["taskResultUrl"]).path, auth=False)
    return answer.body if answer.status == 200 else b""


def test_s6_replays(make_node: Make) -> None:
    """A signed claim is good once, also over a restart; an upload URL puts the same bytes again and no others."""
    lab = a_lab(make_node, seconds=30)
    holder = Holder(lab, "one")
    target = f"/api/v1/channels/{CHANNEL}/tasks/claim"
    body = json.dumps(holder.claim_body("t1", 1)).encode()
    headers = {"Content-Type": "application/json", **holder.requests.header("POST", target, body)}
    statuses = [lab.hub.request("POST", target, body, headers, auth=False).status for _ in range(3)]
    assert statuses == [200, 409, 409]
    time.sleep(1.1)
    assert lab.hub.terminate() == 0
    lab.hub.start()
    assert lab.hub.request("POST", target, body, headers, auth=False).status == 401
    url = holder.url(1, 4, holder.lease)
    assert [holder.put(url, b'"aa"'), holder.put(url, b'"aa"'), holder.put(url, b'"bb"')] == [200, 200, 409]
    assert holder.finish("t1") == 200
    assert holder.put(url, b'"bb"') == 409
    assert result_of(lab, 1) == b'"aa"'
    report("S6 tasks", 5, replays_with_effect=0)


def lose_the_lease(lab: Federation) -> None:
    wait_for(lambda: "a task's lease ended" in lab.hub.log, "the lease ended", 10)


def overwriting(lab: Federation) -> tuple[int, bytes]:
    """A result whose lease is lost while its bytes come, when another backend has the task: status, what is kept."""
    first, second = Holder(lab, "one"), Holder(lab, "two")
    assert first.claim("t1", 1)
    url = first.url(1, 6, first.lease)

    def meanwhile() -> None:
        lose_the_lease(lab)
        assert second.claim("t1", 1)
        assert second.put(second.url(1, 6, second.lease), b'"good"') == 200
        assert second.finish("t1") == 200

    status = first.put(url, b'"late"', meanwhile)
    return status, result_of(lab, 1)


def test_s7_a_lease_that_ends_during_the_upload(make_node: Make) -> None:
    assert overwriting(a_lab(make_node)) == (409, b'"good"')
    report("S7 tasks", 1, bypass=0)


def test_s6_s7_control_results_overwrite(make_node: Make) -> None:
    assert overwriting(a_lab(make_node, without("results_overwrite"))) == (200, b'"late"')
    report("S7 control: results overwrite", 1, bypass=1)


def test_s7_a_role_that_is_taken_away(make_node: Make) -> None:
    """While a task is held: the upload that is under way is refused, and within 1 s the task is free."""
    lab = a_lab(make_node, seconds=30)
    first, second = Holder(lab, "one"), Holder(lab, "two")
    assert first.claim("t1", 1)
    url = first.url(1, 6, first.lease)
    began = 0.0

    def revoke() -> None:
        nonlocal began
        lab.grant(first.requests.id, "requestTasks")
        began = time.monotonic()

    assert first.put(url, b'"late"', revoke) == 403
    assert first.finish("t1") == 403
    while not second.claim("t1", 1):
        assert time.monotonic() - began < 1
        time.sleep(0.05)
    assert second.put(second.url(1, 6, second.lease), b'"good"') == 200
    assert second.finish("t1") == 200
    assert result_of(lab, 1) == b'"good"'
    report("S7 tasks, role revoked", 1, bypass=0, freed_ms=round((time.monotonic() - began) * 1000))
