"""The admin endpoints: what they take, what they answer, and what they leave alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.http.world import ADMIN, NODE, OBJECT, OTHER_NODE, SHA1, Call, World
from tests.servers import Answer, RunningNode


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("server")
    for name in ("storage", "metadata"):
        (root / name).mkdir()
    running = RunningNode(root / "storage", root / "metadata", {"KACHERY_LAB_AUDIT_DAYS": "30"}).start()
    yield World(running)
    running.kill()


@pytest.fixture
def world(shared: World) -> World:
    shared.restore()
    return shared


def send(world: World, kind: str, method: str, path: str, body: Any = None) -> Answer:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    return world.send(Call(method, ADMIN + path, data), world.credential(kind))


def code(answer: Answer) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json", answer
    return answer.status, answer.json()["code"]


def everything(world: World) -> list[Any]:
    """All that the endpoints can show, but for the audit."""
    paths = ["/users", "/tokens", "/nodes", "/channels"]
    paths += [f"/channels/recordings/{noun}" for noun in ("memberships", "authorizations", "passcodes", "objects")]
    return [world.admin("GET", path) for path in paths]


def test_users(world: World) -> None:
    name = "Carol+lab@example.org?#%"
    made = send(world, "admin", "POST", "/users", {"name": name})
    assert (made.status, made.json()["name"]) == (201, name)
    assert code(send(world, "admin", "POST", "/users", {"name": name})) == (409, "conflict")
    place = f"/users/{quote(name, safe='')}"
    assert send(world, "admin", "GET", place).json() == made.json()
    assert made.json() in world.admin("GET", "/users")["users"]
    assert send(world, "admin", "DELETE", place).status == 204
    assert code(send(world, "admin", "DELETE", place)) == (404, "not_found")
    assert code(send(world, "admin", "DELETE", "/users/ann")) == (409, "conflict")


def test_tokens(world: World) -> None:
    body = {"user": "ann", "scopes": ["read"], "label": "rig", "channels": ["recordings"]}
    made = send(world, "admin", "POST", "/tokens", body)
    assert made.status == 201
    assert made.headers["cache-control"] == "no-store"
    token = made.json()
    secret = token.pop("token")
    assert token == {**body, "id": token["id"], "createdAt": token["createdAt"], "expiresAt": None, "revokedAt": None}
    assert send(world, "admin", "GET", f"/tokens/{token['id']}").json() == token
    assert secret not in json.dumps(world.admin("GET", "/tokens"))
    bearer = {"Authorization": f"Bearer {secret}"}
    assert world.send(Call("GET", "/api/v1/info"), bearer).status == 200
    assert send(world, "admin", "DELETE", f"/tokens/{token['id']}").json()["revokedAt"] is not None
    assert world.send(Call("GET", "/api/v1/info"), bearer).status == 401
    assert code(send(world, "admin", "DELETE", f"/tokens/{token['id']}")) == (409, "conflict")


def test_an_owner_makes_no_tokens(world: World) -> None:
    before = world.admin("GET", "/tokens")
    for scope in ("admin", "read"):
        answer = send(world, "owner", "POST", "/tokens", {"user": "ann", "scopes": [scope]})
        assert code(answer) == (403, "forbidden")
    assert world.admin("GET", "/tokens") == before


def test_nodes(world: World) -> None:
    made = send(world, "owner", "POST", "/nodes", {"nodeId": OTHER_NODE, "label": "rig-2"})
    assert (made.status, made.json()["owner"]) == (201, "ann")
    assert made.json()["approvedAt"] is not None
    assert {one["nodeId"] for one in send(world, "owner", "GET", "/nodes").json()["nodes"]} == {NODE, OTHER_NODE}
    assert send(world, "owner", "PATCH", f"/nodes/{OTHER_NODE}", {"label": "rig-3"}).json()["label"] == "rig-3"
    for body in ({"approved": True}, {"owner": "ben"}):
        assert code(send(world, "owner", "PATCH", f"/nodes/{OTHER_NODE}", body)) == (403, "forbidden")
    assert code(send(world, "admin", "PATCH", f"/nodes/{OTHER_NODE}", {"approved": False})) == (400, "invalid_input")
    assert send(world, "admin", "PATCH", f"/nodes/{OTHER_NODE}", {"owner": "ben"}).json()["owner"] == "ben"
    assert send(world, "other", "DELETE", f"/nodes/{OTHER_NODE}").status == 204
    assert code(send(world, "admin", "GET", "/nodes/nonsense")) == (400, "invalid_input")


def test_channels(world: World) -> None:
    made = send(world, "owner", "POST", "/channels", {"name": "tracking", "maxBytes": 10**12})
    assert (made.status, made.json()["owner"], made.json()["public"]) == (201, "ann", False)
    assert send(world, "owner", "GET", "/channels/tracking").json() == {
        **made.json(),
        "usedBytes": 0,
        "resourceProvider": None,
    }
    changed = send(world, "owner", "PATCH", "/channels/tracking", {"maxBytes": None, "retentionDays": 7})
    assert changed.json() == {**made.json(), "maxBytes": None, "retentionDays": 7}
    assert send(world, "owner", "PATCH", "/channels/tracking", {}).json() == changed.json()
    assert [one["name"] for one in send(world, "owner", "GET", "/channels").json()["channels"]] == [
        *("recordings", "tracking")
    ]
    assert send(world, "owner", "DELETE", "/channels/tracking").status == 204
    assert code(send(world, "owner", "GET", "/channels/tracking")) == (404, "not_found")
    assert code(send(world, "admin", "DELETE", "/channels/default")) == (409, "conflict")


def test_what_is_not_yours_is_not_there(world: World) -> None:
    """Word for word the answer for what does not exist."""
    paths = ["", "/memberships", "/authorizations", "/passcodes", "/objects"]
    calls = [("GET", path, None) for path in paths] + [("PATCH", "", {"public": True}), ("DELETE", "", None)]
    calls += [("POST", "/passcodes", {"roles": ["all"]}), ("DELETE", "/passcodes/0a1b2c3d", None)]
    calls += [("PUT", "/authorizations/user/ben", {"roles": ["all"]}), ("DELETE", f"/objects/{OBJECT}", None)]
    for method, path, body in calls:
        answers = [
            send(world, "other", method, f"/channels/{name}{path}", body) for name in ("recordings", "absentings")
        ]
        assert code(answers[0]) == (404, "not_found")
        assert answers[0].body.replace(b"recordings", b"absentings") == answers[1].body, (method, path)
    absent = "9" * 64
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/memberships")):
        answers = [send(world, "other", method, f"/nodes/{node_id}{path}") for node_id in (NODE, absent)]
        assert code(answers[0]) == (404, "not_found")
        assert answers[0].body.replace(NODE.encode(), absent.encode()) == answers[1].body


def test_roles_from_asking_to_losing(world: World) -> None:
    send(world, "owner", "POST", "/nodes", {"nodeId": OTHER_NODE, "label": "rig-2"})
    place = f"/channels/recordings/memberships/{OTHER_NODE}"
    joined = send(world, "owner", "PUT", place, {"asked": ["requestFiles", "provideFiles"]})
    assert joined.status == 200
    assert (joined.json()["granted"], joined.json()["effective"], joined.json()["offer"]) == ([], [], "local")
    grant = f"/channels/recordings/authorizations/node/{OTHER_NODE}"
    granted = send(world, "owner", "PUT", grant, {"roles": ["requestFiles", "requestFeeds"]})
    assert granted.json() == {"kind": "node", "subject": OTHER_NODE, "roles": ["requestFiles", "requestFeeds"]}
    passcode = send(world, "owner", "POST", "/channels/recordings/passcodes", {"roles": ["provideFiles"]}).json()
    again = {"asked": ["all"], "passcodes": [passcode["passcode"]]}
    shown = send(world, "owner", "PUT", place, again).json()
    assert shown["effective"] == shown["granted"] == ["requestFiles", "requestFeeds", "provideFiles"]
    assert shown in send(world, "owner", "GET", "/channels/recordings/memberships").json()["memberships"]
    assert send(world, "owner", "GET", f"/nodes/{OTHER_NODE}/memberships").json() == {"memberships": [shown]}
    assert passcode["passcode"] not in json.dumps(send(world, "owner", "GET", "/channels/recordings/passcodes").json())
    assert send(world, "owner", "DELETE", f"/channels/recordings/passcodes/{passcode['id']}").status == 204
    assert send(world, "owner", "DELETE", grant).status == 204
    left = send(world, "owner", "GET", f"/nodes/{OTHER_NODE}/memberships").json()["memberships"][0]
    assert (left["granted"], left["effective"]) == ([], [])
    assert code(send(world, "owner", "DELETE", grant)) == (404, "not_found")
    assert send(world, "owner", "DELETE", place).status == 204


def test_a_role_that_is_taken_away_is_gone_at_once(world: World) -> None:
    assert world.upload() in (200, None)
    began = time.monotonic()
    assert send(world, "owner", "DELETE", f"/channels/recordings/authorizations/node/{NODE}").status == 204
    target, body = "/api/v1/channels/recordings/uploads", json.dumps({"sha1": SHA1, "size": 3}).encode()
    refused = world.send(Call("POST", target, body), world.signed("POST", target, body))
    assert code(refused) == (403, "forbidden")
    assert time.monotonic() - began < 10
    assert "provideFiles in the channel recordings" in refused.json()["detail"]


def test_objects(world: World) -> None:
    assert world.upload() in (200, None)
    found = send(world, "owner", "GET", "/channels/recordings/objects?limit=1").json()
    assert found["next"] == found["objects"][0]["path"] == OBJECT
    assert found["objects"][0]["principal"] == f"node:{NODE}"
    assert found["objects"][0]["size"] == send(world, "owner", "GET", "/channels/recordings").json()["usedBytes"] == 3
    after = send(world, "owner", "GET", f"/channels/recordings/objects?after={quote(OBJECT, safe='')}").json()
    assert after == {"objects": [], "next": None}
    assert send(world, "owner", "DELETE", f"/channels/recordings/objects/{OBJECT}").status == 204
    assert code(send(world, "owner", "DELETE", f"/channels/recordings/objects/{OBJECT}")) == (404, "not_found")
    assert world.node.request("GET", f"/api/v1/blobs/{SHA1}").status == 200


BAD: list[tuple[str, str, Any]] = [
    ("POST", "/users", b""),
    ("POST", "/users", b"{"),
    ("POST", "/users", b'{"name": "x", "name": "y"}'),
    ("POST", "/users", b'{"name": "\\ud800"}'),
    ("POST", "/users", b"\xff\xfe"),
    ("POST", "/users", b"[" * 100_000),
    ("POST", "/users", []),
    ("POST", "/users", {}),
    ("POST", "/users", {"name": None}),
    ("POST", "/users", {"name": 1}),
    ("POST", "/users", {"name": "a b"}),
    ("POST", "/users", {"name": "a/b"}),
    ("POST", "/users", {"name": "x" * 81}),
    ("POST", "/users", {"name": "carol", "admin": True}),
    ("POST", "/tokens", {"user": "ann", "scopes": "read"}),
    ("POST", "/tokens", {"user": "ann", "scopes": [{}]}),
    ("POST", "/tokens", {"user": "ann", "scopes": ["read"], "expiresAt": 0}),
    ("POST", "/tokens", {"user": "ann", "scopes": ["read"], "expiresAt": 10**30}),
    ("POST", "/tokens", {"user": "ann", "scopes": ["read"], "expiresAt": 1e400}),
    ("POST", "/tokens", {"user": "ann", "scopes": ["admin"], "channels": ["recordings"]}),
    ("POST", "/tokens", {"user": "ann", "scopes": ["read"], "channels": [None]}),
    ("POST", "/nodes", {"nodeId": "0" * 64, "label": "rig"}),
    ("POST", "/nodes", {"nodeId": OTHER_NODE, "label": "a\u0000b"}),
    ("POST", "/nodes", {"nodeId": OTHER_NODE.upper(), "label": "rig"}),
    ("PATCH", f"/nodes/{NODE}", {"owner": "a b", "approved": True}),
    ("POST", "/channels", {"name": "api"}),
    ("POST", "/channels", {"name": "~x"}),
    ("POST", "/channels", {"name": "tracking", "maxBytes": 2**63}),
    ("POST", "/channels", {"name": "tracking", "maxBytes": -1}),
    ("POST", "/channels", {"name": "tracking", "publicLocal": True}),
    ("PATCH", "/channels/recordings", {"public": "yes"}),
    ("PATCH", "/channels/recordings", {"owner": None}),
    ("PATCH", "/channels/recordings", {"public": True, "retentionDays": 10**6}),
    ("PUT", f"/channels/recordings/memberships/{NODE}", {"asked": ["everything"]}),
    ("PUT", f"/channels/recordings/memberships/{NODE}", {"offer": "all"}),
    ("PUT", f"/channels/recordings/memberships/{NODE}", {"passcodes": [1]}),
    ("PUT", "/channels/recordings/memberships/x", {}),
    ("PUT", "/channels/recordings/authorizations/user/ann", {"roles": []}),
    ("PUT", "/channels/recordings/authorizations/user/ann", {"roles": [["all"]]}),
    ("PUT", "/channels/recordings/authorizations/planet/ann", {"roles": ["all"]}),
    ("PUT", "/channels/recordings/authorizations/user/a%00b", {"roles": ["all"]}),
    ("POST", "/channels/recordings/passcodes", {"roles": ["all"], "passcode": ""}),
    ("POST", "/channels/recordings/passcodes", {"roles": ["all"], "label": "\u202e"}),
    ("DELETE", "/channels/recordings/objects/sha1/..%2f..%2fx", None),
    ("GET", "/channels/recordings/objects?limit=0", None),
    ("GET", "/channels/recordings/objects?limit=%C2%B2", None),
    ("GET", "/channels/recordings/objects?limit=1&limit=2", None),
    ("GET", "/audit?before=-1", None),
    ("GET", "/audit?before=99999999999999999999", None),
    ("GET", "/audit?colour=red", None),
    ("POST", "/reindex?dry_run=maybe", None),
]


@pytest.mark.parametrize(("method", "path", "body"), BAD, ids=lambda one: str(one)[:50])
def test_bad_input_is_refused_and_changes_nothing(world: World, method: str, path: str, body: Any) -> None:
    before = everything(world)
    if body == {"user": "ann", "scopes": ["read"], "expiresAt": float("inf")}:
        body = b'{"user": "ann", "scopes": ["read"], "expiresAt": 1e400}'
    status, name = code(send(world, "admin", method, path, body))
    assert (status, name) in {(400, "invalid_input"), (400, "invalid_json")}
    assert everything(world) == before


def test_large_bodies(world: World) -> None:
    assert code(send(world, "admin", "POST", "/users", b'{"name": "%s"}' % (b"x" * 2_000_000))) == (413, "too_large")


def test_wrong_methods(world: World) -> None:
    for method, path in (("PUT", "/users"), ("POST", "/audit"), ("DELETE", "/settings"), ("PATCH", "/tokens/x")):
        assert send(world, "admin", method, path, {}).status == 405


def test_settings(world: World) -> None:
    found = {one["variable"]: one for one in world.admin("GET", "/settings")["settings"]}
    assert found["KACHERY_LAB_AUDIT_DAYS"]["value"] == "30"
    assert found["KACHERY_LAB_AUDIT_DAYS"]["origin"] == "KACHERY_LAB_AUDIT_DAYS"
    assert found["KACHERY_LAB_ALLOW_HALT"] == {
        "variable": "KACHERY_LAB_ALLOW_HALT",
        "value": "true",
        "origin": "default",
        "description": "Whether `/halt` stops the server",
    }


def test_secrets_are_masked(make_node: Any) -> None:
    secret = "klk_" + "s" * 32
    running = make_node(env={"KACHERY_LAB_ADMIN_TOKEN": secret}).start()
    answer = running.request("GET", f"{ADMIN}/settings", auth=secret)
    assert answer.status == 200
    assert secret.encode() not in answer.body
    shown = {one["variable"]: one["value"] for one in answer.json()["settings"]}
    assert (shown["KACHERY_LAB_ADMIN_TOKEN"], shown["KACHERY_LAB_TOKEN"]) == ("********", "")


def test_the_audit(world: World) -> None:
    first = world.admin("GET", "/audit?limit=1")
    assert first["retentionDays"] == 30
    send(world, "owner", "GET", "/users")
    send(world, "other", "GET", "/channels/recordings")
    send(world, "other", "DELETE", "/channels/recordings")
    send(world, "owner", "PATCH", "/channels/recordings", {"maxBytes": 5})
    entries = world.admin("GET", "/audit?limit=4")["entries"]
    assert [(one["principal"], one["action"], one["object"], one["outcome"]) for one in reversed(entries)] == [
        ("user:ann", "read", f"{ADMIN}/users", "forbidden"),
        ("user:ben", "read", f"{ADMIN}/channels/recordings", "not_found"),
        ("user:ben", "channel.remove", "recordings", "not_found"),
        ("user:ann", "channel.update", "recordings", "done"),
    ]
    assert all(one["peer"].startswith("127.") for one in entries)
    page = world.admin("GET", "/audit?limit=2")
    following = world.admin("GET", f"/audit?limit=2&before={page['next']}")
    assert page["entries"] + following["entries"] == entries
    only = world.admin("GET", "/audit?principal=user:ben&outcome=not_found&action=channel.remove&object=recordings")
    assert entries[1] in only["entries"]


def test_deleting_a_blob_and_reindex_are_in_the_audit(world: World) -> None:
    assert world.node.store(b"abc").status == 200
    for kind in ("client", "admin"):
        world.send(Call("DELETE", f"/api/v1/blobs/{SHA1}"), world.credential(kind))
        send(world, kind, "POST", "/reindex?dry_run=true")
    entries = world.admin("GET", "/audit?limit=4")["entries"]
    assert [(one["principal"], one["action"], one["outcome"]) for one in reversed(entries)] == [
        *(("user:ann", "blob.delete", "forbidden"), ("user:ann", "reindex", "forbidden")),
        *(("user:boss", "blob.delete", "done"), ("user:boss", "reindex", "done")),
    ]
