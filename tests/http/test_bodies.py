from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from kachery_lab.core import strict_json
from kachery_lab.errors import InvalidInput, InvalidJson, TooLarge, Unavailable
from kachery_lab.http.bodies import JsonBudget, json_body, optional, read_json, require_fields, required


class Body:
    """A scope and a `receive` that counts what was asked of it."""

    def __init__(self, *pieces: bytes, declared: str | None = None, cut: bool = False) -> None:
        self.scope = {"type": "http", "headers": [(b"content-length", declared.encode())] if declared else []}
        self.messages = [
            {"type": "http.request", "body": piece, "more_body": cut or at < len(pieces) - 1}
            for at, piece in enumerate(pieces)
        ]
        if cut:
            self.messages.append({"type": "http.disconnect"})
        self.received = 0

    async def receive(self) -> dict[str, Any]:
        self.received += 1
        return self.messages.pop(0)


def read(body: Body, budget: JsonBudget | None = None, **options: int) -> object:
    return asyncio.run(read_json(body.scope, body.receive, budget or JsonBudget(), **options))


def test_bodies_are_read() -> None:
    assert read(Body(b'{"a": 1}')) == {"a": 1}
    assert read(Body(b'{"a"', b"", b": 1}", declared="8")) == {"a": 1}


@pytest.mark.parametrize(
    "data", [b"", b"{", b"NaN", b'{"a":1,"a":2}', b"[" * 100_000, b'"\xff"', b"[" + b"1," * 200_000]
)
def test_what_is_no_json_is_an_invalid_input(data: bytes) -> None:
    with pytest.raises(InvalidJson):
        read(Body(data))


@pytest.mark.parametrize("declared", ["101", "9" * 30])
def test_h3_a_declared_length_over_the_limit_is_refused_unread(declared: str) -> None:
    body = Body(b"1", declared=declared)
    with pytest.raises(TooLarge):
        read(body, max_bytes=100)
    assert body.received == 0
    assert read(Body(b"1".ljust(100), declared="100"), max_bytes=100) == 1


def test_h3_a_chunked_body_is_counted() -> None:
    body = Body(b"[", *[b"1" * 40] * 100, b"]")
    budget = JsonBudget()
    with pytest.raises(TooLarge):
        read(body, budget, max_bytes=100)
    assert body.received == 4
    assert budget.in_flight == 0


def test_h1_a_cut_body_is_a_disconnect() -> None:
    budget = JsonBudget()
    with pytest.raises(ClientDisconnect):
        read(Body(b'{"a": 1}', cut=True), budget)
    assert budget.in_flight == 0


def test_only_large_bodies_use_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    real: Callable[[bytes], object] = strict_json.loads

    def noting(data: bytes) -> object:
        threads.append(threading.current_thread())
        return real(data)

    monkeypatch.setattr(strict_json, "loads", noting)
    budget = JsonBudget()
    read(Body(b'"' + b"x" * 100_000 + b'"'), budget)
    assert read(Body(b'"' + b"x" * 500_000 + b'"'), budget) == "x" * 500_000
    with pytest.raises(InvalidJson):
        read(Body(b'"' + b"x" * 500_000), budget)
    assert [thread is threading.main_thread() for thread in threads] == [True, False, False]
    budget.close()


def test_the_budget_is_held_until_the_block_is_left() -> None:
    async def run() -> None:
        budget = JsonBudget()
        body = Body(b"[1, 2]")
        async with json_body(body.scope, body.receive, budget) as value:
            assert value == [1, 2]
            assert budget.in_flight == 6
        assert budget.in_flight == 0
        with pytest.raises(RuntimeError, match="handler"):
            body = Body(b"[1, 2]")
            async with json_body(body.scope, body.receive, budget):
                raise RuntimeError("handler")
        assert budget.in_flight == 0

    asyncio.run(run())


def test_who_does_not_fit_waits() -> None:
    async def run() -> None:
        budget = JsonBudget(250, largest=100)
        peak = 0
        done = 0

        async def one() -> None:
            nonlocal peak, done
            body = Body(b"[", *[b"1".rjust(10)] + [b" " * 10] * 8, b"]")
            async with json_body(body.scope, body.receive, budget) as value:
                assert value == [1]
                peak = max(peak, budget.in_flight)
                await asyncio.sleep(0.005)
                done += 1

        await asyncio.gather(*[one() for _ in range(30)])
        assert done == 30
        assert 92 < peak <= 250
        assert budget.in_flight == 0

    asyncio.run(run())


def test_half_read_bodies_never_wait_for_each_other_forever() -> None:
    """The oldest may always finish; with plain counting the same two bodies stop each other (control)."""

    async def two(budget: JsonBudget) -> None:
        turn = asyncio.Barrier(2)

        async def one() -> None:
            with budget.share() as share:
                await budget.grow(share, 50)
                await turn.wait()
                await budget.grow(share, 50)

        await asyncio.gather(one(), one())

    asyncio.run(two(JsonBudget(200, largest=100, patience=5)))

    class Plain(JsonBudget):
        def _fits(self, share: Any, size: int) -> bool:
            return self._used + size <= 100

    with pytest.raises(Unavailable):
        asyncio.run(two(Plain(200, largest=100, patience=0.1)))


def test_waiting_ends_with_a_503_and_gives_everything_back() -> None:
    async def run() -> None:
        budget = JsonBudget(10, largest=10, patience=0.05)
        first, second = Body(b'"12345678"'), Body(b'"12345678"')
        async with json_body(first.scope, first.receive, budget):
            with pytest.raises(Unavailable):
                await read_json(second.scope, second.receive, budget)
            assert budget.in_flight == 10
        third = Body(b'"12345678"')
        assert await read_json(third.scope, third.receive, budget) == "12345678"
        assert budget.in_flight == 0

    asyncio.run(run())


def test_the_largest_body_must_fit_the_budget() -> None:
    with pytest.raises(ValueError, match="largest"):
        JsonBudget(10, largest=11)


SPEC = {
    "name": required(str),
    "count": optional(int),
    "wait": optional(float),
    "flag": optional(bool),
    "labels": optional(list),
    "query": optional(dict, nullable=True),
    "value": optional(object),
}


@pytest.mark.parametrize(
    "value",
    [
        {"name": "a"},
        {"name": "", "count": 0, "wait": 1, "flag": False, "labels": [], "query": None, "value": 0},
        {"name": "a", "wait": 0.5, "query": {}, "value": {"deep": None}},
        {"name": "a", "value": False},
    ],
)
def test_right_fields_pass(value: dict[str, object]) -> None:
    assert require_fields(value, SPEC) == value


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ([], "object"),
        (None, "object"),
        ("name", "object"),
        ({}, "'name'"),
        ({"name": "a", "nam": 1}, "'nam'"),
        ({"name": None}, "'name'"),
        ({"name": 1}, "'name'"),
        ({"name": "a", "count": 1.0}, "'count'"),
        ({"name": "a", "count": True}, "'count'"),
        ({"name": "a", "count": None}, "'count'"),
        ({"name": "a", "wait": "1"}, "'wait'"),
        ({"name": "a", "wait": False}, "'wait'"),
        ({"name": "a", "flag": 1}, "'flag'"),
        ({"name": "a", "labels": {}}, "'labels'"),
        ({"name": "a", "query": []}, "'query'"),
        ({"name": "a", "value": None}, "'value'"),
    ],
)
def test_wrong_fields_are_refused_by_name(value: object, named: str) -> None:
    with pytest.raises(InvalidInput, match=named):
        require_fields(value, SPEC)


def test_h10_an_unknown_name_is_shown_escaped_and_cut() -> None:
    with pytest.raises(InvalidInput) as caught:
        require_fields({"a\r\n\x1b\u202e" + "x" * 1000: 1}, SPEC)
    assert caught.value.message.isprintable()
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 150
