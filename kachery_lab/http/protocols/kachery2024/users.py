"""Users and their API keys. A user asks about themselves, an admin about everybody."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kachery_lab.core.ids import UserName
from kachery_lab.http.bodies import optional, required
from kachery_lab.http.context import node_of
from kachery_lab.http.protocols.kachery2024.auth import known
from kachery_lab.http.protocols.kachery2024.translate import answer, body_of
from kachery_lab.services.profiles import Profile

MASKED = "********"
_ONE = {"userId": required(str)}
_INFO = {**_ONE, "name": optional(str), "email": optional(str), "researchDescription": optional(str)}


def _shown(profile: Profile) -> dict[str, Any]:
    return {
        "userId": profile.user,
        "name": profile.name,
        "email": profile.email,
        "researchDescription": profile.research_description,
        "apiKey": MASKED if profile.has_api_key else "",
    }


def _user(body: dict[str, Any]) -> UserName:
    return UserName.parse(body["userId"], "userId")


async def add_user(request: Request) -> Response:
    """A new user; for admins. Whoever has a token has a user already."""
    actor, user = known(request), _user(await body_of(request, "addUser", _ONE))
    await node_of(request).users.create(actor, user)
    return answer("addUser")


async def get_user(request: Request) -> Response:
    """One user, the API key masked."""
    actor, user = known(request), _user(await body_of(request, "getUser", _ONE))
    return answer("getUser", user=_shown(await node_of(request).profiles.get(actor, user)))


async def get_users(request: Request) -> Response:
    """All users; for admins."""
    actor, _ = known(request), await body_of(request, "getUsers", {})
    found = await node_of(request).profiles.list(actor)
    return answer("getUsers", users=[_shown(profile) for profile in found])


async def set_user_info(request: Request) -> Response:
    """Name, e-mail address and research description."""
    actor, body = known(request), await body_of(request, "setUserInfo", _INFO)
    await node_of(request).profiles.change(
        actor,
        _user(body),
        name=body.get("name"),
        email=body.get("email"),
        research_description=body.get("researchDescription"),
    )
    return answer("setUserInfo")


async def reset_user_api_key(request: Request) -> Response:
    """A new API key, shown this once; the one before it ends."""
    actor, user = known(request), _user(await body_of(request, "resetUserApiKey", _ONE))
    return answer("resetUserApiKey", apiKey=await node_of(request).profiles.reset_api_key(actor, user))


async def compute_user_stats(request: Request) -> Response:
    """As upstream: who was asked about."""
    actor, user = known(request), _user(await body_of(request, "computeUserStats", _ONE))
    profile = await node_of(request).profiles.get(actor, user)
    return answer("computeUserStats", userStats={"userId": profile.user})
