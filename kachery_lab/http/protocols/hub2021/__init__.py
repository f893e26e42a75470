"""The hub and resource server of 2021, as kachery-daemon 1.2.1 and kachery-client 1.2.0 use them.

| route | answer |
|---|---|
| `POST /api/kacheryNode` | `getNodeConfig`, `getChannelConfig`, `getBitwooderCertForChannel`, `report`; signed |
| `POST /api/getChannelBucketBaseUrl` | the address of public channels, for every well-formed name; unsigned |
| `POST /api/resource` | `getUploadUrls` and `getAblyTokenRequest` (with a certificate), `getResourceInfo` |
| `POST /api/kacheryHub` | 404: its work is done by `/api/admin/v1` here |

Refusals are text: 400 malformed, 404 unknown or forbidden, as published. KACHERY_LAB_LEGACY_NODES=false refuses all.
"""

from kachery_lab.http.protocols.hub2021.routes import routes

__all__ = ["routes"]
