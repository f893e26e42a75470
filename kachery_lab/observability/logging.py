"""Logs: one line per event on standard output, without secrets, bounded, and never the reason why a request fails.

    structlog / logging -> redact -> printable -> JSON or console -> LineStream

`configure` is called once by whoever starts the process; until then structlog prints as it always does.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from typing import Any, Literal, Protocol

import structlog

REDACTED = "[redacted]"

_SECRET_KEYS = frozenset(
    (
        "authorization",
        "proxy-authorization",
        "kachery-client-auth-code",
        "client_auth_code",
        "auth_code",
        "cookie",
        "set-cookie",
        "token",
        "access_token",
        "admin_token",
        "password",
        "passcode",
        "secret",
        "private_key",
        "signature",
        "capability",
        "ticket",
        "api_key",
        "apikey",
    )
)
_SECRET_TEXT = re.compile(
    r"klk_[A-Za-z0-9]+"
    r"|(?P<name>kachery-client-auth-code['\"]?\s*[:=,]\s*(?:b?['\"])?"
    r"|authorization['\"]?\s*[:=,]\s*(?:b?['\"])?(?:bearer |basic )?"
    r"|\bbearer "
    r"|[?&](?:[a-z_-]*signature|sig|[a-z_]*token|ticket|key|api_?key|code|auth|password|passcode|secret|x-amz-[a-z-]+)=)"
    r"[^\s&#'\",;]+",
    re.IGNORECASE,
)
# Addresses carry capabilities, tickets and page tokens as path segments (architecture: addresses).
# A ticket is the last segment: what an encoded slash cuts off is its rest.
_SECRET_PATH = re.compile(r"(/bucket/upload/)[^\s?#]+|(/bucket/~|/p/)[^/\s?#]+", re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")


def redact_text(text: str) -> str:
    """`text` without tokens, codes, signatures and capabilities."""
    lower = text.lower()
    # Every alternative of the pattern holds one of these; most texts hold none and cost no search.
    if "klk_" in lower or "=" in lower or "auth" in lower or "bearer " in lower:
        text = _SECRET_TEXT.sub(lambda found: (found.group("name") or "") + REDACTED, text)
    if "/bucket/" in lower or "/p/" in lower:
        text = _SECRET_PATH.sub(lambda found: (found.group(1) or found.group(2)) + REDACTED, text)
    return text


def _clean(value: object, change: Callable[[str], str], depth: int = 0) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, bytes):
        return change(value.decode("utf-8", "backslashreplace"))
    if depth < 4:
        if isinstance(value, dict):
            return {
                change(str(key)): REDACTED if str(key).lower() in _SECRET_KEYS else _clean(inner, change, depth + 1)
                for key, inner in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [_clean(inner, change, depth + 1) for inner in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return change(str(value))


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Processor: removes secrets, by the name of the field and by the look of the text."""
    for key, value in event.items():
        if key.lower() in _SECRET_KEYS:
            event[key] = REDACTED
        elif type(value) is str:
            event[key] = redact_text(value)
        elif not isinstance(value, int | float):
            event[key] = _clean(value, redact_text)
    return event


_ENCODER = json.JSONEncoder(ensure_ascii=True, default=str)


def _as_json(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    # ASCII only, so no control or bidi character of a client is written raw. DEL is the one that JSON leaves alone.
    return _ENCODER.encode(event).replace("\x7f", "\\u007f")


def _escape(text: str) -> str:
    def one(found: re.Match[str]) -> str:
        point = ord(found.group())
        return "\n" if point == 10 else f"\\x{point:02x}" if point < 256 else f"\\u{point:04x}"

    return _UNPRINTABLE.sub(one, text)


def printable(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Processor for the console: no control, escape or bidi character reaches a terminal; one line per event.

    Only a traceback keeps its line ends.
    """
    for key, value in event.items():
        cleaned = _clean(value, _escape)
        event[key] = cleaned.replace("\n", "\\n") if isinstance(cleaned, str) and key != "exception" else cleaned
    return event


class LineStream:
    """Writes lines to a descriptor and never raises and never waits.

    Closed, full, broken or blocked: lines are dropped and counted, and the count is written when writing works again.
    """

    PIECE = 4096  # what a pipe that is reported writable takes without blocking (PIPE_BUF)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.dropped = 0
        self._torn = False
        self._held: list[str] = []
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def write_line(self, line: str) -> None:
        """Writes `line` and a line end, behind the lines that are held."""
        with self._lock:
            self._held.append(line)
            self._release()

    def hold(self, line: str) -> int:
        """Keeps `line` until something is written or `flush` is called; how many are held now."""
        with self._lock:
            self._held.append(line)
            return len(self._held)

    def flush(self) -> None:
        """Writes the lines that are held."""
        with self._lock:
            if self._held:
                self._release()

    def _release(self) -> None:
        lines, self._held = self._held, []
        if self.dropped:
            note = b'{"event":"log_lines_dropped","count":%d}\n' % self.dropped
            if not self._write(b"\n" + note if self._torn else note):
                self.dropped += len(lines)
                return
            self.dropped = 0
            self._torn = False
        lines.append("")
        if not self._write("\n".join(lines).encode("utf-8", "backslashreplace")):
            self.dropped += len(lines) - 1

    def _write(self, data: bytes) -> bool:
        view = memoryview(data)
        try:
            while view:
                if not any(state & select.POLLOUT for _, state in self._poll.poll(0)):
                    return False
                view = view[os.write(self.descriptor, view[: self.PIECE]) :]
        except (OSError, ValueError):
            return False
        finally:
            if view and len(view) < len(data):
                self._torn = True
        return True


class _Logger:
    """What structlog writes rendered lines to."""

    def __init__(self, stream: LineStream) -> None:
        self.msg = stream.write_line
        self.debug = self.info = self.warning = self.error = self.critical = self.exception = self.msg
        self.log = self.warn = self.fatal = self.failure = self.err = self.msg


class _Handler(logging.Handler):
    """Standard logging (uvicorn, alembic, ...) into the same lines."""

    def __init__(self, stream: LineStream) -> None:
        super().__init__()
        self.stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.stream.write_line(self.format(record))
        except Exception:  # noqa: S110 - a log line that cannot be made must not break what it tells about
            pass


_JSON_STREAM: list[LineStream] = []


def json_stream() -> LineStream | None:
    """Where lines of level info go that are JSON already; None when `configure` chose another format or level."""
    return _JSON_STREAM[0] if _JSON_STREAM else None


def configure(
    fmt: Literal["json", "console"] = "json", level: str = "info", *, descriptor: int | None = None
) -> LineStream:
    """Configures structlog and standard logging for this process; may be called again. Returns the stream in use."""
    if descriptor is None:
        try:
            descriptor = sys.stdout.fileno()
        except (AttributeError, OSError, ValueError):
            descriptor = 1
    stream = LineStream(descriptor)
    atexit.register(stream.flush)
    number = logging.getLevelNamesMapping()[level.upper()]
    _JSON_STREAM[:] = [stream] if fmt == "json" and number <= logging.INFO else []
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if fmt == "json":
        last: list[Any] = [
            structlog.processors.format_exc_info,
            redact,
            _as_json,
        ]
    else:
        last = [
            structlog.processors.format_exc_info,
            redact,
            printable,
            structlog.dev.ConsoleRenderer(colors=False, sort_keys=False),
        ]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_args: _Logger(stream),
        cache_logger_on_first_use=False,
    )
    handler = _Handler(stream)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler.setFormatter(formatter)
    root = logging.getLogger()
    # What these tell of their ordinary work is of no use to an admin.
    for name in ("alembic", "httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(max(number, logging.WARNING))
    for old in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(number, logging.INFO))
    return stream


class LogSink(Protocol):
    """Anything that takes an event and its fields."""

    def __call__(self, event: str, **fields: Any) -> Any: ...


def _warn(event: str, **fields: Any) -> None:
    structlog.get_logger().warning(event, **fields)


class RateLimited:
    """At most `most` lines per `seconds` and kind of event; then one line that says how many were left out.

    `kind` must be a constant of the program, never text of a client: each one is remembered.
    """

    def __init__(
        self,
        most: int = 20,
        seconds: float = 10.0,
        *,
        sink: LogSink = _warn,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most = most
        self.seconds = seconds
        self._sink = sink
        self._clock = clock
        self._kinds: dict[str, list[float]] = {}  # kind -> [end of its window, lines in it]

    def note(self, kind: str, /, **fields: Any) -> None:
        """Logs `kind`, or counts it."""
        if self.allows(kind):
            self._write(kind, fields)

    def allows(self, kind: str) -> bool:
        """True while another line of this kind may be written; counts it either way."""
        now = self._clock()
        window = self._kinds.get(kind)
        if window is None or now >= window[0]:
            if window is not None:
                self._summary(kind, window)
            window = self._kinds[kind] = [now + self.seconds, 0]
        window[1] += 1
        return window[1] <= self.most

    def flush(self) -> None:
        """Writes the summary of every window that is over."""
        if self._kinds:
            now = self._clock()
            for kind in [kind for kind, window in self._kinds.items() if now >= window[0]]:
                self._summary(kind, self._kinds.pop(kind))

    def _summary(self, kind: str, window: list[float]) -> None:
        if window[1] > self.most:
            self._write("lines_left_out", {"kind": kind, "count": int(window[1]) - self.most, "seconds": self.seconds})

    def _write(self, event: str, fields: dict[str, Any]) -> None:
        try:
            self._sink(event, **fields)
        except Exception:  # noqa: S110 - see _Handler.emit
            pass


bad_requests = RateLimited()
"""For requests that are refused: 10,000 of them make tens of lines, not 10,000."""
