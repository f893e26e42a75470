"""The second listener: off by default, one user's roles on `default`, listed origins only."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping

import pytest
from starlette.routing import Route

from kachery_lab.http.protocols import figurl_local
from tests.servers import Answer, RunningNode, free_port

FIGURL = "https://figurl.org"
FOREIGN = (
    *("null", "https://evil.example", "https://figurl.org.evil.example", "https://evilfigurl.org"),
    *("http://figurl.org", "https://figurl.org:444", "https://FIGURL.org", "https://figurl.org/", ""),
)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    root = tmp_path_factory.mktemp("figurl")
    for name in ("storage", "metadata"):
        (root / name).mkdir()
    env = {"KACHERY_LAB_FIGURL_PORT": str(free_port()), "KACHERY_LAB_FIGURL_USER": "ann"}
    running = RunningNode(root / "storage", root / "metadata", env={**env, "KACHERY_LAB_FIGURL_BIND": "127.0.0.1"})
    running.start()
    grant(running, "requestFiles", "provideFiles")
    yield running
    assert "Traceback" not in running.log
    running.kill()


def grant(node: RunningNode, *roles: str) -> None:
    path = "/api/admin/v1/channels/default/authorizations/user/ann"
    body = json.dumps({"roles": list(roles)}).encode()
    assert node.request("PUT", path, body, auth=node.admin_token).status < 300


def ask(
    node: RunningNode,
    method: str,
    path: str,
    body: bytes | None = None,
    origin: str | None = FIGURL,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    given = {**(headers or {}), **({} if origin is None else {"Origin": origin})}
    port = int(node.env["KACHERY_LAB_FIGURL_PORT"])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


@pytest.fixture
def data() -> bytes:
    return os.urandom(2000)


def sha1_of(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def test_the_protocol(node: RunningNode, data: bytes) -> None:
    assert ask(node, "GET", "/probe").status == 200
    path = f"/sha1/{sha1_of(data)}"
    assert ask(node, "HEAD", path).status == 404
    assert ask(node, "POST", f"/upload{path}", data).status == 200
    assert ask(node, "POST", f"/upload{path}", data).status == 200
    head = ask(node, "HEAD", path)
    assert (head.status, head.headers["content-length"]) == (200, str(len(data)))
    whole = ask(node, "GET", path)
    assert (whole.status, whole.body) == (200, data)
    assert whole.headers["content-type"] == "application/octet-stream"
    assert whole.headers["cache-control"] == "private, no-store"
    assert whole.headers["content-security-policy"] == "sandbox"
    part = ask(node, "GET", path, headers={"Range": "bytes=5-9"})
    assert (part.status, part.body, part.headers["content-range"]) == (206, data[5:10], f"bytes 5-9/{len(data)}")
    # It lies in the zone `default`, for those who may read there.
    key = f"sha1/{sha1_of(data)[:2]}/{sha1_of(data)[2:4]}/{sha1_of(data)[4:6]}/{sha1_of(data)}"
    objects = node.request("GET", "/api/admin/v1/channels/default/objects?limit=1000", auth=node.admin_token).json()
    assert {one["path"]: one["principal"] for one in objects["objects"]}[key] == "user:ann"


def test_wrong_bytes_are_not_stored(node: RunningNode, data: bytes) -> None:
    path = f"/sha1/{sha1_of(data)}"
    assert ask(node, "POST", f"/upload{path}", data[:-1]).status == 422
    assert ask(node, "POST", "/upload/sha1/x", data).status == 400
    assert ask(node, "GET", path).status == 404
    assert ask(node, "POST", f"/upload{path}", data).status == 200
    assert ask(node, "GET", path).body == data


@pytest.mark.parametrize("origin", [None, *FOREIGN])
def test_other_pages(node: RunningNode, data: bytes, origin: str | None) -> None:
    path = f"/sha1/{sha1_of(data)}"
    assert ask(node, "POST", f"/upload{path}", data).status == 200
    new = data + b"1"
    for method, target, body in (
        ("GET", path, None),
        ("HEAD", path, None),
        ("POST", f"/upload/sha1/{sha1_of(new)}", new),
    ):
        refused = ask(node, method, target, body, origin)
        assert refused.status == 403
        assert refused.headers.get("access-control-allow-origin") not in (origin, "*", "null")
        if method == "GET":
            assert b"KACHERY_LAB_FIGURL_ORIGINS" in refused.body
    assert ask(node, "GET", f"/sha1/{sha1_of(new)}").status == 404
    served = ask(node, "GET", path)
    assert (served.status, served.headers["access-control-allow-origin"]) == (200, FIGURL)
    assert "Origin" in served.headers["vary"]


def test_preflight(node: RunningNode) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Private-Network": "true"}
    for origin in (FIGURL, "https://www.figurl.org", "https://evil.example"):
        answer = ask(node, "OPTIONS", "/upload/sha1/x", None, origin, wanted)
        assert answer.status == 204
        allowed = answer.headers["access-control-allow-origin"]
        assert (allowed == origin) == (origin != "https://evil.example")
        assert "access-control-allow-credentials" not in answer.headers


def test_rebinding(node: RunningNode, data: bytes) -> None:
    """A page of another site whose name was made to resolve to this machine."""
    path = f"/sha1/{sha1_of(data)}"
    assert ask(node, "POST", f"/upload{path}", data).status == 200
    for host, status in (("evil.example:61442", 421), ("localhost:61442", 200), ("127.0.0.1:61442", 200)):
        assert ask(node, "GET", path, headers={"Host": host}).status == status


def test_the_users_roles_count(node: RunningNode, data: bytes) -> None:
    path = f"/sha1/{sha1_of(data)}"
    assert ask(node, "POST", f"/upload{path}", data).status == 200
    grant(node, "requestFiles")
    try:
        refused = ask(node, "POST", f"/upload/sha1/{sha1_of(data + b'1')}", data + b"1")
        assert refused.status == 403
        assert b"provideFiles" in refused.body
        assert ask(node, "GET", path).status == 200
        grant(node, "provideFiles")
        assert ask(node, "GET", path).status == 403
    finally:
        grant(node, "requestFiles", "provideFiles")
    assert ask(node, "GET", path).body == data


def test_nothing_else_is_there(node: RunningNode) -> None:
    for path in ("/api/v1/info", "/livez", "/api/admin/v1/users", "/stats", "/api/gateway", "/sha1/x/y"):
        assert ask(node, "GET", path).status == 404
    addresses = {
        (route.path, *sorted(route.methods or ())) for route in figurl_local.routes() if isinstance(route, Route)
    }
    assert addresses == {
        ("/probe", "GET", "HEAD"),
        ("/sha1/{hash}", "GET", "HEAD"),
        ("/upload/sha1/{hash}", "POST"),
    }


def test_off_by_default(make_node: Callable[..., RunningNode]) -> None:
    node = make_node().start()
    with socket.socket() as probe, pytest.raises(OSError, match="refused"):
        probe.connect(("127.0.0.1", 61442))
    assert "figurl" not in node.log


def test_settings_that_do_not_fit(make_node: Callable[..., RunningNode]) -> None:
    for env, text in (
        ({"KACHERY_LAB_FIGURL_PORT": "61442"}, "KACHERY_LAB_FIGURL_USER"),
        ({"KACHERY_LAB_FIGURL_ORIGINS": "*"}, "by name"),
        ({"KACHERY_LAB_RESOURCE_DIRS": "default"}, "zone=/absolute/directory"),
        ({"KACHERY_LAB_RESOURCE_DIRS": "a/b=/tmp"}, "channelName"),
    ):
        done = make_node(f"wrong{len(text)}", env=env).run_cli("start")
        assert done.returncode == 1
        assert text in done.stderr
