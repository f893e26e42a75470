"""Errors as the provider's library reads them: `{code, statusCode, message}`, with the provider's numbers.

| code | the library's reaction |
|---|---|
| 40160 | the channel, or the publication, fails; its caller is told |
| 40140 to 40149 | asks for a new token and connects again |
| 40101, 40102, 40000 | the connection fails; its caller is told |
| other codes of a refused publication | its caller is told |
"""

from __future__ import annotations

from dataclasses import dataclass

from kachery_lab import errors
from kachery_lab.errors import KacheryLabError


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error on the wire."""

    code: int
    status: int
    message: str

    def fields(self) -> dict[str, object]:
        """As a member `error` of a protocol message."""
        return {"code": self.code, "statusCode": self.status, "message": self.message}


class ConnectionRefused(Exception):
    """The connection cannot go on; the client is told `info`."""

    def __init__(self, info: ErrorInfo) -> None:
        super().__init__(info.message)
        self.info = info


NO_TOKEN = ErrorInfo(40101, 401, "this needs a token in access_token; a node gets one with getAblyTokenRequest")
TOKEN_EXPIRED = ErrorInfo(40142, 401, "the token has expired")
REVOKED = ErrorInfo(40141, 401, "the node is not approved at this hub; an admin runs: kachery-lab node approve")
OTHER_TOKEN = ErrorInfo(40102, 401, "the new token is for another node or channel")
NOT_RECOVERED = ErrorInfo(80008, 400, "connections are not resumed here; this one is new, and what was missed is gone")
STOPPING = ErrorInfo(80003, 503, "the server is going down; connect again")
NOT_READ = ErrorInfo(80003, 400, "the connection was cut off because its messages were not read fast enough")
NO_PRESENCE = ErrorInfo(40160, 401, "presence is not offered here")

_CODES: dict[type[KacheryLabError], tuple[int, int]] = {
    errors.Forbidden: (40160, 401),
    # Of a channel that is not there nobody learns more than of a forbidden one.
    errors.NotFound: (40160, 401),
    errors.Unauthenticated: (40140, 401),
    errors.TooLarge: (40009, 400),
    errors.InvalidInput: (40013, 400),
    errors.TooManyRequests: (42911, 429),
    errors.Unavailable: (50003, 503),
}


def token_error(error: KacheryLabError) -> ErrorInfo:
    """Why a token is refused: one that this server did not issue. The library asks for another."""
    return ErrorInfo(40140, 401, error.text)


def denied(band: str, right: str) -> ErrorInfo:
    """A right on a band that the token or the node's roles do not give; also for what is no band of the channel."""
    return ErrorInfo(40160, 401, f"the token and the node's roles do not allow to {right} on {band}")


def malformed(error: KacheryLabError) -> ErrorInfo:
    """A frame that is no protocol message."""
    return ErrorInfo(40000, 400, error.text)


def of(error: KacheryLabError) -> ErrorInfo:
    """An error of a service on the wire."""
    code, status = next((_CODES[kind] for kind in type(error).__mro__ if kind in _CODES), (50000, 500))
    return ErrorInfo(code, status, error.text)
