"""Pages for people: the link that `kachery-cloud-init` prints. Rendered here, without any script."""

from __future__ import annotations

import secrets
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from kachery_lab.core.keys import PublicKey
from kachery_lab.errors import InvalidInput, KacheryLabError, NotFound, TooLarge, UnsupportedMediaType
from kachery_lab.http.context import node_of, peer_of
from kachery_lab.http.errors import problem_headers, status_of
from kachery_lab.services.access_data import ClientRecord
from kachery_lab.services.client_requests import moment
from kachery_lab.services.clients import check_label

if TYPE_CHECKING:
    import jinja2

MAX_FORM = 10_000
_FIELDS = ("user", "code")


@cache
def _templates() -> jinja2.Environment:
    # Only here: most servers never show a page.
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("kachery_lab.http.protocols.gateway2022"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )


def page(name: str, status: int = 200, headers: dict[str, str] | None = None, **values: object) -> Response:
    """A page. It loads nothing, runs nothing, and its address, which holds a signature, goes nowhere."""
    nonce = secrets.token_urlsafe(12)
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )
    given = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "cache-control": "no-store",
        **(headers or {}),
    }
    return HTMLResponse(_templates().get_template(name).render(nonce=nonce, **values), status, given)


def page_error(_request: Request, error: KacheryLabError) -> Response:
    """A refusal, for people."""
    return page("refused.html", status_of(error), problem_headers(error), text=error.text)


async def link(request: Request) -> Response:
    """The page behind the signed link. Looking at it changes nothing: previews and scanners open links too."""
    client_id, label, signature = _link(request)
    known = node_of(request).clients.known(client_id)
    if known is not None:
        return _state(known)
    return page("register.html", client_id=client_id, label=label, signature=signature)


async def ask(request: Request) -> Response:
    """The button: with an enrolment code the key is registered, without one it waits for an admin."""
    client_id, label, signature = _link(request)
    form = await _form(request)
    clients, peer = node_of(request).clients, peer_of(request)
    if form["code"]:
        return _state(await clients.enrol(client_id, signature, label, form["code"], peer))
    return _state(await clients.ask(client_id, signature, label, form["user"], peer))


async def client(request: Request) -> Response:
    """What is known of a key, for whoever knows its id."""
    client_id = PublicKey.parse(request.path_params["client_id"], "client id").hex
    known = node_of(request).clients.known(client_id)
    if known is None:
        raise NotFound(f"there is no client {client_id} here", hint="`kachery-cloud-init` prints a link that adds it")
    return _state(known)


def _link(request: Request) -> tuple[str, str, str]:
    """(Client id, label, signature) of a link that the client signed. Raises InvalidInput, Unauthenticated."""
    client_id = PublicKey.parse(request.path_params["client_id"], "client id").hex
    signature = request.query_params.get("signature", "")
    node_of(request).clients.check_link(client_id, signature)
    return client_id, check_label(request.query_params.get("label", "")), signature


def _state(known: ClientRecord) -> Response:
    approved = None if known.approved_at is None else moment(known.approved_at)
    return page("client.html", client=known, approved=approved)


async def _form(request: Request) -> dict[str, str]:
    """The fields of the page's form, empty where they are missing. Raises InvalidInput, TooLarge."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise UnsupportedMediaType("expected the page's own form, application/x-www-form-urlencoded")
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_FORM:
            raise TooLarge(f"the form is over the limit of {MAX_FORM} bytes")
    try:
        pairs = parse_qsl(data.decode("ascii"), keep_blank_values=True, max_num_fields=10, errors="strict")
    except ValueError:
        raise InvalidInput("the form cannot be read") from None
    found = dict(pairs)
    if len(found) != len(pairs) or set(found) - set(_FIELDS):
        raise InvalidInput(f"the form has the fields {', '.join(_FIELDS)}, each once")
    return {name: found.get(name, "").strip() for name in _FIELDS}
