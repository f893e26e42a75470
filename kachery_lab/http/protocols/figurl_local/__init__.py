"""What figurl looks for on a person's own machine, on a listener of its own (KACHERY_LAB_FIGURL_PORT).

| route | answer |
|---|---|
| `GET /probe` | 200 |
| `GET`, `HEAD /sha1/{hash}` | a file of the zone `default`; ranges |
| `POST /upload/sha1/{hash}` | puts the body into that zone |

It acts with the roles of KACHERY_LAB_FIGURL_USER for everybody who reaches the port, so it is meant for a loopback
address; only pages of KACHERY_LAB_FIGURL_ORIGINS are answered. Errors are text.
"""

from kachery_lab.http.protocols.figurl_local.routes import routes

__all__ = ["routes"]
