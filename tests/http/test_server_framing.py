from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from kachery_lab.http.server import EdgeLimits
from tests.http.edge import (
    GOOD,
    Running,
    drain,
    guarded_server,
    head,
    plain_server,
    read_answer,
    running,
    status,
)


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with running(guarded_server(EdgeLimits(linger=0.5))) as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    with running(plain_server) as server:
        yield server


# H2: framing. (name, bytes, status); the control says what plain uvicorn answers to the same bytes.
FRAMING = [
    ("negative length", head("POST /echo HTTP/1.1", "Content-Length: -1"), 400),
    ("plus sign", head("POST /echo HTTP/1.1", "Content-Length: +5") + b"hello", 400),
    ("hexadecimal", head("POST /echo HTTP/1.1", "Content-Length: 0x5") + b"hello", 400),
    ("comma list", head("POST /echo HTTP/1.1", "Content-Length: 5, 5") + b"hello", 400),
    ("underscore", head("POST /echo HTTP/1.1", "Content-Length: 1_0") + b"hellohello", 400),
    ("superscript digit", head("POST /echo HTTP/1.1", "Content-Length: \xb2") + b"he", 400),
    ("empty length", head("POST /echo HTTP/1.1", "Content-Length:") + b"hello", 400),
    ("1e20", head("POST /echo HTTP/1.1", "Content-Length: 1e20"), 400),
    ("21 digits", head("POST /echo HTTP/1.1", "Content-Length: 100000000000000000000"), 413),
    ("over 16 TiB", head("POST /echo HTTP/1.1", f"Content-Length: {16 * 1024**4 + 1}"), 413),
    ("two lengths", head("POST /echo HTTP/1.1", "Content-Length: 5", "Content-Length: 5") + b"hello", 400),
    ("different lengths", head("POST /echo HTTP/1.1", "Content-Length: 5", "Content-Length: 6") + b"hello", 400),
    ("CL+TE", head("POST /echo HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    ("TE+CL", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 5") + b"0\r\n\r\n", 400),
    ("CL 0+TE elsewhere", head("POST /echo HTTP/1.1", "Content-Length: 0", "Transfer-Encoding: chunked"), 400),
    ("CL 0+TE by PUT", head("PUT /store HTTP/1.1", "Content-Length: 0", "Transfer-Encoding: chunked"), 400),
    (
        "CL 0+TE with a chunk",
        head("POST /store HTTP/1.1", "Content-Length: 0", "Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
        400,
    ),
    ("CL 5+TE to /store", head("POST /store HTTP/1.1", "Content-Length: 5", "Transfer-Encoding: chunked"), 400),
    ("TE gzip", head("POST /echo HTTP/1.1", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", 400),
    ("TE identity", head("POST /echo HTTP/1.1", "Transfer-Encoding: identity"), 400),
    ("TE xchunked", head("POST /echo HTTP/1.1", "Transfer-Encoding: xchunked"), 400),
    ("two TE", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400),
    ("TE in HTTP/1.0", head("POST /echo HTTP/1.0", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    ("LF only", b"GET /echo HTTP/1.1\nHost: localhost\n\n", 400),
    ("LF in one line", b"GET /echo HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n", 400),
    ("bare CR", b"GET /echo HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n", 400),
    ("no Host", head(host=None), 400),
    ("empty Host", head(host=""), 400),
    ("two Hosts", head("GET /echo HTTP/1.1", "Host: evil"), 400),
    ("Host with a path", head(host="localhost/evil"), 400),
    ("obs-fold", head("GET /echo HTTP/1.1", "X: a", " b"), 400),
    ("fold of the first line", b"GET /echo HTTP/1.1\r\n Host: localhost\r\nHost: localhost\r\n\r\n", 400),
    ("blank before colon", head("GET /echo HTTP/1.1", "X : a"), 400),
    ("NUL in value", head("GET /echo HTTP/1.1", "X: a\0b"), 400),
    ("ESC in value", head("GET /echo HTTP/1.1", "X: a\x1bb"), 400),
    ("DEL in value", head("GET /echo HTTP/1.1", "X: a\x7fb"), 400),
    ("no colon", head("GET /echo HTTP/1.1", "X"), 400),
    ("empty name", head("GET /echo HTTP/1.1", ": a"), 400),
    ("HTTP/2.0", head("GET /echo HTTP/2.0"), 400),
    ("HTTP/0.9", b"GET /echo\r\n\r\n", 400),
    ("two blanks", head("GET  /echo HTTP/1.1"), 400),
    ("raw UTF-8 target", head("GET /\xc3\xa9 HTTP/1.1"), 400),
    ("other authority in target", head("GET http://evil/echo HTTP/1.1"), 400),
    ("asterisk target", head("OPTIONS * HTTP/1.1"), 400),
    ("CONNECT", head("CONNECT localhost:22 HTTP/1.1"), 400),
    ("unknown method", head("FROBNICATE /echo HTTP/1.1"), 400),
    ("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ("gzip body", head("POST /echo HTTP/1.1", "Content-Encoding: gzip", "Content-Length: 5") + b"hello", 415),
    ("zstd body", head("POST /echo HTTP/1.1", "Content-Encoding: zstd", "Content-Length: 5") + b"hello", 415),
    ("bad chunk size", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked") + b"xyz\r\n", 400),
    ("negative chunk size", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked") + b"-5\r\nhello\r\n", 400),
    ("LF chunk", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked") + b"5\nhello\n0\n\n", 400),
    ("long chunk", head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked") + b"2\r\nhello\r\n0\r\n\r\n", 400),
    ("WebSocket with a body", head(
        "GET /ws HTTP/1.1", "Connection: Upgrade", "Upgrade: websocket", "Content-Length: 5") + b"hello", 400),
]  # fmt: skip


@pytest.mark.parametrize(("data", "wanted"), [row[1:] for row in FRAMING], ids=[row[0] for row in FRAMING])
def test_h2_refuses_and_closes(guarded: Running, data: bytes, wanted: int) -> None:
    assert status(guarded.talk(GOOD)) == 200
    answer = guarded.talk(data)
    header, _, body = answer.partition(b"\r\n\r\n")
    assert status(answer) == wanted, answer
    assert b"HTTP/1.1 2" not in answer
    assert b"content-type: application/problem+json" in header
    assert b"connection: close" in header
    assert b"access-control-allow-origin: http://localhost:3000" in header
    problem = json.loads(body)
    assert problem["status"] == wanted
    assert set(problem) >= {"type", "title", "code", "detail"}


def test_h2_nothing_refused_reached_the_application(guarded: Running) -> None:
    before = len(guarded.seen.requests)
    for _, data, _ in FRAMING:
        if b"chunked\r\n\r\n" not in data:
            guarded.talk(data)
    assert len(guarded.seen.requests) == before


@pytest.mark.parametrize("name", ["no Host", "two Hosts", "over 16 TiB", "gzip body", "other authority in target"])
def test_h2_control_plain_uvicorn_accepts(plain: Running, name: str) -> None:
    data = next(row[1] for row in FRAMING if row[0] == name)
    with plain.connect() as connection:
        connection.sendall(data)
        if "Content-Length" in data.decode("latin-1") and not data.endswith(b"hello"):
            # It waits for a body that no disk can hold.
            connection.settimeout(0.3)
            with pytest.raises(TimeoutError):
                connection.recv(100)
        else:
            assert read_answer(connection)[0] == 200


def test_h2_a_wrong_length_is_not_a_whole_body(guarded: Running) -> None:
    with guarded.connect() as connection:
        connection.sendall(head("POST /echo HTTP/1.1", "Content-Length: 3") + b"hello\r\n\r\n")
        answer = drain(connection)
    assert answer.partition(b"\r\n\r\n")[2].startswith(b"3HTTP/1.1 400 ")
    assert guarded.seen.requests[-1] == ("POST", "/echo", 3)


def test_h2_good_requests_pass(guarded: Running) -> None:
    close = "Connection: close"
    good = [
        head("GET /echo HTTP/1.1", close, "X-Text: caf\xe9 \t tab", "X-Empty:", "X-Tight:a"),
        head("POST /echo HTTP/1.1", close, "content-length:   0005  ") + b"hello",
        head("POST /echo HTTP/1.1", close, "TRANSFER-ENCODING: Chunked")
        + b"5;ext=1\r\nhello\r\n0\r\nTrailer: 1\r\n\r\n",
        head("POST /echo HTTP/1.1", close, "Content-Encoding: identity", "Content-Length: 5") + b"hello",
        head("GET http://localhost/echo HTTP/1.1", close),
        head("GET /echo?a=%00&b=%zz HTTP/1.1", close),
        head("GET /echo HTTP/1.1", close, host="[::1]:20431"),
        head("GET /echo HTTP/1.0", host=None),
        b"\r\n" + head("GET /echo HTTP/1.1", close),
        head("GET /echo HTTP/1.1", "Connection: close, Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA"),
        head("POST /echo HTTP/1.1", "Connection: close, Upgrade", "Upgrade: h2c", "Content-Length: 5") + b"hello",
    ]
    for data in good:
        answer = guarded.talk(data)
        assert status(answer) == 200, (data, answer)
        assert answer.endswith(b"5" if b"hello" in data else b"0"), (data, answer)
    assert "trailer" not in guarded.seen.headers


def test_the_odd_pair_of_kachery_client_is_an_empty_body(guarded: Running, plain: Running) -> None:
    odd = head("POST /store HTTP/1.1", "Content-Length: 0", "Transfer-Encoding: chunked")
    answer = guarded.talk(odd)
    assert status(answer) == 200
    assert answer.endswith(b"0")
    assert guarded.seen.requests[-1] == ("POST", "/store", 0)
    assert "transfer-encoding" not in guarded.seen.headers
    assert status(plain.talk(odd)) == 400


def test_h2_each_byte_alone_gives_the_same(guarded: Running) -> None:
    data = head("POST /echo HTTP/1.1", "Content-Length: 5") + b"hello" + GOOD
    with guarded.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(data)):
            connection.sendall(data[at : at + 1])
        answer = drain(connection)
    assert answer.count(b"HTTP/1.1 200") == 2
