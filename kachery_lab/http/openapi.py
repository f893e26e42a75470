"""`/openapi.json`: what `/api/admin/v1` and `/api/v1` take and answer; `/docs`: a page that leads there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from kachery_lab import __version__
from kachery_lab.http import admin, v1
from kachery_lab.http.describe import BYTES, Operation, Schema, example, record, text, whole
from kachery_lab.http.errors import PROBLEM_TYPE

_REFUSALS = {
    400: "Malformed request, field or identifier",
    401: "No credential, or one that nobody has",
    403: "A known caller that may not do this",
    404: "No such thing for this caller",
    409: "Contradicts what is stored",
    410: "The stored bytes are damaged, or a linked file changed",
    413: "Over a stated limit",
    416: "The range begins behind the end",
    422: "The bytes do not match the claim",
    429: "Too many wrong credentials from this address",
    431: "More header bytes than a request may have",
    503: "Disk, database or a deadline; try again after `Retry-After` seconds",
    507: "No room on the storage",
}
_PROBLEM = record(
    type=text("urn:kachery-lab:error:not_found"),
    title=text("Not found"),
    status=whole(404, 400, 599),
    code=text("not_found"),
    detail=text("there is no channel 'recordings'"),
)
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>kachery-lab API</title>
<h1>kachery-lab API</h1>
<p>The description of <code>/api/v1</code> and <code>/api/admin/v1</code> in OpenAPI 3.1 is
<a href="openapi.json">openapi.json</a>. Send a token as <code>Authorization: Bearer klk_...</code>.</p>
<table>%s</table></html>
"""


def operations() -> Sequence[Operation]:
    """Everything that the document describes."""
    return (*v1.OPERATIONS, *admin.OPERATIONS)


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations():
        # A converter is Starlette's own; in the document a parameter is a name.
        path = re.sub(r":\w+}", "}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _describe(operation)
    return {
        "openapi": "3.1.0",
        "info": {"title": "kachery-lab", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A token, `klk_...`"},
                "code": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "KACHERY-CLIENT-AUTH-CODE",
                    "description": "The text of `<storage>/client-auth`, or a token with scope `client`",
                },
                "node": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Kachery-Node",
                    "description": "A node's signature of this one request",
                },
            },
            "schemas": {"Problem": {**_PROBLEM, "additionalProperties": True}},
            "responses": {
                f"Refusal{status}": {
                    "description": meaning,
                    "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
                }
                for status, meaning in _REFUSALS.items()
            },
        },
    }


def _describe(operation: Operation) -> dict[str, Any]:
    named = re.findall(r"{(\w+)(?::\w+)?}", operation.path)
    assert set(named) == set(operation.parameters), operation.path
    parameters = [_parameter(name, "path", operation.parameters[name]) for name in named]
    parameters += [_parameter(name, "query", schema) for name, schema in operation.query.items()]
    refusals = {*operation.refusals, 431, 503}
    if operation.who:
        refusals |= {401, 403, 429}
    if parameters or operation.body:
        refusals.add(400)
    if operation.body:
        refusals |= {413, 507}
    found: dict[str, Any] = {
        "operationId": f"{operation.method.lower()} {operation.path}",
        "summary": operation.summary,
        "tags": ["admin" if "/admin/" in operation.path else "v1"],
        "responses": {
            **{str(status): _answer(status, schema) for status, schema in operation.answers.items()},
            **{str(status): {"$ref": f"#/components/responses/Refusal{status}"} for status in sorted(refusals)},
        },
        "security": _security(operation.who),
    }
    if operation.who:
        found["description"] = f"Needs {' or '.join(f'`{scope}`' for scope in operation.who)}."
    if parameters:
        found["parameters"] = parameters
    if operation.body:
        found["requestBody"] = {"required": True, "content": _content(operation.body)}
    return found


def _security(who: tuple[str, ...]) -> list[dict[str, list[str]]]:
    if not who:
        return [{}, {"token": []}]
    if who == ("node",):
        return [{"node": []}]
    return [{"token": []}, {"code": []}] if "client" in who else [{"token": []}]


def _parameter(name: str, place: str, schema: Schema) -> dict[str, Any]:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "example": example(schema)}


def _content(schema: Schema) -> dict[str, Any]:
    kind = "application/octet-stream" if schema is BYTES else "application/json"
    return {kind: {"schema": schema, "example": example(schema)}}


def _answer(status: int, schema: Schema | None) -> dict[str, Any]:
    described = {"description": {200: "Done", 201: "Made", 204: "Done", 206: "A part", 304: "Not modified"}[status]}
    return described if schema is None else {**described, "content": _content(schema)}


async def show(_request: Request) -> Response:
    """The document."""
    return JSONResponse(document())


async def page(_request: Request) -> Response:
    """A page without scripts."""
    rows = "".join(
        f"<tr><td>{operation.method}<td><code>{operation.path}</code><td>{operation.summary}"
        for operation in operations()
    )
    return HTMLResponse(_PAGE % rows, headers={"content-security-policy": "default-src 'none'"})


def routes() -> list[Route]:
    """Both addresses."""
    return [Route("/openapi.json", show, methods=["GET"]), Route("/docs", page, methods=["GET"])]
