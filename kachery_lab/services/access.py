"""Credentials: the rotating code of the local lab client, additional codes, and tokens."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import string
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import aiofiles
import structlog

from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.durable import write_file
from kachery_lab.errors import KacheryLabError, TooManyRequests, Unauthenticated
from kachery_lab.services import principals
from kachery_lab.services.principals import Principal
from kachery_lab.services.tokens import PREFIX, TokenService, hash_secret, principal

ROTATION_SECONDS = 180.0
"""A new code is made this often; the one before stays valid (spec/daemon-api.md, "The code")."""
CODE_LENGTH = 12
WRONG_LIMIT = 20
"""Wrong credentials that one address may send within WRONG_WINDOW seconds before it is told to wait."""
WRONG_WINDOW = 60.0
_ADDRESSES = 10_000

log = structlog.get_logger(__name__)


class WrongCounter:
    """Counts wrong credentials by address. A right credential is never refused for what its address sent before."""

    def __init__(self, limit: int = WRONG_LIMIT, window: float = WRONG_WINDOW) -> None:
        self._limit = limit
        self._window = window
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def refuse(self, peer: str | None, error: KacheryLabError) -> KacheryLabError:
        """The error to raise for one more wrong credential: `error`, or TooManyRequests over the limit."""
        now = time.monotonic()
        key = peer or ""
        since, count = self._seen.pop(key, (now, 0))
        if now - since >= self._window:
            since, count = now, 0
        self._seen[key] = (since, count + 1)
        if len(self._seen) > _ADDRESSES:
            self._seen.popitem(last=False)
        if count + 1 > self._limit:
            wait = int(self._window - (now - since)) + 1
            return TooManyRequests("too many wrong credentials from this address", retry_after=wait)
        return error


class AccessService:
    """Says who a caller is. Codes and tokens are compared as hashes, in constant time, and never logged."""

    def __init__(
        self, tokens: TokenService, disk: Disk, code_file: Path, gid: int | None, check_volume: Callable[[], None]
    ) -> None:
        self._tokens = tokens
        self._disk = disk
        self._code_file = code_file
        self._gid = gid
        self._check_volume = check_volume
        self._codes: list[bytes] = []
        self._other_codes: list[bytes] = []
        self._wrong = WrongCounter()

    # -- codes ---------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take over the code of the previous run as the previous one, then publish a new one."""
        try:
            async with aiofiles.open(self._code_file, encoding="ascii", executor=self._disk.executor) as file:
                found = (await file.read()).strip()
        except (OSError, UnicodeDecodeError):
            found = ""
        if len(found) == CODE_LENGTH and found.isalpha():
            self._codes = [_digest(found)]
        await self.rotate()

    async def rotate(self) -> None:
        """Publish a new code; the one before stays valid until the next rotation. Raises what the disk raises."""
        code = "".join(secrets.choice(string.ascii_letters) for _ in range(CODE_LENGTH))
        before = self._codes[:2]
        # Valid before it can be read: a client may use it the moment the file is there.
        self._codes = [*before, _digest(code)]
        # A failure leaves it so: what was published stays valid, and a write that is late may still publish this one.
        await self._disk.run(self._publish, code)
        self._codes = [_digest(code), *before[:1]]

    def _publish(self, code: str) -> None:
        # An unmounted volume leaves a bare directory, into which nothing may be written.
        self._check_volume()
        write_file(self._code_file, code.encode(), 0o640, gid=self._gid)

    async def keep_rotating(self) -> None:
        """Rotate for ever. A volume that cannot be written leaves the last published code valid."""
        while True:
            await asyncio.sleep(ROTATION_SECONDS)
            try:
                await self.rotate()
            except KacheryLabError as error:
                log.warning("client-auth was not rotated", code=error.code, reason=error.message)

    def set_other_codes(self, codes: object) -> None:
        """Additional codes for browsers; anything but a list of texts means none. In force at once."""
        texts: Iterable[object] = codes if isinstance(codes, list) else ()
        self._other_codes = [_digest(text) for text in texts if isinstance(text, str) and text]

    # -- who is it -----------------------------------------------------------------------------------------------

    def by_code(self, code: str | None, peer: str | None) -> Principal:
        """The caller of the daemon API. Raises Unauthenticated or TooManyRequests."""
        if not code:
            raise Unauthenticated(
                "the header KACHERY-CLIENT-AUTH-CODE is missing", hint="It holds the text of <storage>/client-auth"
            )
        if code.startswith(PREFIX):
            return self.by_token(code, peer)
        given = _digest(code)
        if _among(given, self._codes):
            return principals.local(peer)
        if _among(given, self._other_codes):
            return Principal("browser", "browser", frozenset({"client"}), peer)
        raise self._wrong.refuse(
            peer,
            Unauthenticated("the client code is wrong or expired", hint="Read <storage>/client-auth again"),
        )

    def by_token(self, secret: str, peer: str | None) -> Principal:
        """The user of a token. Raises Unauthenticated or TooManyRequests."""
        token = self._tokens.find(secret)
        if token is None:
            raise self._wrong.refuse(peer, Unauthenticated("the token is unknown, expired or revoked"))
        return principal(token, peer)


def _digest(code: str) -> bytes:
    return hash_secret(code).encode()


def _among(given: bytes, known: list[bytes]) -> bool:
    # Every known code is compared, so the time does not tell which one matched.
    return sum([hmac.compare_digest(given, one) for one in known]) > 0
