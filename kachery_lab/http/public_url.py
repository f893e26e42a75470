"""The address of this server in the URLs that it hands out: the configured one, else the one that the client used."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from urllib.parse import urlsplit

import structlog
from starlette.requests import HTTPConnection

from kachery_lab.http.context import application_of, node_of, peer_of
from kachery_lab.services.channel_files import Found

log = structlog.get_logger(__name__)

_HOST = re.compile(r"[A-Za-z0-9._-]{1,255}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:[0-9]{1,5})?")
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)*/?")


def base_url(request: HTTPConnection) -> str:
    """Scheme, host and path prefix without a slash at the end: KACHERY_LAB_PUBLIC_URL, else what the client used.

    Of a proxy in KACHERY_LAB_TRUSTED_PROXIES the forwarded headers (`X-Forwarded-Proto`, `-Host`, `-Prefix`) count;
    from any other address, and when malformed, they are ignored.
    """
    settings = node_of(request).settings
    if settings.public_url:
        return settings.public_url.rstrip("/")
    scheme = "https" if request.scope["scheme"] in ("https", "wss") else "http"
    host, prefix = request.headers.get("host", ""), ""
    if request.client is not None and is_trusted(request.client.host, settings.trusted_proxies):
        given = _last(request, "x-forwarded-proto").lower()
        scheme = given if given in ("http", "https") else scheme
        given = _last(request, "x-forwarded-host")
        host = given if _HOST.fullmatch(given) else host
        given = _last(request, "x-forwarded-prefix")
        prefix = given.rstrip("/") if _PREFIX.fullmatch(given) else ""
    if not _HOST.fullmatch(host):
        # Only HTTP/1.0 comes without a Host; the address of the listener is the best that is known.
        name, port = request.scope.get("server") or ("localhost", None)
        name = f"[{name}]" if ":" in name else name
        host = name if port is None else f"{name}:{port}"
    return f"{scheme}://{host}{prefix}"


def hub_url(request: HTTPConnection) -> str:
    """`base_url` for a node, whose own clients follow it as well: the name that the node used may mean nothing to them.
    The first node of another machine that gets one while KACHERY_LAB_PUBLIC_URL is not set is told of in the log; not
    when it came through a trusted proxy under a name for all machines.
    """
    url, settings, known = base_url(request), node_of(request).settings, application_of(request)
    if settings.public_url is None and not known.public_url_missed:
        peer = peer_of(request) or ""
        proxied = is_trusted(peer, settings.trusted_proxies)
        if _is_elsewhere(peer, settings.trusted_proxies) and not (proxied and _is_for_others(url)):
            known.public_url_missed = True
            log.warning(
                "nodes of other machines are given addresses that their clients may not reach",
                peer=peer,
                given=url,
                hint="Set KACHERY_LAB_PUBLIC_URL to the address of this server that they and their clients all resolve",
            )
    return url


def _is_elsewhere(peer: str, proxies: tuple[str, ...]) -> bool:
    """Whether a peer is another machine, or a proxy that speaks for others."""
    found = _address(peer)
    return found is not None and (not found.is_loopback or is_trusted(peer, proxies))


def _is_for_others(url: str) -> bool:
    """Whether the host of a URL is the same machine wherever it is used: not `localhost`, no loopback address."""
    host = urlsplit(url).hostname or ""
    found = _address(host)
    if found is not None:
        return not (found.is_loopback or found.is_unspecified)
    return host != "localhost" and not host.endswith(".localhost")


def file_url(request: HTTPConnection, found: Found) -> str:
    """The address at which the one who looked for a file reads it."""
    url = f"{base_url(request)}/sha1/{found.sha1}"
    return url if found.ticket is None else f"{url}?ticket={found.ticket}"


def upload_url(request: HTTPConnection, ticket: str) -> str:
    """Where the bytes of an upload are PUT."""
    return f"{base_url(request)}/bucket/upload/{ticket}"


def _last(request: HTTPConnection, name: str) -> str:
    """What the trusted proxy itself wrote: a proxy that appends leaves what it was sent before the comma."""
    return request.headers.get(name, "").rpartition(",")[2].strip()


@lru_cache(maxsize=256)
def is_trusted(address: str, proxies: tuple[str, ...]) -> bool:
    """Whether an address is one of these, which may be networks (`10.0.0.0/8`)."""
    found = _address(address)
    return found is not None and any(found in ipaddress.ip_network(proxy, strict=False) for proxy in proxies)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for what is no address, as the admin socket's peer."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
