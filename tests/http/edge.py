"""A real server on a loopback port with an application that notes what it saw, and raw sockets to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kachery_lab.http.server import EdgeLimits, build_server

MIB = 1024 * 1024
BIG = 24 * MIB


class Seen:
    """What the application saw."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, int]] = []
        self.disconnects = 0
        self.headers: dict[str, str] = {}
        self.gate = threading.Event()


def make_app(seen: Seen) -> Starlette:
    async def echo(request: Request) -> Response:
        size = 0
        try:
            async for piece in request.stream():
                size += len(piece)
        except ClientDisconnect:
            seen.disconnects += 1
            raise
        seen.headers = dict(request.headers)
        seen.requests.append((request.method, request.url.path, size))
        return PlainTextResponse(str(size))

    async def early(request: Request) -> Response:
        return PlainTextResponse("no", 401)

    async def gated(request: Request) -> Response:
        while not seen.gate.is_set():
            await asyncio.sleep(0.01)
        return PlainTextResponse("opened")

    async def big(request: Request) -> Response:
        async def pieces() -> Any:
            for _ in range(BIG // MIB):
                yield bytes(MIB)

        return StreamingResponse(pieces(), headers={"content-length": str(BIG)})

    async def mirror(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    methods = ["GET", "POST", "PUT"]
    return Starlette(
        routes=[
            Route("/echo", echo, methods=methods),
            Route("/store", echo, methods=methods),
            Route("/early", early, methods=methods),
            Route("/gated", gated, methods=methods),
            Route("/big", big),
            WebSocketRoute("/ws", mirror),
        ]
    )


class Running:
    def __init__(self, seen: Seen, port: int, server: uvicorn.Server) -> None:
        self.seen = seen
        self.port = port
        self.server = server

    def connect(self, timeout: float = 30.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def talk(self, data: bytes, timeout: float = 30.0) -> bytes:
        """Everything that is answered until the server closes."""
        with self.connect(timeout) as connection:
            connection.sendall(data)
            return drain(connection)


def drain(connection: socket.socket) -> bytes:
    answer = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            answer += piece
    return bytes(answer)


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """One answer with a Content-Length, leaving the connection open."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(65536)
    assert len(body) == length
    return int(head.split()[1]), body


@contextlib.contextmanager
def running(server_of: Callable[[Any], uvicorn.Server]) -> Iterator[Running]:
    """The server of `make_app`, in a thread, until the block is left."""
    logging.getLogger("uvicorn.error").disabled = True
    seen = Seen()
    server = server_of(make_app(seen))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Running(seen, listener.getsockname()[1], server)
        finally:
            seen.gate.set()
            server.should_exit = True
            thread.join(10)
            logging.getLogger("uvicorn.error").disabled = False
    assert not thread.is_alive()


def guarded_server(limits: EdgeLimits) -> Callable[[Any], uvicorn.Server]:
    return lambda app: build_server(app, limits=limits, graceful_timeout=1)


def plain_server(app: Any) -> uvicorn.Server:
    """Today's uvicorn without the guard: the positive control."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=HttpToolsProtocol,
            loop="uvloop",
            lifespan="on",
            log_config=None,
            access_log=False,
            timeout_keep_alive=1,
            timeout_graceful_shutdown=1,
        )
    )


def head(line: str = "GET /echo HTTP/1.1", *lines: str, host: str | None = "localhost") -> bytes:
    named = [line, *([f"Host: {host}"] if host is not None else []), *lines]
    return ("\r\n".join(named) + "\r\n\r\n").encode("latin-1")


GOOD = head("GET /echo HTTP/1.1", "Connection: close")


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def wait_for(check: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until
        time.sleep(0.01)
