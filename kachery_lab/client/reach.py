"""Where our requests may go: to the origins of one hub, at addresses that lie no further inside than the hub itself.

A name is looked up once for each connection, and the connection goes to the address that was looked at: a name that
means another machine a moment later leads nowhere. However an address is written (decimal, octal, mapped into IPv6),
what counts is where it leads.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

import httpx2

from kachery_lab.errors import Forbidden

Origin = tuple[str, str, int]
ANYWHERE, PRIVATE_NETWORK, THIS_MACHINE = range(3)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def origin_of(url: str) -> Origin:
    """(Scheme, host, port). Raises Forbidden for everything but an http or https address without a user's name."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:
        scheme, host, port = "", None, None
    plain = url.isascii() and url.isprintable() and not set(url) & set(" \\@")
    if scheme not in ("http", "https") or not host or not plain:
        raise Forbidden("an address that is no plain http or https address is not followed")
    return scheme, host, port if port is not None else (443 if scheme == "https" else 80)


def depth(address: str) -> int:
    """How far inside an IP address lies: ANYWHERE, PRIVATE_NETWORK or THIS_MACHINE (its own or its link's)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        within = ip.ipv4_mapped or ip.sixtofour
        if within is None and ip in _NAT64:
            within = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if within is not None:
            return depth(str(within))
    if ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast:
        return THIS_MACHINE
    return ANYWHERE if ip.is_global else PRIVATE_NETWORK


class Reach:
    """The origins of one hub. `home` is the configured one; others are those that the hub states."""

    def __init__(self, home: str) -> None:
        self._home = origin_of(home)
        self._origins = {self._home}
        self._depth: int | None = None
        self.tls = httpx2.create_ssl_context()

    def allow(self, url: str) -> None:
        """One more origin. Raises Forbidden for what is none."""
        self._origins.add(origin_of(url))

    def require(self, url: str) -> Origin:
        """The origin of a URL, if requests may go there. Raises Forbidden."""
        origin = origin_of(url)
        if origin not in self._origins:
            raise Forbidden("the hub names an address of another machine, which is not followed")
        return origin

    def addresses(self, origin: Origin) -> list[str]:
        """Blocking: the IP addresses to connect to, of those that the host has now. Raises OSError for an unknown host,
        Forbidden when all lie further inside than the hub does."""
        _, host, port = origin
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if origin == self._home and self._depth is None:
            self._depth = min(depth(address) for address in found)
        limit = ANYWHERE if self._depth is None else self._depth
        if origin == self._home:
            # A hub may move into the private network that this machine has joined meanwhile.
            limit = max(limit, PRIVATE_NETWORK)
        allowed = [address for address in found if depth(address) <= limit]
        if not allowed:
            raise Forbidden(
                f"the name {host} leads to this machine or to a network further inside than the hub's",
                hint="If the hub has really moved there, restart this server",
            )
        return allowed

    def dial(self, origin: Origin, timeout: float) -> socket.socket:
        """Blocking: a connection to the first address that takes one. Raises Forbidden, OSError."""
        failure: OSError = OSError(f"{origin[1]} has no address")
        for address in self.addresses(origin):
            try:
                return socket.create_connection((address, origin[2]), timeout)
            except OSError as error:
                failure = error
        raise failure

    def connect(self, url: str, timeout: float) -> socket.socket:
        """Blocking: a connection, with TLS for https. Raises Forbidden, OSError."""
        origin = self.require(url)
        sock = self.dial(origin, timeout)
        if origin[0] == "http":
            return sock
        try:
            return self.tls.wrap_socket(sock, server_hostname=origin[1])
        except BaseException:
            sock.close()
            raise


class PinnedTransport(httpx2.AsyncBaseTransport):
    """Sends each request to an address that `Reach` has looked at, under the host's own name."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._inner = httpx2.AsyncHTTPTransport(verify=reach.tls)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """As the transport inside. Raises Forbidden, and ConnectError for a host that is unknown."""
        origin = self._reach.require(str(request.url))
        host = origin[1]
        try:
            addresses = await asyncio.to_thread(self._reach.addresses, origin)
        except OSError as error:
            raise httpx2.ConnectError(str(error), request=request) from error
        request.extensions = {**request.extensions, "sni_hostname": host}
        for address in addresses[:-1]:
            try:
                return await self._send(request, address)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                # Nothing of the request was sent: the next address.
                continue
        return await self._send(request, addresses[-1])

    async def _send(self, request: httpx2.Request, address: str) -> httpx2.Response:
        request.url = request.url.copy_with(host=address)
        return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        """End all connections."""
        await self._inner.aclose()
