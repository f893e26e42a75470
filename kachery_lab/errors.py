"""The whole error tree. Every error has a stable `code` and may carry a `hint`; none knows HTTP.

KacheryLabError
+- InvalidInput             malformed request, field or identifier
|  +- InvalidJson           not JSON that this server accepts
+- Unauthenticated          no credential, or one that nobody has
+- Forbidden                a known caller that may not do this
+- NotFound                 absent for this caller
+- Conflict                 lost a race, or contradicts what is stored
|  +- Collision             other bytes are stored under this SHA-1
|  +- FeedPosition          the subfeed has moved on (`num_messages`, `head_signature`)
|  +- RequestIdReused       the request id was used for other messages
|  +- FeedFork              messages of a feed contradict what is known of it
+- Gone                     was here and may not be served
|  +- Quarantined           the stored bytes no longer match their name
|  +- LinkChanged           the linked file is no longer the one that was linked
+- TooLarge                 over a stated limit
+- UnsupportedMediaType     an encoding that is never decoded here
+- RangeNotSatisfiable      no byte of the range exists (`size`)
+- UnknownHost              the Host header names another machine
+- ContentMismatch          the bytes do not match the claim
+- TooManyRequests          wait `retry_after` seconds
+- HeadersTooLarge          more header bytes than a request may have
+- Unavailable              disk, database or deadline; try again after `retry_after` seconds
+- StorageFull              no room on the volume
StartRefused                the node does not start; never reaches a client
"""

from __future__ import annotations

from typing import ClassVar


class KacheryLabError(Exception):
    """Base of everything that a caller can be told. `message` says what was wrong, `hint` what to do."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def text(self) -> str:
        """Message and hint, where there is room for one text only."""
        return f"{self.message}. {self.hint}" if self.hint else self.message


class InvalidInput(KacheryLabError):
    """A malformed request, field or identifier."""

    code = "invalid_input"


class InvalidJson(InvalidInput):
    """Bytes that are not JSON of the kind that this server accepts."""

    code = "invalid_json"


class Unauthenticated(KacheryLabError):
    """No credential, or one that belongs to nobody."""

    code = "unauthenticated"


class Forbidden(KacheryLabError):
    """The caller is known and may not do this."""

    code = "forbidden"


class NotFound(KacheryLabError):
    """There is no such thing for this caller."""

    code = "not_found"


class Conflict(KacheryLabError):
    """Lost a race, or contradicts what is stored."""

    code = "conflict"


class Collision(Conflict):
    """Other bytes are already stored under this SHA-1; the first stay."""

    code = "sha1_collision"


class FeedPosition(Conflict):
    """The subfeed does not end where the caller expected."""

    code = "feed_position"

    def __init__(self, message: str, *, num_messages: int, head_signature: str | None, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.num_messages = num_messages
        self.head_signature = head_signature


class RequestIdReused(Conflict):
    """The request id was used on this subfeed for other messages."""

    code = "request_id_reused"


class FeedFork(Conflict):
    """Signed messages or checkpoints of a feed contradict those that are here; the first stay."""

    code = "feed_fork"


class Gone(KacheryLabError):
    """It was here and may not be served."""

    code = "gone"


class Quarantined(Gone):
    """The stored bytes no longer match their name; storing the right bytes again heals it."""

    code = "quarantined"


class LinkChanged(Gone):
    """The linked file is missing or is no longer the one that was linked."""

    code = "link_changed"


class TooLarge(KacheryLabError):
    """Over a stated limit."""

    code = "too_large"


class UnsupportedMediaType(KacheryLabError):
    """A content encoding or type that is never decoded here."""

    code = "unsupported_media_type"


class RangeNotSatisfiable(KacheryLabError):
    """No byte of the asked range exists; `size` is the size in bytes of the whole."""

    code = "range_not_satisfiable"

    def __init__(self, message: str, *, size: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.size = size


class UnknownHost(KacheryLabError):
    """The Host header names another machine."""

    code = "unknown_host"


class ContentMismatch(KacheryLabError):
    """The bytes do not match the claimed hash or size."""

    code = "content_mismatch"


class TooManyRequests(KacheryLabError):
    """Too many wrong credentials; wait `retry_after` seconds."""

    code = "too_many_requests"

    def __init__(self, message: str, *, retry_after: int = 60, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class HeadersTooLarge(KacheryLabError):
    """More header bytes, or more headers, than a request may have."""

    code = "headers_too_large"


class Unavailable(KacheryLabError):
    """Disk, database or a deadline; nothing was done; try again after `retry_after` seconds."""

    code = "unavailable"

    def __init__(self, message: str, *, retry_after: int = 5, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class StorageFull(KacheryLabError):
    """No room on the volume, by the disk's word or by a configured limit."""

    code = "storage_full"


class StartRefused(Exception):
    """The node does not start. `message` names what was found, `hint` the way out."""

    code = "start_refused"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
