"""Admin endpoints: users, tokens, nodes, channels and what belongs to them. Each module describes its own routes.

Callers are tokens with scope `admin`, owners with scope `channel-owner` for what is theirs, and the admin socket. The
rules are the services'; nothing here decides. A refusal lands in the audit, whether it was a change or only a look.
"""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from kachery_lab.http.admin import (
    audit,
    authorizations,
    channels,
    clients,
    functions,
    memberships,
    nodes,
    objects,
    passcodes,
    quotas,
    reindex,
    settings,
    tokens,
    uploads,
    users,
)
from kachery_lab.http.admin.room import audited
from kachery_lab.http.describe import Operation

_NOUNS = (
    users,
    tokens,
    nodes,
    clients,
    channels,
    memberships,
    authorizations,
    passcodes,
    functions,
    objects,
    uploads,
    quotas,
    settings,
    audit,
    reindex,
)
OPERATIONS: tuple[Operation, ...] = tuple(operation for noun in _NOUNS for operation in noun.OPERATIONS)


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    return [
        Route(
            operation.path,
            audited(operation.handler) if operation.method == "GET" else operation.handler,
            methods=[operation.method],
        )
        for operation in OPERATIONS
    ]
