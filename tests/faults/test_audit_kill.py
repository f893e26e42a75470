"""A change of rights and its entry in the audit are one transaction: no kill comes between them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kachery_lab.core.keys import PrivateKey
from tests.faults.report import report, without
from tests.servers import RunningNode

pytestmark = pytest.mark.slow

Make = Callable[..., RunningNode]
ROOT = "/api/admin/v1"
NODE_ID = PrivateKey.from_seed("07" * 32).public_hex
ACTS: list[tuple[str, str, str, Any]] = [
    ("user.create", "POST", "/users", {"name": "ann"}),
    ("channel.create", "POST", "/channels", {"name": "recordings", "owner": "ann"}),
    ("channel.update", "PATCH", "/channels/recordings", {"maxBytes": 1000}),
    ("node.add", "POST", "/nodes", {"nodeId": NODE_ID, "owner": "ann", "label": "rig-1"}),
    ("membership.join", "PUT", f"/channels/recordings/memberships/{NODE_ID}", {}),
    ("authorization.grant", "PUT", "/channels/recordings/authorizations/user/ben", {"roles": ["requestFiles"]}),
    ("passcode.add", "POST", "/channels/recordings/passcodes", {"roles": ["requestFiles"]}),
    ("token.create", "POST", "/tokens", {"user": "ann", "scopes": ["read"]}),
]
LISTS = {
    "user.create": "/users",
    "channel.create": "/channels",
    "channel.update": "/channels/recordings",
    "node.add": "/nodes",
    "membership.join": "/channels/recordings/memberships",
    "authorization.grant": "/channels/recordings/authorizations",
    "passcode.add": "/channels/recordings/passcodes",
    "token.create": "/tokens",
}


def admin(node: RunningNode, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body)
    answer = node.request(method, ROOT + path, data, {"Content-Type": "application/json"}, auth=node.admin_token)
    assert answer.status < 300, (method, path, answer.body)
    return answer.json()


@pytest.mark.parametrize("guard", [True, False], ids=["guard", "control"])
def test_a_kill_after_the_change_loses_no_entry(make_node: Make, tmp_path: Path, guard: bool) -> None:
    """Control: with the entry in a transaction of its own each of these changes has none."""
    flag = tmp_path / "kill"
    guards = "killed_after_change" + ("" if guard else ",audit_afterwards")
    node = make_node(prefix=without(guards), env={"KILL_AFTER_CHANGE": str(flag)})
    changed, recorded = [], []
    for action, method, path, body in ACTS:
        flag.unlink(missing_ok=True)
        node.start()
        before = admin(node, "GET", LISTS[action])
        flag.touch()
        with pytest.raises((OSError, http.client.HTTPException)):
            admin(node, method, path, body)
        assert node.process is not None
        assert node.process.wait(30) == -9
        flag.unlink()
        node.start()
        changed.append(admin(node, "GET", LISTS[action]) != before)
        recorded += [entry["outcome"] for entry in admin(node, "GET", f"/audit?action={action}")["entries"]]
        node.kill()
    assert changed == [True] * len(ACTS)
    assert recorded == (["done"] * len(ACTS) if guard else [])
    report("audit", len(ACTS), guard=guard, changed=sum(changed), recorded=len(recorded))
