"""Problem documents (`application/problem+json`) and the error tree: no status table, no HTTP library.

error  --extra_fields-->  the fields that only this class carries, under their wire names
error  <--error_from_problem--  status and decoded body of an answer from another node
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache

from kachery_lab import errors
from kachery_lab.errors import KacheryLabError

MAX_TEXT = 4000
"""Characters of a text from another node that are kept; a hostile node must not fill our logs."""

BY_STATUS: Mapping[int, type[KacheryLabError]] = {
    400: errors.InvalidInput,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    410: errors.Gone,
    413: errors.TooLarge,
    414: errors.TooLarge,
    415: errors.UnsupportedMediaType,
    421: errors.UnknownHost,
    422: errors.ContentMismatch,
    429: errors.TooManyRequests,
    431: errors.HeadersTooLarge,
    408: errors.Unavailable,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.Unavailable,
    507: errors.StorageFull,
}
"""What a status means when the body names no code that this version knows."""


def error_classes() -> Iterator[type[KacheryLabError]]:
    """Every class of the error tree, a class before its subclasses."""
    waiting: list[type[KacheryLabError]] = [KacheryLabError]
    while waiting:
        found = waiting.pop(0)
        yield found
        waiting.extend(found.__subclasses__())


@cache
def _by_code() -> dict[str, type[KacheryLabError]]:
    # Only the classes of the tree itself: what another room derives from it has no code of its own on the wire.
    return {found.code: found for found in error_classes() if found.__module__ == errors.__name__}


_Extras = dict[str, tuple[str, tuple[type, ...], bool]]
_known_extras: dict[type[KacheryLabError], _Extras] = {}


def _extras(kind: type[KacheryLabError]) -> _Extras:
    """Wire name -> (attribute, accepted types, required) of the fields that only this class takes."""
    if kind not in _known_extras:
        hints = typing.get_type_hints(kind.__init__)
        found: _Extras = {}
        for name, parameter in inspect.signature(kind).parameters.items():
            if name not in {"message", "hint"}:
                hint = hints[name]
                accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
                wire = re.sub(r"_([a-z])", lambda letter: letter.group(1).upper(), name)
                found[wire] = (name, accepted, parameter.default is inspect.Parameter.empty)
        _known_extras[kind] = found
    return _known_extras[kind]


def extra_fields(error: KacheryLabError) -> dict[str, object]:
    """What this error carries beyond message and hint, under its wire names (`numMessages`, `size`, ...)."""
    return {wire: getattr(error, name) for wire, (name, _, _) in _extras(type(error)).items()}


def error_from_problem(status: int, body: object) -> KacheryLabError:
    """The error that the other node meant. Never raises: a body that is no problem document is judged by its status.

    Lossless for every class of the tree; a known code whose fields are missing or of a wrong type becomes the nearest
    base class that does not need them.
    """
    fields: dict[object, object] = body if isinstance(body, dict) else {}
    detail, hint, code = fields.get("detail"), fields.get("hint"), fields.get("code")
    message = detail[:MAX_TEXT] if isinstance(detail, str) else f"the other node answered {status}"
    kept_hint = hint[:MAX_TEXT] if isinstance(hint, str) else None
    named = _by_code().get(code) if isinstance(code, str) else None
    first = named or BY_STATUS.get(status) or (errors.Unavailable if status >= 500 else KacheryLabError)
    for kind in first.__mro__:
        if issubclass(kind, KacheryLabError):
            extras = _read_extras(kind, fields)
            if extras is not None:
                return kind(message, hint=kept_hint, **extras)
    return KacheryLabError(message, hint=kept_hint)


def _read_extras(kind: type[KacheryLabError], fields: Mapping[object, object]) -> dict[str, typing.Any] | None:
    """Arguments for `kind`, or None when the document lacks one that it needs."""
    given: dict[str, typing.Any] = {}
    for wire, (name, accepted, required) in _extras(kind).items():
        value = fields.get(wire)
        # bool is an int to isinstance, and no field of the tree is a bool.
        if isinstance(value, accepted) and not isinstance(value, bool) and (wire in fields or not required):
            given[name] = value
        elif required:
            return None
    return given
