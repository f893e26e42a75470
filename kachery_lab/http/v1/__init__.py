"""Our own API.

| route | who | answer |
|---|---|---|
| `GET /api/v1/info` | anyone; more with a credential | what this server is |
| `GET /api/v1/blobs?after=&limit=` | auth code, or token with scope `client` or `admin` | index rows in order |
| `PUT /api/v1/blobs/{sha1}` | the same | 201 new, 200 known, 422 other bytes |
| `GET`, `HEAD /api/v1/blobs/{sha1}` | the same | ranges, ETag, 304 |
| `DELETE /api/v1/blobs/{sha1}` | token with scope `admin` | 204; the file goes to the trash |
| `POST /api/v1/nodes/report` | any node, signed | whether it is approved; an unknown one is noted |
| `GET /api/v1/nodes/memberships` | an approved node, signed | its channels here, roles and bucket addresses |
| WebSocket `/api/v1/bands` | an approved node, signed | the bands of its channels here |
| `POST /api/v1/channels/{channel}/uploads` | a member with provideFiles, signed | an upload URL |
| `POST /api/v1/channels/{channel}/feeds` | a member with provideFeeds, signed | an upload URL for messages |
| `POST /api/v1/channels/{channel}/tasks[/states]` | a member with requestTasks, signed | a task asked for; tasks |
| `POST /api/v1/channels/{channel}/tasks/claim`, `finish`, `uploads` | a member with provideTasks, signed | leases |
| `POST /api/v1/nodes/leases` | an approved node, signed | its leases renewed and ended |
"""

from __future__ import annotations

from starlette.routing import BaseRoute, Route, WebSocketRoute

from kachery_lab.http.describe import Operation
from kachery_lab.http.v1 import bands, blobs, feeds, info, nodes, tasks

OPERATIONS: tuple[Operation, ...] = (
    *info.OPERATIONS,
    *blobs.OPERATIONS,
    *nodes.OPERATIONS,
    *feeds.OPERATIONS,
    *tasks.OPERATIONS,
)
"""What `/openapi.json` says of these routes; a test compares both."""


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    return [
        Route("/api/v1/info", info.show, methods=["GET"]),
        Route("/api/v1/blobs", blobs.list_blobs, methods=["GET"]),
        Route("/api/v1/blobs/{sha1}", blobs.read, methods=["GET"]),
        Route("/api/v1/blobs/{sha1}", blobs.put, methods=["PUT"]),
        Route("/api/v1/blobs/{sha1}", blobs.remove, methods=["DELETE"]),
        Route("/api/v1/nodes/report", nodes.report, methods=["POST"]),
        Route("/api/v1/nodes/memberships", nodes.memberships, methods=["GET"]),
        WebSocketRoute(bands.PATH, bands.serve),
        Route("/api/v1/channels/{channel}/uploads", nodes.upload, methods=["POST"]),
        Route("/api/v1/channels/{channel}/feeds", feeds.upload, methods=["POST"]),
        Route("/api/v1/channels/{channel}/tasks", tasks.ask, methods=["POST"]),
        Route("/api/v1/channels/{channel}/tasks/states", tasks.states, methods=["POST"]),
        Route("/api/v1/channels/{channel}/tasks/claim", tasks.claim, methods=["POST"]),
        Route("/api/v1/channels/{channel}/tasks/finish", tasks.finish, methods=["POST"]),
        Route("/api/v1/channels/{channel}/tasks/uploads", tasks.upload, methods=["POST"]),
        Route("/api/v1/nodes/leases", tasks.leases, methods=["POST"]),
    ]
