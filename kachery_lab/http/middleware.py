"""What wraps every route, outermost first: `RequestLog`, `Cors`, `HostCheck`, `Errors`.

Pure ASGI classes; each does one thing and costs microseconds.
"""

from __future__ import annotations

import ipaddress
import os
import re
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import count

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kachery_lab.errors import Forbidden, KacheryLabError, UnknownHost
from kachery_lab.http.errors import answer_to, problem, unexpected
from kachery_lab.observability.logging import RateLimited, redact_text
from kachery_lab.observability.request_lines import RequestLogger, request_logger

ALLOW_METHODS = b"GET,HEAD,PUT,PATCH,POST,DELETE"

OPEN_TO_PAGES = ("/sha1/", "/bucket/upload/")
EXPOSED = b"Content-Length, Content-Range, Accept-Ranges, ETag, Content-Disposition, Content-Encoding"
_TO_ANY_PAGE = [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", EXPOSED)]
PREFLIGHT_SECONDS = b"86400"

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_MOST_ECHOED = 2048
_SPACES = re.compile(r"\s")


def _header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def _without_port(host: str) -> str:
    """A Host header value in lower case, without port and without the dot of a full name."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    if host.count(":") == 1:
        host = host.partition(":")[0]
    return host.removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def host_rule(names: Iterable[str]) -> Callable[[str], bool]:
    """Accepts IP literals, `localhost` and these names, each with any port.

    A page of another site can make its own name resolve to this machine (DNS rebinding), but it cannot make the browser
    send an address or a name of ours.
    """
    allowed = frozenset({"localhost", *(_without_port(name) for name in names if name)})

    @lru_cache(maxsize=256)
    def accepts(host: str) -> bool:
        name = _without_port(host)
        return name in allowed or _is_address(name)

    return accepts


class HostCheck:
    """421 for a Host that is not one of this machine's, naming the setting. `allowed`: names, or a rule of its own."""

    def __init__(self, app: ASGIApp, allowed: Callable[[str], bool] | Iterable[str] = ()) -> None:
        self.app = app
        self.accepts = allowed if callable(allowed) else host_rule(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in {"http", "websocket"}:
            host = _header(scope, b"host")
            # Only HTTP/1.0 gets here without one, and no browser speaks that.
            if host is not None and not self.accepts(host.decode("latin-1")):
                await _refuse_host(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _refuse_host(scope: Scope, receive: Receive, send: Send) -> None:
    hint = "Name this host in KACHERY_LAB_ALLOWED_HOSTS, or use the machine's own name or its address."
    error = UnknownHost("The Host header names a machine that this server does not answer for.", hint=hint)
    if scope["type"] == "http":
        await problem(error)(scope, receive, send)
    else:
        await _refuse_socket(error, scope, receive, send)


async def _refuse_socket(error: KacheryLabError, scope: Scope, receive: Receive, send: Send) -> None:
    if "websocket.http.response" in scope.get("extensions", {}):
        await problem(error)(scope, receive, send)
    else:
        await send({"type": "websocket.close", "code": 1008})


def allow_origin(origins: tuple[str, ...], origin: bytes | None) -> bytes | None:
    """Access-Control-Allow-Origin: `*`, the request's origin if exactly that is listed, else the first listed one."""
    if origins == ("*",):
        return b"*"
    if origin is not None:
        for listed in origins:
            if origin == listed.encode("latin-1"):
                return origin
    return origins[0].encode("latin-1") if origins else None


def _echo(wanted: bytes) -> bytes:
    """The header names of a preflight, without anything that is no header name."""
    names = [name.strip() for name in wanted[:_MOST_ECHOED].decode("latin-1").split(",")]
    return ",".join(name for name in names if _TOKEN.fullmatch(name)).encode("ascii")


class Cors:
    """Every answer names the origin that may see it; OPTIONS on any path is 204, before any authorisation.

    Never reflects an origin that is not listed and never allows credentials: no answer here depends on a cookie.
    Below `OPEN_TO_PAGES` any page may read: what is not public needs a ticket in its address, or a token, and who
    has that needs no browser.
    """

    def __init__(
        self,
        app: ASGIApp,
        origins: tuple[str, ...] = ("http://localhost:3000",),
        open_to_pages: tuple[str, ...] = OPEN_TO_PAGES,
    ) -> None:
        if "*" in origins and origins != ("*",):
            raise ValueError("`*` stands alone or not at all")
        self.app = app
        self.origins = origins
        self.open_to_pages = open_to_pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._socket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        any_page = scope["path"].startswith(self.open_to_pages)
        if any_page:
            added = _TO_ANY_PAGE.copy()
        else:
            allowed = allow_origin(self.origins, _header(scope, b"origin"))
            added = [] if allowed is None else [(b"access-control-allow-origin", allowed)]
            if allowed != b"*":
                added.append((b"vary", b"Origin"))
        if scope["method"] == "OPTIONS":
            if any_page:
                added.append((b"access-control-max-age", PREFLIGHT_SECONDS))
            if _header(scope, b"access-control-request-private-network") == b"true":
                added.append((b"access-control-allow-private-network", b"true"))
            wanted = _header(scope, b"access-control-request-headers")
            added += [(b"access-control-allow-methods", ALLOW_METHODS), (b"content-length", b"0")]
            if wanted is not None:
                added.append((b"access-control-allow-headers", _echo(wanted)))
                added.append((b"vary", b"Access-Control-Request-Headers"))
            await send({"type": "http.response.start", "status": 204, "headers": added})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_origin(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                if not any(name.lower() == b"access-control-allow-origin" for name, _ in headers):
                    headers += added
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_origin)

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Browsers open WebSockets to anywhere and only say for which page: one that is not listed is refused."""
        origin = _header(scope, b"origin")
        if origin is None or allow_origin(self.origins, origin) in (b"*", origin):
            await self.app(scope, receive, send)
            return
        hint = "Name the page's origin in KACHERY_LAB_CORS_ORIGINS."
        await _refuse_socket(
            Forbidden("Pages of this origin may not use this server.", hint=hint), scope, receive, send
        )


class Errors:
    """Every exception of a route becomes an answer: the problem document of its error, or, for one that nobody
    expected, a traceback in the log and a problem without details. Stands for Starlette's two layers for exceptions."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        except ClientDisconnect:
            # There is nobody left to answer, and a client that goes away is no failure of ours.
            return
        except Exception as error:
            if started:
                # Raising makes the server cut the connection, so that the client sees a truncated answer, and log it.
                raise
            answer = answer_to(error)
            if answer is None:
                _log_failure()
                answer = unexpected()
            await answer(scope, receive, send)


def _log_failure() -> None:
    try:
        structlog.get_logger().exception("request_failed")
    except Exception:  # noqa: S110 - a log that fails must not cost the answer
        pass


class RequestLog:
    """One line per request; `scope["state"]["request_id"]` and `X-Request-Id`; `//api` is `/api`.

    The query never reaches the log: it holds signatures and tokens. Of each 4xx status at most `most_refusals` lines
    per 10 s are written, then a line with their number.
    """

    def __init__(self, app: ASGIApp, *, most_refusals: int = 100, log: RequestLogger | None = None) -> None:
        self.app = app
        self._log = log
        self._refusals = RateLimited(most_refusals)
        self._prefix = os.urandom(5).hex()
        self._numbers = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        if path.startswith("//api"):
            scope["path"] = path = "/" + path.lstrip("/")
            if scope.get("raw_path"):
                scope["raw_path"] = b"/" + scope["raw_path"].lstrip(b"/")
        request_id = f"{self._prefix}-{next(self._numbers):x}"
        scope.setdefault("state", {})["request_id"] = request_id
        # Never unbound: every request runs in a task of its own and binds its own.
        structlog.contextvars.bind_contextvars(request_id=request_id)
        begun = time.perf_counter()
        status = sent = 0

        async def send_counting(message: Message) -> None:
            nonlocal status, sent
            what = message["type"]
            if what in {"http.response.body", "websocket.http.response.body"}:
                sent += len(message.get("body", b""))
            elif what in {"http.response.start", "websocket.http.response.start"}:
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            elif what == "websocket.accept":
                status = 101
            await send(message)

        try:
            await self.app(scope, receive, send_counting)
        finally:
            self._write(scope, request_id, status, sent, time.perf_counter() - begun)

    def _write(self, scope: Scope, request_id: str, status: int, sent: int, seconds: float) -> None:
        try:
            if 400 <= status < 500 and not self._refusals.allows(f"status_{status}"):
                return
            self._refusals.flush()
            if self._log is None:
                # Made once: making a logger costs more than writing the line.
                self._log = request_logger()
            client = scope.get("client")
            self._log.info(
                "request",
                method=scope.get("method", "WEBSOCKET"),
                # A space ends an address in a text: without it the rest of a secret would be shown.
                path=redact_text(_SPACES.sub("%20", scope["path"]))[:1024],
                status=status or None,
                bytes=sent,
                ms=round(seconds * 1000, 2),
                peer=client[0] if client else None,
                request_id=request_id,
            )
        except Exception:  # noqa: S110 - a log that fails must not cost the answer
            pass
