"""Admin endpoints, for tokens with scope `admin` and for the admin socket.

| route | answer |
|---|---|
| `GET /api/admin/v1/tokens` | all tokens, without secrets |
| `POST /api/admin/v1/tokens` | a new token; its secret is shown this once |
| `DELETE /api/admin/v1/tokens/{id}` | the token ends now |
| `POST /api/admin/v1/reindex` | the report of a reindex that ran to its end |
"""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from kachery_lab.http.admin import reindex, tokens


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    return [
        Route("/api/admin/v1/tokens", tokens.list_tokens, methods=["GET"]),
        Route("/api/admin/v1/tokens", tokens.create, methods=["POST"]),
        Route("/api/admin/v1/tokens/{id}", tokens.revoke, methods=["DELETE"]),
        Route("/api/admin/v1/reindex", reindex.run, methods=["POST"]),
    ]
