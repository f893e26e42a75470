from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from kachery_lab.http.health import readyz, routes
from kachery_lab.http.middleware import Cors, Errors, HostCheck, RequestLog, allow_origin

Sent = list[dict[str, Any]]


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"hello"})


def call(
    app: Callable[..., Any],
    *headers: tuple[str, str],
    method: str = "GET",
    path: str = "/",
    kind: str = "http",
    **more: Any,
) -> Sent:
    sent: Sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"signature=geheim",
        "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        "client": ("192.0.2.1", 5),
        "state": {},
        **more,
    }
    asyncio.run(app(scope, receive, send))
    return sent


def header(sent: Sent, name: str) -> list[str]:
    return [value.decode("latin-1") for key, value in sent[0]["headers"] if key.decode().lower() == name.lower()]


def problem(sent: Sent) -> dict[str, Any]:
    assert header(sent, "content-type") == ["application/problem+json"]
    loaded: dict[str, Any] = json.loads(sent[1]["body"])
    return loaded


NAMES = ["labhost", "labhost.example.edu", "Kachery.Example.org."]


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "LOCALHOST:20431", "localhost.", "127.0.0.1", "127.0.0.1:20431", "10.1.2.3:1", "[::1]", "[::1]:80",
        "[fe80::1%25eth0]:80", "labhost", "labhost:20431", "LabHost.example.edu.:80", "kachery.example.org",
    ],
)  # fmt: skip
def test_h11_hosts_of_this_machine_pass(host: str) -> None:
    assert call(HostCheck(hello, NAMES), ("Host", host))[0]["status"] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.com", "evil.com:20431", "labhost.evil.com", "evil-labhost", "labhost.example.edu.evil",
        "localhost.evil.com",
        "127.0.0.1.evil.com", "", ".", "xlocalhost", "1.2.3.4.5", "labhost..", "[evil]", "0x7f.1",
    ],
)  # fmt: skip
def test_h11_another_host_is_421_and_names_the_setting(host: str) -> None:
    sent = call(HostCheck(hello, NAMES), ("Host", host))
    assert sent[0]["status"] == 421
    assert "KACHERY_LAB_ALLOWED_HOSTS" in problem(sent)["hint"]
    assert host == "" or host not in json.dumps(problem(sent)["detail"]) or host == "."
    assert call(hello, ("Host", host))[0]["status"] == 200
    assert call(HostCheck(hello, lambda _host: True), ("Host", host))[0]["status"] == 200


def test_h11_websockets_are_checked_too() -> None:
    async def accept(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    app = HostCheck(accept, NAMES)
    assert call(app, ("Host", "labhost"), kind="websocket")[0]["type"] == "websocket.accept"
    assert call(app, ("Host", "evil.com"), kind="websocket")[0]["type"] == "websocket.close"
    answered = call(app, ("Host", "evil.com"), kind="websocket", extensions={"websocket.http.response": {}})
    assert (answered[0]["type"], answered[0]["status"]) == ("websocket.http.response.start", 421)


def test_h11_control_without_the_check_a_rebound_name_is_served() -> None:
    assert call(TrustedHostMiddleware(hello), ("Host", "evil.com"))[0]["status"] == 200  # type: ignore[arg-type]


ORIGINS = ("http://localhost:3000", "https://figurl.org")
LOOKALIKES = [
    "null", "http://evil.com", "https://figurl.org.evil.com", "https://evilfigurl.org", "http://figurl.org",
    "https://figurl.org:444", "https://figurl.org/", "https://FIGURL.org", "http://localhost:30000", "*", "",
    "https://figurl.org, http://evil.com",
]  # fmt: skip


@pytest.mark.parametrize("origin", LOOKALIKES)
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_h11_an_origin_that_is_not_listed_is_never_reflected(origin: str, method: str) -> None:
    sent = call(Cors(hello, ORIGINS), ("Origin", origin), method=method)
    assert header(sent, "access-control-allow-origin") == ["http://localhost:3000"]
    assert header(sent, "access-control-allow-credentials") == []
    assert "Origin" in header(sent, "vary")


@pytest.mark.parametrize("origin", ORIGINS)
def test_h11_a_listed_origin_is_answered(origin: str) -> None:
    sent = call(Cors(hello, ORIGINS), ("Origin", origin))
    assert header(sent, "access-control-allow-origin") == [origin]
    assert header(sent, "vary") == ["Origin"]
    assert sent[1]["body"] == b"hello"


def test_cors_as_the_older_daemon_answers() -> None:
    sent = call(Cors(hello))
    assert header(sent, "access-control-allow-origin") == ["http://localhost:3000"]
    assert header(sent, "vary") == ["Origin"]
    sent = call(
        Cors(hello),
        ("Access-Control-Request-Headers", "content-type,KACHERY-CLIENT-AUTH-CODE"),
        method="OPTIONS",
        path="/any/path",
    )
    assert sent[0]["status"] == 204
    assert header(sent, "access-control-allow-methods") == ["GET,HEAD,PUT,PATCH,POST,DELETE"]
    assert header(sent, "access-control-allow-headers") == ["content-type,KACHERY-CLIENT-AUTH-CODE"]


def test_cors_star_stands_alone_and_carries_no_credentials() -> None:
    sent = call(Cors(hello, ("*",)), ("Origin", "http://evil.com"))
    assert header(sent, "access-control-allow-origin") == ["*"]
    assert header(sent, "access-control-allow-credentials") == []
    with pytest.raises(ValueError, match="alone"):
        Cors(hello, ("*", "http://a"))
    assert header(call(Cors(hello, ()), ("Origin", "null")), "access-control-allow-origin") == []
    assert allow_origin((), b"null") is None


def test_cors_does_not_override_a_room_that_decided_itself() -> None:
    async def own(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"Access-Control-Allow-Origin", b"https://figurl.org")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    assert header(call(Cors(own)), "access-control-allow-origin") == ["https://figurl.org"]


def test_h10_echoed_header_names_are_header_names() -> None:
    wanted = "x-good, x bad,\tx-tab, a\r\nset-cookie: b, \x1b[31m, , " + "x" * 3000
    sent = call(Cors(hello), ("Access-Control-Request-Headers", wanted), method="OPTIONS")
    (echoed,) = header(sent, "access-control-allow-headers")
    assert echoed.startswith("x-good,x-tab")
    assert "set-cookie" not in echoed
    assert "bad" not in echoed
    assert echoed.isprintable()
    assert len(echoed) < 2100


class Lines:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})


def test_one_line_per_request() -> None:
    log = Lines()
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["state"]["request_id"])
        await hello(scope, receive, send)

    wrapped = RequestLog(app, log=log)
    first, second = call(wrapped, path="/probe"), call(wrapped, path="/probe")
    assert [header(first, "x-request-id"), header(second, "x-request-id")] == [[seen[0]], [seen[1]]]
    assert seen[0] != seen[1]
    line = log.lines[0]
    assert line["ms"] >= 0
    assert {name: line[name] for name in line if name not in {"ms", "request_id"}} == {
        "event": "request", "method": "GET", "path": "/probe", "status": 200, "bytes": 5, "peer": "192.0.2.1",
    }  # fmt: skip
    assert len(log.lines) == 2


def test_the_line_holds_no_secret_of_the_address() -> None:
    log = Lines()
    app = RequestLog(hello, log=log)
    paths = ["/bucket/~geheim/chan/a", "/bucket/upload/geheim", "/p/geheim/r/zone", "/x/klk_geheim"]
    paths += ["/bucket/upload/a geheim", "/bucket/upload/a\n geheim", "/bucket/upload/a/geheim", "/p/a geheim/r/zone"]
    for path in paths:
        call(app, path=path)
    assert "geheim" not in json.dumps(log.lines)
    assert [line["path"].count("[redacted]") for line in log.lines] == [1] * len(paths)


def test_double_slash_api() -> None:
    paths: list[tuple[str, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        paths.append((scope["path"], scope["raw_path"]))
        await hello(scope, receive, send)

    for path in ("//api/kacheryNode", "/api/x", "//store", "///api/x"):
        call(RequestLog(app, log=Lines()), path=path)
    assert paths == [
        ("/api/kacheryNode", b"/api/kacheryNode"),
        ("/api/x", b"/api/x"),
        ("//store", b"//store"),
        ("///api/x", b"///api/x"),
    ]


def test_a_log_that_fails_costs_no_request() -> None:
    class Broken:
        def info(self, event: str, **fields: Any) -> None:
            raise BrokenPipeError

    assert call(RequestLog(hello, log=Broken()))[1]["body"] == b"hello"


def test_o6_a_flood_of_refusals_makes_few_lines() -> None:
    log = Lines()

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    flooded = RequestLog(refuse, most_refusals=20, log=log)
    answered = RequestLog(hello, most_refusals=20, log=log)
    for _ in range(1000):
        call(flooded)
    assert len(log.lines) == 20
    for _ in range(50):
        call(answered)
    assert len(log.lines) == 70


def test_websockets_are_logged() -> None:
    async def accept(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})

    log = Lines()
    call(RequestLog(accept, log=log), kind="websocket", path="/ws")
    assert (log.lines[0]["status"], log.lines[0]["path"]) == (101, "/ws")


def test_an_unexpected_failure_is_a_500_without_details(capfd: pytest.CaptureFixture[str]) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("geheimnis")

    sent = call(Errors(fails))
    assert sent[0]["status"] == 500
    assert problem(sent)["code"] == "internal_error"
    assert "geheimnis" not in sent[1]["body"].decode()
    logged = capfd.readouterr()
    assert "geheimnis" in logged.out + logged.err
    assert "Traceback" in logged.out + logged.err


def test_a_failure_in_the_middle_of_an_answer_cuts_it() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    with pytest.raises(RuntimeError, match="late"):
        call(Errors(fails))


def test_a_client_that_went_away_is_no_failure(capfd: pytest.CaptureFixture[str]) -> None:
    async def gone(scope: Any, receive: Any, send: Any) -> None:
        raise ClientDisconnect

    assert call(Errors(gone)) == []
    assert capfd.readouterr().out == ""


def test_other_scopes_pass_untouched() -> None:
    kinds: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        kinds.append(scope["type"])

    call(RequestLog(Cors(HostCheck(Errors(app), []))), kind="lifespan")
    assert kinds == ["lifespan"]


def test_health() -> None:
    found: list[str] = []

    async def problems() -> list[str]:
        return found

    live, ready = routes(problems)
    assert call(live.app)[1]["body"] == b"ok"
    sent = call(ready.app)
    assert (sent[0]["status"], json.loads(sent[1]["body"])) == (200, {"ready": True, "problems": []})
    found.append("the volume does not answer")
    sent = call(ready.app)
    assert (sent[0]["status"], json.loads(sent[1]["body"])["problems"]) == (503, found)
    assert call(live.app)[0]["status"] == 200
    assert callable(readyz(problems))
