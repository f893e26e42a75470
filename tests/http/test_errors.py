from __future__ import annotations

import json

import pytest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from kachery_lab import errors
from kachery_lab.client import problems
from kachery_lab.client.problems import error_classes, error_from_problem
from kachery_lab.errors import KacheryLabError
from kachery_lab.http import errors as http_errors
from kachery_lab.http.errors import STATUS, problem, status_of, unexpected
from kachery_lab.http.middleware import Errors

TREE = [kind for kind in error_classes() if kind.__module__ == errors.__name__]
EXTRAS: dict[type[KacheryLabError], list[dict[str, object]]] = {
    errors.FeedPosition: [{"num_messages": 0, "head_signature": None}, {"num_messages": 2**60, "head_signature": "ab"}],
    errors.RangeNotSatisfiable: [{"size": 0}, {"size": 2**50}],
    errors.TooManyRequests: [{}, {"retry_after": 7}],
    errors.Unavailable: [{}, {"retry_after": 7}],
}
NASTY = "a\r\nSet-Cookie: x\0\x1b[31m\u202e\udc80\ud800 \u2028 é"


def test_the_table_names_every_class_of_the_tree_and_no_other() -> None:
    assert set(STATUS) == set(TREE)
    assert len(TREE) > 20
    assert all(400 <= status <= 599 for status in STATUS.values())


def test_codes_are_unique() -> None:
    assert len({kind.code for kind in TREE}) == len(TREE)


def test_statuses_and_their_inverse_agree() -> None:
    for status, kind in problems.BY_STATUS.items():
        if status in STATUS.values():
            assert STATUS[kind] == status


def sample(kind: type[KacheryLabError], hint: str | None, extra: dict[str, object]) -> KacheryLabError:
    return kind(NASTY, hint=hint, **extra)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.code)
@pytest.mark.parametrize("hint", [None, "do this: " + NASTY])
def test_an_error_survives_the_wire_whole(kind: type[KacheryLabError], hint: str | None) -> None:
    for extra in EXTRAS.get(kind, [{}]):
        sent = sample(kind, hint, extra)
        answer = problem(sent)
        assert answer.status_code == STATUS[kind]
        assert answer.headers["content-type"] == "application/problem+json"
        assert bytes(answer.body).isascii()
        body = json.loads(bytes(answer.body))
        assert {"type", "title", "status", "code", "detail"} <= set(body)
        assert ("hint" in body) == (hint is not None)
        got = error_from_problem(answer.status_code, body)
        assert type(got) is kind
        assert vars(got) == vars(sent)
        for value in answer.headers.values():
            assert value.isascii()
            assert value.isprintable()


def test_every_class_with_fields_of_its_own_is_covered() -> None:
    assert {kind for kind in TREE if problems._extras(kind)} == set(EXTRAS)


def test_headers_of_an_error() -> None:
    assert problem(errors.Unavailable("x", retry_after=9)).headers["retry-after"] == "9"
    assert problem(errors.TooManyRequests("x")).headers["retry-after"] == "60"
    assert problem(errors.RangeNotSatisfiable("x", size=5)).headers["content-range"] == "bytes */5"
    assert problem(errors.Unauthenticated("x")).headers["www-authenticate"] == "Bearer"
    assert "retry-after" not in problem(errors.NotFound("x")).headers
    body = json.loads(bytes(problem(errors.FeedPosition("x", num_messages=3, head_signature=None)).body))
    assert (body["numMessages"], body["headSignature"]) == (3, None)


def test_a_subclass_of_another_room_has_the_status_of_its_base() -> None:
    class Busy(errors.Unavailable):
        pass

    assert status_of(Busy("x")) == 503
    assert (
        type(error_from_problem(503, json.loads(bytes(problem(Busy("x", retry_after=3)).body)))) is errors.Unavailable
    )


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (404, None, errors.NotFound),
        (404, "text", errors.NotFound),
        (404, ["code"], errors.NotFound),
        (404, {"code": ["not_found"], "detail": 3}, errors.NotFound),
        (409, {"code": "of a newer server"}, errors.Conflict),
        (409, {"code": "feed_position", "numMessages": True, "headSignature": None}, errors.Conflict),
        (409, {"code": "feed_position", "numMessages": "3", "headSignature": None}, errors.Conflict),
        (409, {"code": "feed_position", "numMessages": 3}, errors.Conflict),
        (409, {"code": "feed_position", "numMessages": 3, "headSignature": None}, errors.FeedPosition),
        (503, {"code": "unavailable", "retryAfter": "soon"}, errors.Unavailable),
        (416, {}, KacheryLabError),
        (502, {}, errors.Unavailable),
        (599, {}, errors.Unavailable),
        (418, {}, KacheryLabError),
    ],
)
def test_a_hostile_body_becomes_the_nearest_error(status: int, body: object, kind: type[KacheryLabError]) -> None:
    assert type(error_from_problem(status, body)) is kind


def test_texts_of_another_node_are_cut() -> None:
    got = error_from_problem(404, {"code": "not_found", "detail": "x" * 10**6, "hint": "y" * 10**6})
    assert len(got.message) == problems.MAX_TEXT
    assert got.hint is not None
    assert len(got.hint) == problems.MAX_TEXT


def test_an_unexpected_failure_says_nothing_about_itself() -> None:
    answer = unexpected()
    assert answer.status_code == 500
    assert json.loads(bytes(answer.body))["code"] == "internal_error"


def call(app: ASGIApp, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
    import asyncio

    got: list[dict[str, object]] = []

    async def run() -> None:
        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, object]) -> None:
            got.append(message)

        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"host", b"localhost")], "scheme": "http", "root_path": "", "http_version": "1.1",
            "server": ("localhost", 80), "client": ("127.0.0.1", 1), "app": app,
        }  # fmt: skip
        await app(scope, receive, send)  # type: ignore[arg-type]

    asyncio.run(run())
    headers = {name.decode(): value.decode() for name, value in got[0]["headers"]}  # type: ignore[attr-defined]
    return got[0]["status"], headers, got[1]["body"]  # type: ignore[return-value]


def test_starlette_answers_in_the_same_shape() -> None:
    async def raises(_request: Request) -> None:
        raise errors.Forbidden("not you", hint="ask")

    async def teapot(_request: Request) -> None:
        raise HTTPException(418, "short and stout", {"X-Pot": "1"})

    app = Errors(Router([Route("/raises", raises), Route("/teapot", teapot)]))
    status, headers, body = call(app, "GET", "/raises")
    assert (status, headers["content-type"]) == (403, "application/problem+json")
    assert json.loads(body)["hint"] == "ask"
    status, headers, body = call(app, "GET", "/nowhere")
    assert (status, json.loads(body)["code"]) == (404, "not_found")
    status, headers, body = call(app, "POST", "/raises")
    assert (status, json.loads(body)["status"]) == (405, 405)
    assert "GET" in headers["allow"]
    status, headers, body = call(app, "GET", "/teapot")
    assert (status, headers["x-pot"]) == (418, "1")


def test_errors_module_imports_nothing_of_http() -> None:
    assert "starlette" not in vars(problems)
    assert http_errors.PROBLEM_TYPE == "application/problem+json"
