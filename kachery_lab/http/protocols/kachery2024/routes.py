"""Every address of the room."""

from __future__ import annotations

from starlette.routing import BaseRoute, Route

from kachery_lab.http.describe import Handler
from kachery_lab.http.protocols.kachery2024 import files, users, zones
from kachery_lab.http.protocols.kachery2024.errors import answers

HANDLERS: dict[str, Handler] = {
    "/api/initiateFileUpload": files.initiate_file_upload,
    "/api/finalizeFileUpload": files.finalize_file_upload,
    "/api/findFile": files.find_file,
    "/api/addUser": users.add_user,
    "/api/getUser": users.get_user,
    "/api/getUsers": users.get_users,
    "/api/setUserInfo": users.set_user_info,
    "/api/resetUserApiKey": users.reset_user_api_key,
    "/api/computeUserStats": users.compute_user_stats,
    "/api/addZone": zones.add_zone,
    "/api/getZone": zones.get_zone,
    "/api/getZones": zones.get_zones,
    "/api/setZoneInfo": zones.set_zone_info,
    "/api/deleteZone": zones.delete_zone,
    "/api/usage": zones.usage,
}


def routes() -> list[BaseRoute]:
    """Every address of this room."""
    return [Route(path, answers(handler), methods=["POST"]) for path, handler in HANDLERS.items()]
