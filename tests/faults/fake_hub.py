"""A hub that answers whatever a test wants, and a canary that counts who is led back to this machine's loopback."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from kachery_lab.client.reach import THIS_MACHINE, depth
from kachery_lab.core.keys import PrivateKey
from tests.faults.report import missing

HUB_ID = PrivateKey.from_seed("0b" * 32).public_hex
CHANNEL = "rig-data"


def own_address() -> str:
    """An address of this machine that is not its loopback, so that a hub there lies further outside."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            missing("needs a network interface besides the loopback")
        address = str(probe.getsockname()[0])
    if depth(address) == THIS_MACHINE:
        missing("needs a network interface besides the loopback")
    return address


class Canary:
    """Counts connections to the loopback, IPv4 and IPv6, on one port; answers each as a hub would."""

    def __init__(self, port: int) -> None:
        self.hits = 0
        self._sockets = []
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            sock = socket.socket(family)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            sock.listen(50)
            self._sockets.append(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        while True:
            try:
                connection, _ = sock.accept()
            except OSError:
                return
            self.hits += 1
            with connection:
                connection.settimeout(1)
                try:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc")
                except OSError:
                    continue

    def close(self) -> None:
        for sock in self._sockets:
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class FakeHub:
    """A hub that answers what a test wants, and the canary behind the same port of the loopback."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.public_url: str | None = None
        self.bucket_url = ""
        self.upload_url = ""
        self.sent = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _any(self) -> None:
                self.close_connection = True
                length = int(self.headers.get("content-length") or 0)
                while length > 0 and (piece := self.rfile.read(min(length, 65536))):
                    length -= len(piece)
                try:
                    hub.answer(self)
                except OSError:
                    return

            do_GET = do_HEAD = do_PUT = do_POST = _any

        self.address = own_address()
        self._server = ThreadingHTTPServer((self.address, 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://{self.address}:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.canary = Canary(self.port)
        self.reset()

    def reset(self) -> None:
        self.answers, self.public_url, self.sent = {}, None, 0
        self.bucket_url = f"{self.url}/bucket/~x/{CHANNEL}"
        self.upload_url = f"{self.url}/bucket/upload/x"
        self.canary.hits = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        kind = "bucket" if path.startswith("/bucket/") else path.rpartition("/")[2]
        kind = f"{request.command} {kind}" if kind == "bucket" else kind
        if kind in self.answers:
            self.answers[kind](request)
        elif kind == "info":
            self.send(request, {"nodeId": HUB_ID, "publicUrl": self.public_url})
        elif kind == "memberships":
            roles = ["requestFiles", "provideFiles"]
            one = {"channel": CHANNEL, "public": False, "roles": roles, "bucketUrl": self.bucket_url}
            self.send(request, {"memberships": [one]})
        elif kind == "uploads":
            self.send(request, {"alreadyUploaded": False, "url": self.upload_url})
        elif kind == "report":
            self.send(request, {"approved": True})
        else:
            self.send(request, b"abc")

    def send(self, request: BaseHTTPRequestHandler, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request.send_response(status)
        for name, value in {"Content-Length": str(len(data)), "Connection": "close", **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.canary.close()
