"""JSON request bodies: bounded each, bounded together, decoded strictly, checked field by field."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from kachery_lab.core import strict_json
from kachery_lab.errors import InvalidInput, TooLarge, Unavailable

LARGE = 256 * 1024
"""From this size on a body is decoded in a thread; below, the hop costs more than the work."""


class _Share:
    """The bytes that one body holds of the budget."""

    def __init__(self) -> None:
        self.size = 0


class JsonBudget:
    """Bytes of JSON in flight, over all requests: never more than `total`. Who does not fit waits `patience` seconds.

    Bytes are counted when they arrive, not when they are declared, so a slow sender holds only what it sent. The oldest
    body may always grow to `largest`: two half-read bodies can never wait for each other forever.
    """

    def __init__(self, total: int = 256_000_000, *, largest: int = 100_000_000, patience: float = 30.0) -> None:
        if not 0 < largest <= total:
            raise ValueError("largest must be at most total")
        self.total = total
        self.largest = largest
        self.patience = patience
        self._used = 0
        self._shares: dict[_Share, None] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def in_flight(self) -> int:
        """Bytes held now."""
        return self._used

    def close(self) -> None:
        """Ends the decoding thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    @contextmanager
    def share(self) -> Iterator[_Share]:
        """A place in the queue; what it holds is given back at the end, whatever happens."""
        mine = _Share()
        self._shares[mine] = None
        try:
            yield mine
        finally:
            del self._shares[mine]
            self._used -= mine.size
            for waiting in self._waiting:
                if not waiting.done():
                    waiting.set_result(None)

    async def grow(self, share: _Share, size: int) -> None:
        """Adds `size` bytes to `share`, when they fit. Raises Unavailable after `patience` seconds."""
        if not self._fits(share, size):
            try:
                async with asyncio.timeout(self.patience):
                    while not self._fits(share, size):
                        await self._change()
            except TimeoutError:
                raise Unavailable("Too much JSON is being worked on; try again.", retry_after=5) from None
        share.size += size
        self._used += size

    def _fits(self, share: _Share, size: int) -> bool:
        # What the others hold never exceeds total - largest, so the oldest always finds `largest` bytes.
        room = self.total if next(iter(self._shares)) is share else self.total - self.largest
        return self._used + size <= room

    async def _change(self) -> None:
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)

    async def decode(self, data: bytes) -> object:
        """Decodes strictly; a large body in a thread of its own: neither the loop nor disk work waits for it."""
        if len(data) <= LARGE:
            return strict_json.loads(data)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "json")
        return await asyncio.get_running_loop().run_in_executor(self._pool, strict_json.loads, data)


@asynccontextmanager
async def json_body(
    scope: Scope, receive: Receive, budget: JsonBudget, *, max_bytes: int = 100_000_000
) -> AsyncIterator[object]:
    """The decoded body; its bytes stay counted until the block is left.

    A declared length over the limit is TooLarge before anything is read (and before `100 Continue`); a chunked body is
    counted while it comes. Raises InvalidJson, TooLarge, Unavailable, or ClientDisconnect for a body that was cut off.
    """
    with budget.share() as share:
        yield await _decoded(scope, receive, budget, share, max_bytes)


async def read_json(scope: Scope, receive: Receive, budget: JsonBudget, *, max_bytes: int = 100_000_000) -> object:
    """Like `json_body`, for handlers whose work with the value is short: the budget is given back on return."""
    with budget.share() as share:
        return await _decoded(scope, receive, budget, share, max_bytes)


async def _decoded(scope: Scope, receive: Receive, budget: JsonBudget, share: _Share, max_bytes: int) -> object:
    limit = min(max_bytes, budget.largest)
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    if declared.isdigit() and (len(declared) > 20 or int(declared) > limit):
        raise _too_large(limit, budget)
    pieces: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnect()
        piece: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        if share.size + len(piece) > limit:
            raise _too_large(limit, budget)
        if piece:
            await budget.grow(share, len(piece))
            pieces.append(piece)
    data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    pieces.clear()
    return await budget.decode(data)


def _too_large(limit: int, budget: JsonBudget) -> TooLarge:
    hint = "The limit is KACHERY_LAB_MAX_JSON." if limit == budget.largest else None
    return TooLarge(f"The JSON body is over the limit of {limit} bytes.", hint=hint)


@dataclass(frozen=True, slots=True)
class Field:
    """What a field of a JSON object may be. `kind` float takes whole numbers too; `object` takes any value but null."""

    kind: type
    required: bool = True
    nullable: bool = False


def required(kind: type, *, nullable: bool = False) -> Field:
    """A field that must be there."""
    return Field(kind, True, nullable)


def optional(kind: type, *, nullable: bool = False) -> Field:
    """A field that may be absent. Null is not absent."""
    return Field(kind, False, nullable)


_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


def require_fields(value: object, spec: Mapping[str, Field]) -> dict[str, Any]:
    """`value` as an object with exactly the fields of `spec`.

    Raises InvalidInput that names the field: unknown, missing, of a wrong type, or null where null is not listed.
    """
    if not isinstance(value, dict):
        raise InvalidInput("The body must be a JSON object.")
    for name in value:
        if name not in spec:
            raise InvalidInput(f"Unknown field {name[:80]!a}.")
    for name, field in spec.items():
        if name not in value:
            if field.required:
                raise InvalidInput(f"Missing field '{name}'.")
            continue
        found = value[name]
        if found is None:
            if not field.nullable:
                raise InvalidInput(f"Field '{name}' must not be null.")
        elif not _is(found, field.kind):
            raise InvalidInput(f"Field '{name}' must be {_NAMES.get(field.kind, field.kind.__name__)}.")
    return value


def _is(found: object, kind: type) -> bool:
    if isinstance(found, bool):
        # bool is an int to isinstance; `true` is no number in JSON.
        return kind in {bool, object}
    if kind is float:
        return isinstance(found, int | float)
    return isinstance(found, kind)
