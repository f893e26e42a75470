"""The load generator: one process that sends requests over raw sockets and reads no more of the answers than it must.

`python -m tests.bench.load` reads a job as JSON from standard input and writes what it found as JSON to standard
output. Only the time between the first byte sent and the last byte received counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable
from typing import Any

BUFFER = 1 << 20
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
TIMEOUT = 600


def run(job: str, **arguments: Any) -> Any:
    """Do a job in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps({"job": job, **arguments}).encode(),
        stdout=subprocess.PIPE,
        timeout=TIMEOUT,
        check=True,
    )
    return json.loads(done.stdout)


def _connect(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _length_behind(head: bytes) -> int:
    """Content-Length of an answer that must be a success."""
    if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 201", b"HTTP/1.1 206")):
        raise RuntimeError(f"the server answered {head[:2000]!r}")
    found = _LENGTH.search(head)
    if found is None:
        raise RuntimeError(f"no Content-Length: {head!r}")
    return int(found.group(1))


# -- whole files ---------------------------------------------------------------------------------------------------


def download(port: int, request: str) -> dict[str, Any]:
    """One answer on one connection, discarded."""
    buffer = memoryview(bytearray(BUFFER))
    with _connect(port) as connection:
        begun = time.perf_counter()
        connection.sendall(request.encode())
        head = b""
        while b"\r\n\r\n" not in head:
            more = connection.recv(4096)
            if not more:
                raise RuntimeError(f"no whole answer: {head!r}")
            head += more
        head, _, first = head.partition(b"\r\n\r\n")
        size = _length_behind(head)
        left = size - len(first)
        while left and (count := connection.recv_into(buffer)):
            left -= count
        seconds = time.perf_counter() - begun
    if left:
        raise RuntimeError(f"{left} of {size} bytes are missing")
    return {"seconds": seconds, "size": size}


def _upload_one(port: int, path: str, head: bytes, prefix: bytes, start: threading.Barrier, answers: list[Any]) -> None:
    with open(path, "rb") as file, _connect(port) as connection:
        size, offset = os.fstat(file.fileno()).st_size, len(prefix)
        start.wait()
        connection.sendall(head + prefix)
        while offset < size:
            sent = os.sendfile(connection.fileno(), file.fileno(), offset, size - offset)
            offset += sent
        answer = b""
        while b"\r\n\r\n" not in answer or len(answer.partition(b"\r\n\r\n")[2]) < _length_behind(answer):
            more = connection.recv(65536)
            if not more:
                raise RuntimeError(f"no whole answer: {answer!r}")
            answer += more
        answers.append(json.loads(answer.partition(b"\r\n\r\n")[2] or b"null"))


def upload(port: int, path: str, head: str, prefixes: list[str]) -> dict[str, Any]:
    """The file once for each prefix, all at the same time; a prefix takes the place of the file's first bytes."""
    start = threading.Barrier(len(prefixes) + 1)
    answers: list[Any] = []
    threads = [
        threading.Thread(target=_upload_one, args=(port, path, head.encode(), prefix.encode(), start, answers))
        for prefix in prefixes
    ]
    for thread in threads:
        thread.start()
    start.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    if len(answers) != len(prefixes):
        raise RuntimeError("not every upload was answered")
    return {"seconds": seconds, "answers": answers}


# -- many small requests -------------------------------------------------------------------------------------------


class _Connection:
    """One keep-alive connection with its requests; the next goes out when the answer to the last is whole."""

    def __init__(self, port: int) -> None:
        self.socket = _connect(port)
        self.todo: Iterable[bytes] = iter(())
        self.head = b""
        self.left = 0

    def send_next(self) -> bool:
        request = next(self.todo, None)  # type: ignore[call-overload]
        if request is None:
            return False
        self.socket.sendall(request)
        return True

    def receive(self) -> bool:
        """Whether the answer is whole now."""
        data = self.socket.recv(65536)
        if not data:
            raise RuntimeError("the server closed a connection")
        if self.left:
            self.left -= len(data)
            return self.left == 0
        if self.head:
            data = self.head + data
            self.head = b""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.head = data
            return False
        self.left = end + 4 + _length_behind(data[: end + 4]) - len(data)
        return self.left == 0


def _drive(connections: dict[int, _Connection]) -> float:
    """Seconds until every connection's requests are answered."""
    poll = select.epoll()
    begun = time.perf_counter()
    working = 0
    for number, connection in connections.items():
        if connection.send_next():
            poll.register(number, select.EPOLLIN)
            working += 1
    while working:
        for number, _ in poll.poll():
            connection = connections[number]
            if connection.receive() and not connection.send_next():
                poll.unregister(number)
                working -= 1
    seconds = time.perf_counter() - begun
    poll.close()
    return seconds


def requests(port: int, clients: int, each: int, warm: int, template: str, values: list[str]) -> dict[str, Any]:
    """`each` requests on each of `clients` connections, after `warm` that do not count. In the template `%VALUE%` is
    one of `values` in turn, `%CLIENT%` the connection's number, and `%UNIQUE%` 32 characters that come once."""
    made = iter(range(1 << 60))
    run_id = os.urandom(8).hex()

    def make(client: int, count: int) -> list[bytes]:
        found = []
        for number in range(count):
            text = template.replace("%CLIENT%", f"{client:040x}").replace("%UNIQUE%", f"{run_id}{next(made):016x}")
            found.append(text.replace("%VALUE%", values[(client + number) % len(values)] if values else "").encode())
        return found

    connections = [_Connection(port) for _ in range(clients)]
    by_number = {connection.socket.fileno(): connection for connection in connections}
    for count in (warm, each):
        for client, connection in enumerate(connections):
            connection.todo = iter(make(client, count))
        seconds = _drive(by_number)
    return {"seconds": seconds, "per_second": clients * each / seconds}


# -- uploads into a zone -------------------------------------------------------------------------------------------


class _Uploader(_Connection):
    """A connection that announces, sends and finishes small files, one after the other; answers are read."""

    def __init__(self, port: int, zone: str, key: str, size: int) -> None:
        super().__init__(port)
        self._base = f"http://127.0.0.1:{port}"
        self._zone, self._key, self._size = zone, key, size
        self._whole = b""
        self._steps: Generator[bytes, Any, None] | None = None

    def begin(self, count: int) -> None:
        """Upload `count` files when driven."""
        self._steps = self._requests(count)
        self._whole = b""

    def _post(self, kind: str, **fields: Any) -> bytes:
        body = json.dumps({"type": f"{kind}Request", "hashAlg": "sha1", "zoneName": self._zone, **fields}).encode()
        head = f"POST /api/{kind} HTTP/1.1\r\nHost: {self._base[7:]}\r\nAuthorization: Bearer {self._key}\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _requests(self, count: int) -> Generator[bytes, Any, None]:
        for _ in range(count):
            data = os.urandom(self._size)
            file = {"hash": hashlib.sha1(data, usedforsecurity=False).hexdigest(), "size": len(data)}
            made = yield self._post("initiateFileUpload", workToken="", **file)
            target = made["signedUploadUrl"].removeprefix(self._base)
            head = f"PUT {target} HTTP/1.1\r\nHost: {self._base[7:]}\r\nContent-Length: {len(data)}\r\n\r\n"
            yield head.encode() + data
            done = yield self._post("finalizeFileUpload", objectKey=made["objectKey"], **file)
            if not done["success"]:
                raise RuntimeError(f"not finished: {done}")

    def send_next(self) -> bool:
        assert self._steps is not None
        answer = json.loads(self._whole.partition(b"\r\n\r\n")[2] or b"null") if self._whole else None
        self._whole = b""
        try:
            self.socket.sendall(self._steps.send(answer))
        except StopIteration:
            return False
        return True

    def receive(self) -> bool:
        data = self.socket.recv(65536)
        if not data:
            raise RuntimeError("the server closed a connection")
        self._whole += data
        head, end, body = self._whole.partition(b"\r\n\r\n")
        return bool(end) and len(body) == _length_behind(head + end)


def zone_uploads(port: int, clients: int, each: int, warm: int, zone: str, key: str, size: int) -> dict[str, Any]:
    """`each` files on each of `clients` connections, three requests for each file, after `warm` that do not count."""
    connections = [_Uploader(port, zone, key, size) for _ in range(clients)]
    by_number: dict[int, _Connection] = {connection.socket.fileno(): connection for connection in connections}
    for count in (warm, each):
        for connection in connections:
            connection.begin(count)
        seconds = _drive(by_number)
    return {"seconds": seconds, "per_second": clients * each / seconds}


JOBS = {"download": download, "upload": upload, "requests": requests, "zone_uploads": zone_uploads}

if __name__ == "__main__":
    given = json.loads(sys.stdin.buffer.read())
    sys.stdout.write(json.dumps(JOBS[given.pop("job")](**given)))
