"""The part of a hosted pubsub provider's protocol that kachery-daemon 1.2 uses, over this server's bands.

| route | what |
|---|---|
| WebSocket `/` with `access_token` | protocol messages, JSON in text frames or msgpack in binary ones (`format`) |

A token comes from `getAblyTokenRequest` (`POST /api/resource`). It names a node, one channel and the most that the node
may do on its bands; the node's roles are looked at again at each use. Presence, history, resuming a connection and the
provider's REST service are not offered. KACHERY_LAB_LEGACY_NODES=false refuses all.
"""

from kachery_lab.http.protocols.ably2021.routes import routes

__all__ = ["routes"]
