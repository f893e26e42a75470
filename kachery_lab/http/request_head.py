"""What a request head may look like. Pure: bytes in, `Head` out or `Refused` raised; nothing is read or written here.

The whole head is matched against one positive grammar before the parser sees it, so that what the parser would tolerate
(a missing Host, two of them, a header folded over lines) never reaches the application.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kachery_lab.errors import HeadersTooLarge, InvalidInput, KacheryLabError, TooLarge, UnsupportedMediaType

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
# Possessive quantifiers: the time is linear in the length of the head, whatever a client sends.
# Possessive repeats on single classes only: Python before 3.11.5 misreads them on groups.
_GRAMMAR = re.compile(
    rb"(" + _TOKEN + rb") ([\x21\x22\x24-\x7e]++) HTTP/1\.([01])"
    rb"((?:\r\n" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+)*)\r\n\r\n"
)
_FIELDS = re.compile(
    rb"\r\n(host|content-length|transfer-encoding|content-encoding|expect|upgrade|connection|origin):([^\r]*+)",
    re.IGNORECASE,
)
_ORIGIN = re.compile(rb"\r\norigin:[ \t]*+([\x21-\x7e]++)[ \t]*+\r\n", re.IGNORECASE)
_NEVER_IN_A_HEAD = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n")
_HOST = re.compile(rb"[A-Za-z0-9._\-]++(?::[0-9]{0,5})?|\[[0-9A-Fa-f:.%A-Za-z]++\](?::[0-9]{0,5})?")
_FRAMING = re.compile(rb"\r\n(?:transfer-encoding):[^\r]*+", re.IGNORECASE)
_UPGRADE = re.compile(rb"\r\n(?:upgrade):[^\r]*+", re.IGNORECASE)

_REQUEST_LINE_ROOM = 64
"""Bytes of a request line that are not its target."""

_WEBSOCKET_LINE = 8000
"""The websockets library gives up at 8192, and uvicorn then answers nothing and keeps the connection."""


class Refused(Exception):
    """The request is answered with `status` and `error`, and the connection closes."""

    def __init__(self, status: int, error: KacheryLabError) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """Sizes of a head, and of the body that it may declare."""

    header_bytes: int
    headers: int
    target: int
    body: int


@dataclass(frozen=True, slots=True)
class Head:
    """A head that passed. `parsed` is what the parser gets."""

    parsed: bytes
    length: int
    chunked: bool
    websocket: bool
    expects_100: bool
    must_close: bool


def check_partial(buffered: bytes | bytearray, seen: int, limits: HeadLimits) -> None:
    """Refuses a head before its end has come, when no end could make it right. The first `seen` bytes passed before."""
    if _NEVER_IN_A_HEAD.search(buffered, max(0, seen - 1)):
        raise Refused(400, InvalidInput(_why(bytes(buffered))))
    line = buffered.find(b"\r\n")
    if (line if line >= 0 else len(buffered)) > limits.target + _REQUEST_LINE_ROOM:
        raise _target_too_long(limits)
    if line >= 0 and len(buffered) - line > limits.header_bytes:
        raise _too_many_header_bytes(limits)


def parse_head(head: bytes, followed: bool, limits: HeadLimits) -> Head:
    """Checks a whole head, its final empty line included. `followed`: further bytes came with it."""
    line = head.index(b"\r\n")
    if line > limits.target + _REQUEST_LINE_ROOM:
        raise _target_too_long(limits)
    if len(head) - line > limits.header_bytes:
        raise _too_many_header_bytes(limits)
    match = _GRAMMAR.fullmatch(head)
    if match is None:
        raise Refused(400, InvalidInput(_why(head)))
    method, target, minor, block = match.groups()
    if len(target) > limits.target:
        raise _target_too_long(limits)
    if block.count(b"\r\n") > limits.headers:
        raise Refused(431, HeadersTooLarge(f"More than {limits.headers} header lines."))
    fields: dict[bytes, list[bytes]] = {}
    for name, value in _FIELDS.findall(block):
        fields.setdefault(name.lower(), []).append(value.strip(b" \t"))
    host = _check_host(fields.get(b"host", []), minor)
    _check_target(method, target, host)
    if len(fields) == 1 and host is not None:
        return Head(head, 0, False, False, False, False)
    return _check_rest(head, method, target, minor, fields, followed, limits)


def _check_rest(
    head: bytes,
    method: bytes,
    target: bytes,
    minor: bytes,
    fields: dict[bytes, list[bytes]],
    followed: bool,
    limits: HeadLimits,
) -> Head:
    for encoding in fields.get(b"content-encoding", []):
        if encoding.lower() not in {b"", b"identity"}:
            hint = "Send the bytes as they are, without Content-Encoding."
            raise Refused(415, UnsupportedMediaType("No Content-Encoding is decoded here.", hint=hint))
    length = _content_length(fields.get(b"content-length", []), limits)
    coding = fields.get(b"transfer-encoding")
    chunked = must_close = False
    if coding is not None:
        if len(coding) != 1 or coding[0].lower() != b"chunked":
            raise Refused(400, InvalidInput("The only Transfer-Encoding here is a single `chunked`."))
        if minor == b"0":
            raise Refused(400, InvalidInput("HTTP/1.0 knows no Transfer-Encoding."))
        if length is None:
            chunked = True
        elif length == 0 and method == b"POST" and target.partition(b"?")[0] == b"/store" and not followed:
            # kachery-client 1.2.0 stores an empty file like this and never sends a chunk. After such a pair nothing on
            # the connection can be trusted to be a request, so it closes.
            head = _FRAMING.sub(b"", head)
            must_close = True
        else:
            raise Refused(400, InvalidInput("Content-Length and Transfer-Encoding exclude each other."))
    websocket = False
    if b"upgrade" in fields:
        tokens = {token.strip().lower() for value in fields.get(b"connection", []) for token in value.split(b",")}
        websocket = b"upgrade" in tokens and [value.lower() for value in fields[b"upgrade"]] == [b"websocket"]
        if not websocket:
            # An upgrade that is not offered here may be ignored; the parser would stop after the head, body or not.
            head = _UPGRADE.sub(b"", head)
        elif method != b"GET" or minor == b"0" or chunked or fields.get(b"content-length", [b"0"]) != [b"0"]:
            raise Refused(400, InvalidInput("A WebSocket starts with a GET of HTTP/1.1 without a body."))
        elif max(map(len, head.split(b"\r\n"))) > _WEBSOCKET_LINE:
            raise Refused(431, HeadersTooLarge(f"A line of a WebSocket handshake is over {_WEBSOCKET_LINE} bytes."))
    expects_100 = any(value.lower() == b"100-continue" for value in fields.get(b"expect", []))
    return Head(head, length or 0, chunked, websocket, expects_100 and (chunked or bool(length)), must_close)


def find_origin(head: bytes) -> bytes | None:
    """The Origin of a request that may be malformed otherwise; only ever compared, never echoed."""
    match = _ORIGIN.search(head)
    return match.group(1) if match else None


def _check_host(hosts: list[bytes], minor: bytes) -> bytes | None:
    if len(hosts) > 1:
        raise Refused(400, InvalidInput("More than one Host header."))
    if not hosts:
        if minor == b"0":
            return None
        raise Refused(400, InvalidInput("A request of HTTP/1.1 needs a Host header."))
    if len(hosts[0]) > 300 or not _HOST.fullmatch(hosts[0]):
        raise Refused(400, InvalidInput("The Host header is no host name."))
    return hosts[0]


def _check_target(method: bytes, target: bytes, host: bytes | None) -> None:
    if method == b"CONNECT":
        raise Refused(400, InvalidInput("This server is no proxy."))
    if target[:1] == b"/":
        return
    scheme, _, rest = target.partition(b"://")
    authority, slash, _ = rest.partition(b"/")
    if scheme.lower() not in {b"http", b"https"} or not slash or host is None or authority.lower() != host.lower():
        raise Refused(400, InvalidInput("The request target is neither a path nor an address of the named Host."))


def _content_length(values: list[bytes], limits: HeadLimits) -> int | None:
    if not values:
        return None
    if len(values) > 1:
        raise Refused(400, InvalidInput("More than one Content-Length header."))
    # bytes.isdigit is ASCII only: neither a sign nor a comma, blank, underscore or digit of another script passes.
    if not values[0].isdigit():
        raise Refused(400, InvalidInput("Content-Length is no decimal number."))
    digits = values[0].lstrip(b"0") or b"0"
    if len(digits) > 20 or int(digits) > limits.body:
        raise Refused(413, TooLarge(f"Content-Length is over the limit of {limits.body} bytes."))
    if len(values[0]) > 40:
        raise Refused(400, InvalidInput("Content-Length is no decimal number."))
    return int(digits)


def _target_too_long(limits: HeadLimits) -> Refused:
    return Refused(414, TooLarge(f"The request target is longer than {limits.target} bytes."))


def _too_many_header_bytes(limits: HeadLimits) -> Refused:
    return Refused(431, HeadersTooLarge(f"The headers are longer than {limits.header_bytes} bytes."))


def _why(head: bytes) -> str:
    """What is wrong with a head that the grammar refused, in words. Quotes nothing that the client sent."""
    line, _, block = head.partition(b"\r\n")
    if re.search(rb"(?<!\r)\n", head):
        return "Lines end with CR LF; a bare LF was found."
    if re.search(rb"\r(?!\n)", head):
        return "Lines end with CR LF; a bare CR was found."
    if re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", head):
        return "A control byte was found in the request head."
    if not re.fullmatch(_TOKEN + rb" [\x21\x22\x24-\x7e]++ HTTP/1\.[01]", line):
        return "The request line is not `METHOD target HTTP/1.1`."
    if re.search(rb"(?:\A|\n)[ \t]", block):
        return "A header is folded over several lines."
    if re.search(rb"(?:\A|\n)" + _TOKEN + rb"[ \t]++:", block):
        return "A header has a blank before its colon."
    return "A header line is not `name: value`."
