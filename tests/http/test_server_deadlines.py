from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from kachery_lab.http.server import EdgeLimits, build_server
from tests.http.edge import (
    BIG,
    GOOD,
    MIB,
    Running,
    drain,
    guarded_server,
    head,
    plain_server,
    read_answer,
    running,
    status,
    wait_for,
)

FAST = EdgeLimits(header_deadline=1.0, body_window=1.0, response_stall=1.0, linger=0.3)
FEW = EdgeLimits(max_connections=30)


@pytest.fixture(scope="module")
def fast() -> Iterator[Running]:
    with running(guarded_server(FAST)) as server:
        yield server


@pytest.fixture(scope="module")
def few() -> Iterator[Running]:
    with running(guarded_server(FEW)) as server:
        yield server


@pytest.fixture(scope="module")
def plain() -> Iterator[Running]:
    with running(plain_server) as server:
        yield server


# H4: deadlines


def drip(to: Running, first: bytes, piece: bytes, seconds: float) -> tuple[bytes, float]:
    """Sends `piece` every 50 ms; returns the answer and how long the connection lived."""
    begun = time.monotonic()
    with to.connect() as connection:
        connection.sendall(first)
        connection.settimeout(0.05)
        answer = b""
        while time.monotonic() - begun < seconds:
            try:
                connection.sendall(piece)
                got = connection.recv(65536)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not got:
                break
            answer += got
        return answer, time.monotonic() - begun


SLOW = {
    "head": (b"GET /echo HTTP/1.1\r\nHost: localhost\r\nX: ", b"x"),
    "body": (head("POST /echo HTTP/1.1", "Content-Length: 100000"), b"x"),
    "chunked": (head("POST /echo HTTP/1.1", "Transfer-Encoding: chunked"), b"1\r\nx\r\n"),
}


@pytest.mark.parametrize("what", list(SLOW))
def test_h4_slow_senders_are_cut_off(fast: Running, plain: Running, what: str) -> None:
    answer, lived = drip(fast, *SLOW[what], 40)
    assert lived < 30
    assert status(answer) == 408, answer
    answer, lived = drip(plain, *SLOW[what], 1.5)
    assert lived >= 1.5
    assert answer == b""


def test_h4_silence_is_cut_off(fast: Running, plain: Running) -> None:
    for first in (b"", b"GET"):
        begun = time.monotonic()
        with fast.connect() as connection:
            connection.sendall(first)
            drain(connection)
        assert time.monotonic() - begun < 30
        with plain.connect(1.0) as connection, pytest.raises(TimeoutError):
            connection.sendall(first)
            connection.recv(1)


def read_nothing(to: Running, seconds: float) -> bool:
    """Whether the server gave up on a client that asks for 24 MiB and does not read."""
    before = len(to.server.server_state.connections)
    with to.connect() as connection:
        connection.sendall(head("GET /big HTTP/1.1"))
        until = time.monotonic() + seconds
        time.sleep(0.2)
        while time.monotonic() < until:
            if len(to.server.server_state.connections) <= before:
                return True
            time.sleep(0.05)
    return False


def test_h4_a_client_that_does_not_read_is_cut_off(fast: Running, plain: Running) -> None:
    wait_for(lambda: len(fast.server.server_state.connections) == 0)
    assert read_nothing(fast, 30)
    wait_for(lambda: len(plain.server.server_state.connections) == 0)
    assert not read_nothing(plain, 1.5)


def test_h4_honest_clients_are_not_affected(fast: Running) -> None:
    """Slower than every deadline in total, but never without progress."""
    with fast.connect() as connection:
        connection.sendall(head("POST /echo HTTP/1.1", "Content-Length: 25000"))
        for _ in range(25):
            connection.sendall(bytes(1000))
            time.sleep(0.06)
        assert read_answer(connection) == (200, b"25000")
    with fast.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(head("GET /big HTTP/1.1", "Connection: close"))
        got = 0
        for _ in range(20):
            time.sleep(0.08)
            got += len(connection.recv(300_000))
        while piece := connection.recv(MIB):
            got += len(piece)
        assert got > BIG
    with fast.connect() as connection:
        connection.sendall(head("GET /gated HTTP/1.1", "Connection: close"))
        time.sleep(1.5)
        fast.seen.gate.set()
        assert drain(connection).endswith(b"opened")
        fast.seen.gate.clear()


def test_h4_a_slow_application_is_not_the_clients_fault(fast: Running) -> None:
    with fast.connect() as connection:
        connection.sendall(head("POST /gated HTTP/1.1", f"Content-Length: {MIB}"))
        connection.sendall(bytes(200_000))
        time.sleep(1.5)
        fast.seen.gate.set()
        assert read_answer(connection) == (200, b"opened")
        fast.seen.gate.clear()


# H5, H6


def test_h5_over_the_limit_of_connections_is_a_fast_503(few: Running) -> None:
    wait_for(lambda: len(few.server.server_state.connections) == 0)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(few.connect()) for _ in range(30)]
        wait_for(lambda: len(few.server.server_state.connections) == 30)
        begun = time.monotonic()
        answer = few.talk(GOOD)
        assert status(answer) == 503
        assert b"Retry-After: 5" in answer
        assert b"connection: close" in answer
        assert time.monotonic() - begun < 10
        held[0].sendall(GOOD)
        assert status(drain(held[0])) == 200
    wait_for(lambda: len(few.server.server_state.connections) == 0)
    assert status(few.talk(GOOD)) == 200


def test_an_idle_kept_connection_is_closed() -> None:
    limits = EdgeLimits(keep_alive=1, header_deadline=0.4)
    with running(lambda app: build_server(app, limits=limits, graceful_timeout=1)) as server, server.connect() as idle:
        idle.sendall(head())
        assert read_answer(idle)[0] == 200
        begun = time.monotonic()
        assert idle.recv(1) == b""
        assert 0.5 < time.monotonic() - begun < 30


def test_shutdown_waits_for_an_answer_under_way() -> None:
    with running(lambda app: build_server(app, graceful_timeout=5)) as server, server.connect() as connection:
        connection.sendall(head("GET /gated HTTP/1.1"))
        time.sleep(0.1)
        server.server.should_exit = True
        time.sleep(0.3)
        server.seen.gate.set()
        assert drain(connection).endswith(b"opened")
