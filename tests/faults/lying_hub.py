"""A proxy in front of a hub that changes what its buckets say of feeds, or loses answers, and passes on the rest."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.proxies import relay
from tests.servers import RunningNode

_FEED = re.compile(r"/feeds/../../../([0-9a-f]{64})/subfeeds/../../../[0-9a-f]{40}/([^/?]+)$")
Edit = Callable[[str, Any], Any]
"""(Last part of the path, the document) -> the document to hand on; None: not there."""


class LyingHub:
    """`edits` by feed id; `lose`: methods of which every other answer is lost. Nodes that use it have `url` for their
    hub."""

    def __init__(self, hub: RunningNode) -> None:
        self.edits: dict[str, Edit] = {}
        self.told = 0
        self.lose: set[str] = set()
        self.lost = 0
        self._asked = 0
        lying = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                if self.headers.get("Upgrade", "").lower() == "websocket":
                    self._tunnel()
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=30)
                try:
                    connection.request(self.command, self.path, body or None, dict(self.headers))
                    answer = connection.getresponse()
                    data, status = answer.read(), answer.status
                except OSError:
                    self.close_connection = True
                    return
                finally:
                    connection.close()
                if lying.loses(self.command):
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                found = _FEED.search(self.path)
                edit = lying.edits.get(found[1]) if found and self.command == "GET" else None
                if found and edit is not None:
                    lying.told += 1
                    changed = edit(found[2], json.loads(data) if status == 200 else None)
                    status, data = (404, b"{}") if changed is None else (200, json.dumps(changed).encode())
                self.send_response(status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_HEAD = _pass_on

            def _tunnel(self) -> None:
                self.close_connection = True
                with socket.create_connection(("127.0.0.1", hub.port)) as there:
                    head = f"{self.requestline}\r\n{self.headers}"
                    there.sendall(head.replace("\r\n", "\n").replace("\n", "\r\n").encode())
                    relay(self.connection, there)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def loses(self, method: str) -> bool:
        """Whether this answer is lost."""
        if method not in self.lose:
            return False
        self._asked += 1
        self.lost += self._asked % 2
        return self._asked % 2 == 1

    def __enter__(self) -> LyingHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
