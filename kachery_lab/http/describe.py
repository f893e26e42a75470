"""How a route is described for `/openapi.json`: hand-written beside its handler, with an example that works.

Schemas are plain JSON Schema; each leaf carries its own example, and those of bodies are put together from them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.http.bodies import Field

Schema = dict[str, Any]
Handler = Callable[[Request], Awaitable[Response]]

BYTES: Schema = {"type": "string", "format": "binary", "examples": ["abc"]}
"""A body of any bytes."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path. `answers`: status -> schema of the body, None for no body. `who`: the scopes of which the
    caller needs one, empty for an open route, `("node",)` for requests that nodes sign; what else it needs is said in
    `summary`. `refusals`: statuses beyond those that follow from credentials, parameters and body."""

    method: str
    path: str
    handler: Handler
    summary: str
    who: tuple[str, ...]
    answers: Mapping[int, Schema | None]
    body: Schema | None = None
    parameters: Mapping[str, Schema] = field(default_factory=dict)
    query: Mapping[str, Schema] = field(default_factory=dict)
    refusals: tuple[int, ...] = ()


def text(example: str, **more: Any) -> Schema:
    """A string."""
    return {"type": "string", "examples": [example], **more}


def whole(example: int, minimum: int = 0, maximum: int = 2**53) -> Schema:
    """A whole number."""
    return {"type": "integer", "minimum": minimum, "maximum": maximum, "examples": [example]}


def flag(example: bool) -> Schema:
    """True or false."""
    return {"type": "boolean", "examples": [example]}


def choice(*values: str) -> Schema:
    """One of these texts; the first is the example."""
    return {"type": "string", "enum": list(values), "examples": [values[0]]}


def array(items: Schema, **more: Any) -> Schema:
    """A list; its example has one item."""
    return {"type": "array", "items": items, **more}


def nullable(schema: Schema) -> Schema:
    """The same, or null."""
    more = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, **more, "type": [schema["type"], "null"]}


def record(**properties: Schema) -> Schema:
    """An object with exactly these fields."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties,
    }


def body_of(fields: Mapping[str, Field], **properties: Schema) -> Schema:
    """The object that `require_fields(..., fields)` accepts: which may be absent or null is read from there."""
    assert set(fields) == set(properties), set(fields) ^ set(properties)
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name for name, one in fields.items() if one.required],
        "properties": {
            name: nullable(properties[name]) if one.nullable else properties[name] for name, one in fields.items()
        },
    }


def example(schema: Schema) -> Any:
    """The example of a schema."""
    if "examples" in schema:
        return schema["examples"][0]
    if "items" in schema:
        return [example(schema["items"])]
    return {name: example(one) for name, one in schema.get("properties", {}).items()}
