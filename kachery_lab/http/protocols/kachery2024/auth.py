"""Who asks: API keys are tokens. A key that nobody has is refused, in a public zone too."""

from __future__ import annotations

from starlette.requests import Request

from kachery_lab.errors import Unauthenticated
from kachery_lab.http.context import caller, node_of
from kachery_lab.services.principals import Principal
from kachery_lab.services.subjects import Subject, subject_of


def asker(request: Request) -> Principal | None:
    """The caller; None: no key was sent. Raises Unauthenticated, TooManyRequests."""
    kind = request.headers.get("authorization", "").partition(" ")[0].lower()
    if kind and kind != "bearer":
        name = "a Basic password" if kind == "basic" else "another credential"
        raise Unauthenticated(
            f"{name} came in place of the API key",
            hint="A ~/.netrc entry for this host does that: remove it, or set NETRC=/dev/null",
        )
    return caller(request)


def known(request: Request) -> Principal:
    """The caller, who must have sent a key. Raises Unauthenticated, TooManyRequests."""
    found = asker(request)
    if found is None:
        raise Unauthenticated(
            "this needs an API key",
            hint="Set KACHERY_API_KEY to a token that `kachery-lab token create USER --scope read --scope write` makes",
        )
    return found


def subject(request: Request, principal: Principal) -> Subject:
    """For whom rights are decided."""
    return subject_of(principal, node_of(request).identity.node_id)
