"""The API of kachery 2, as kachery 2.0.3 (sortingview, figurl, SpikeInterface) uses it.

| route | answer |
|---|---|
| `POST /api/initiateFileUpload`, `/api/finalizeFileUpload`, `/api/findFile` | files of zones; API keys are tokens |
| `POST /api/addUser`, `getUser`, `getUsers`, `setUserInfo`, `resetUserApiKey`, `computeUserStats` | users |
| `POST /api/addZone`, `getZone`, `getZones`, `setZoneInfo`, `deleteZone`, `usage` | zones, which are channels |

Unknown fields of newer clients are ignored. Refusals are `{"error": text}` with the statuses of our own API.
"""

from kachery_lab.http.protocols.kachery2024.routes import routes

__all__ = ["routes"]
