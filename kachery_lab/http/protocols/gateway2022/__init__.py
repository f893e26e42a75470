"""The gateway as kachery-cloud 0.4 uses it, and the on-demand resources beside it.

| route | answer |
|---|---|
| `POST /api/gateway` | finding, uploading and deleting files of a zone; what is known of a client, resource or zone |
| `GET`, `POST /registerClient/{id}` | a page that asks to register the client key which signed the link |
| `GET /client/{id}` | a page that says what is known of a client key |
| `POST /r/{zone}`, `POST /p/{token}/r/{zone}` | has a file of the zone's resource directories or provider |
| WebSocket `/p/{token}` | a provider connects: a program that uploads files when they are asked for |

Errors of the gateway are text, `Error: ...`, with 400, 401, 403 and never 404: clients look for "not 200" only, and
show the text. Those of a resource are JSON, `{"message": ...}`.
"""

from kachery_lab.http.protocols.gateway2022.routes import routes

__all__ = ["routes"]
