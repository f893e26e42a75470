"""Our client of another server's hub: signed requests to its API, and its buckets.

URLs that the hub names are followed only at the origin of the configured hub URL, or of the public URL that the hub
itself states, and at addresses that `Reach` allows; redirects are never followed. Answers have a greatest size and a
greatest duration: a hub is another machine, which may lie.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import socket
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

import httpx2

from kachery_lab.client.download import LEAST_RATE, Download, Threads
from kachery_lab.client.problems import error_from_problem
from kachery_lab.client.reach import PinnedTransport, Reach, origin_of
from kachery_lab.core.ids import FeedId, NodeId, Sha1, SubfeedHash
from kachery_lab.core.keys import PrivateKey
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.signables import request_bytes
from kachery_lab.errors import Forbidden, InvalidInput, KacheryLabError, TooLarge, Unavailable

RETRIES = 5
DOWNLOADS = 16
"""Downloads that run at once; the rest wait."""
MAX_ANSWER = 8 << 20
"""Bytes of an answer in JSON."""


@dataclass(frozen=True, slots=True)
class HubMembership:
    """One of this node's channels at the hub."""

    channel: str
    roles: frozenset[str]
    bucket_url: str
    offer: str = "uploaded"
    """`local` or `uploaded`: what this node provides there when somebody asks."""


class HubClient:
    """Speaks for one node to one hub. `timeout` is how long the hub may be silent, in seconds."""

    def __init__(
        self,
        url: str,
        key: PrivateKey,
        *,
        transport: httpx2.AsyncBaseTransport | None = None,
        timeout: float = 30.0,
    ) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._reach = Reach(url)
        self._threads = Threads(DOWNLOADS)
        self._hub_id: NodeId | None = None
        self._timeout = timeout
        # The environment is read by the settings only: no proxy from there.
        self._http = httpx2.AsyncClient(
            transport=transport or PinnedTransport(self._reach),
            timeout=timeout,
            follow_redirects=False,
            trust_env=False,
            headers={"Accept-Encoding": "identity"},
        )

    async def close(self) -> None:
        """End all connections."""
        await self._http.aclose()
        self._threads.close()

    # -- its API -------------------------------------------------------------------------------------------------

    async def hub_id(self) -> NodeId:
        """The hub's node id: asked once, then fixed for the life of this client."""
        if self._hub_id is None:
            info = await self._json("GET", f"{self._url}/api/v1/info", None)
            try:
                hub_id = NodeId.parse(info.get("nodeId"), "nodeId of the hub")
            except InvalidInput as error:
                raise _unreadable() from error
            if isinstance(info.get("publicUrl"), str):
                # One that is no address is as good as none.
                with suppress(Forbidden):
                    self._reach.allow(info["publicUrl"])
            self._hub_id = hub_id
        return self._hub_id

    async def report(self, label: str, owner: str) -> bool:
        """Tell the hub who we are; whether it has approved us."""
        answer = await self._signed("POST", "/api/v1/nodes/report", {"label": label, "owner": owner})
        return answer.get("approved") is True

    async def memberships(self) -> dict[str, HubMembership]:
        """Our channels there, by name, with the roles that are effective now."""
        answer = await self._signed("GET", "/api/v1/nodes/memberships", None)
        found = {}
        try:
            for item in answer["memberships"]:
                roles = frozenset(str(role) for role in item["roles"])
                channel, offer = str(item["channel"]), str(item.get("offer"))
                found[channel] = HubMembership(channel, roles, str(item["bucketUrl"]), offer)
        except (TypeError, KeyError) as error:
            raise _unreadable() from error
        return found

    async def upload_url(self, channel: str, sha1: Sha1, size: int, *, on_demand: bool = False) -> str | None:
        """Where to PUT a file; None when it is in the bucket already. `on_demand`: because somebody asked for it."""
        body = {"sha1": sha1, "size": size, "onDemand": on_demand}
        answer = await self._signed("POST", f"/api/v1/channels/{channel}/uploads", body)
        return None if answer.get("alreadyUploaded") else self._followed(str(answer.get("url")))

    async def post(self, target: str, body: object) -> dict[str, Any]:
        """A signed request to its API."""
        return await self._signed("POST", target, body)

    def followed(self, url: str) -> str:
        """The same address, if it is the hub's. Raises Forbidden."""
        return self._followed(url)

    async def feed_upload_url(
        self, channel: str, feed_id: FeedId, subfeed_hash: SubfeedHash, start: int, end: int, size: int
    ) -> str:
        """Where to PUT messages `start` to `end` (exclusive) of a subfeed, `size` bytes of JSON."""
        body = {"feedId": feed_id, "subfeedHash": subfeed_hash, "start": start, "end": end, "size": size}
        answer = await self._signed("POST", f"/api/v1/channels/{channel}/feeds", body)
        return self._followed(str(answer.get("url")))

    @property
    def url(self) -> str:
        """The configured address, without a slash at its end."""
        return self._url

    async def dial(self) -> socket.socket:
        """A connection to the hub, without TLS. Raises Forbidden, OSError."""
        return await asyncio.to_thread(self._reach.dial, origin_of(self._url), self._timeout)

    async def signature(self, method: str, target: str, data: bytes) -> str:
        """The header `Kachery-Node` of exactly this request: good once, within five minutes."""
        timestamp, nonce = int(time.time()), secrets.token_hex(16)
        node_id, hub_id = self._key.public_hex, await self.hub_id()
        signed = request_bytes(method, target, hashlib.sha256(data).hexdigest(), timestamp, nonce, node_id, hub_id)
        return f"v1 {node_id} {timestamp} {nonce} {self._key.sign(signed).hex()}"

    async def _signed(self, method: str, target: str, body: object) -> dict[str, Any]:
        data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        header = await self.signature(method, target, data)
        return await self._json(method, self._url + target, data, {"Kachery-Node": header})

    async def _json(
        self, method: str, url: str, data: bytes | None, headers: dict[str, str] | None = None
    ) -> dict[str, Any]:
        sent = {"Content-Type": "application/json", **(headers or {})}
        try:
            async with asyncio.timeout(self._timeout):
                status, found = await self._answer(method, url, data or None, sent)
        except TimeoutError as error:
            raise _unreachable(error) from error
        if status >= 300:
            raise _refusal(status, found)
        return found

    async def _answer(
        self, method: str, url: str, content: bytes | AsyncIterable[bytes] | None, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of an answer, {} for anything else. Raises Unavailable, also for a longer one."""
        try:
            async with self._http.stream(method, url, content=content, headers=headers) as response:
                body = bytearray()
                async for piece in response.aiter_raw():
                    body += piece
                    if len(body) > MAX_ANSWER:
                        raise Unavailable("the hub's answer is longer than it may be")
        except (httpx2.TransportError, httpx2.InvalidURL) as error:
            raise _unreachable(error) from error
        return response.status_code, _parse(body)

    # -- its buckets ---------------------------------------------------------------------------------------------

    def _followed(self, url: str) -> str:
        self._reach.require(url)
        return url

    async def has_object(self, bucket_url: str, path: ObjectPath) -> bool:
        """Whether something is in a bucket."""
        return await self._size(f"{bucket_url}/{path.text}") is not None

    async def size(self, bucket_url: str, sha1: Sha1) -> int | None:
        """Size of a file in a bucket, None when it is not there."""
        return await self._size(f"{bucket_url}/{file_path(sha1)}")

    async def _size(self, address: str) -> int | None:
        url = self._followed(address)
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._http.head(url)
        except (httpx2.TransportError, httpx2.InvalidURL, TimeoutError) as error:
            raise _unreachable(error) from error
        if response.status_code == 404:
            return None
        if response.status_code != 200:
            raise _refusal(response.status_code, {})
        length = response.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            raise Unavailable("the hub does not say the size of the object")
        return int(length)

    async def document(self, bucket_url: str, path: str, limit: int) -> bytes | None:
        """A small object of a bucket, at most `limit` bytes; None when it is not there. Raises Forbidden, Unavailable,
        and TooLarge for a longer answer."""
        url = self._followed(f"{bucket_url}/{path}")
        data = bytearray()
        try:
            async with asyncio.timeout(self._timeout + limit / LEAST_RATE), self._http.stream("GET", url) as response:
                if response.status_code == 404:
                    return None
                async for piece in response.aiter_raw():
                    data += piece
                    if len(data) > limit:
                        raise TooLarge(f"the hub's answer has more than {limit} bytes")
        except (httpx2.TransportError, httpx2.InvalidURL, TimeoutError) as error:
            raise _unreachable(error) from error
        if response.status_code != 200:
            raise _refusal(response.status_code, _parse(data))
        return bytes(data)

    async def read(self, bucket_url: str, sha1: Sha1, size: int) -> AsyncIterator[bytearray]:
        """Exactly `size` bytes of a file; a connection that is cut is resumed where it ended. Not hashed here."""
        url = self._followed(f"{bucket_url}/{file_path(sha1)}")
        offset, failures = 0, 0
        while offset < size:
            before = offset
            try:
                download = await Download.open(self._reach, self._threads, url, offset, self._timeout)
            except (OSError, HTTPException) as error:
                failures += 1
                if failures > RETRIES:
                    raise _unreachable(error) from error
                continue
            try:
                while offset < size and (piece := await download.piece()):
                    offset += len(piece)
                    if offset > size:
                        raise Unavailable("the hub sent more bytes than it announced")
                    yield piece
            finally:
                download.close()
            if offset < size:
                failures = 0 if offset > before else failures + 1
                if failures > RETRIES:
                    raise Unavailable("the hub's answer ends before the file does")

    async def put(self, url: str, stream: AsyncIterable[bytes] | bytes, size: int) -> None:
        """Upload bytes to a URL that the hub gave."""
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        try:
            async with asyncio.timeout(self._timeout + size / LEAST_RATE):
                status, found = await self._answer("PUT", self._followed(url), stream, headers)
        except TimeoutError as error:
            raise _unreachable(error) from error
        if status != 200:
            raise _refusal(status, found)


def _parse(body: bytes | bytearray) -> dict[str, Any]:
    try:
        found = json.loads(body) if body else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(status: int, body: object) -> KacheryLabError:
    if status < 400:
        return Unavailable(
            f"the hub answers {status}, which is not followed", hint="KACHERY_LAB_HUB_URL is its final address"
        )
    return error_from_problem(status, body)


def _unreadable() -> Unavailable:
    return Unavailable("the hub's answer cannot be read", hint="Does KACHERY_LAB_HUB_URL lead to a kachery-lab server?")


def _unreachable(error: Exception) -> Unavailable:
    return Unavailable(
        f"the hub cannot be reached ({type(error).__name__})", hint="Look at KACHERY_LAB_HUB_URL and at the hub"
    )
