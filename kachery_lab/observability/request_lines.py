"""The line that each request leaves. Structlog's chain would cost a tenth of a small request, so JSON lines are made
by hand and those of a few milliseconds are written together."""

from __future__ import annotations

import asyncio
import json
import time
from json.encoder import encode_basestring_ascii
from typing import Any, Protocol

import structlog

from kachery_lab.observability.logging import LineStream, json_stream

HOLD_SECONDS = 0.003
MOST_HELD = 64


class RequestLogger(Protocol):
    """Takes the facts of one answered request."""

    def info(self, event: str, **facts: Any) -> Any: ...


def quoted(text: str) -> str:
    """A JSON string in printable ASCII."""
    return encode_basestring_ascii(text).replace("\x7f", "\\u007f")


class RequestLines:
    """Writes the JSON lines that structlog would, at most HOLD_SECONDS late. A line that is held is written before any
    other, and at the end of the process."""

    def __init__(self, stream: LineStream) -> None:
        self._stream = stream
        self._second = 0
        self._prefix = ""

    def info(self, event: str, **facts: Any) -> None:
        """One line. `facts` are numbers, None, and texts without secrets."""
        parts = [f'"{name}": {_value(value)}' for name, value in facts.items()]
        line = f'{{{", ".join(parts)}, "event": {quoted(event)}, "level": "info", "timestamp": "{self._now()}"}}'
        held = self._stream.hold(line)
        if held == 1:
            try:
                asyncio.get_running_loop().call_later(HOLD_SECONDS, self._stream.flush)
            except RuntimeError:
                self._stream.flush()
        elif held >= MOST_HELD:
            self._stream.flush()

    def _now(self) -> str:
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        if seconds != self._second:
            self._second = seconds
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(seconds))
        return f"{self._prefix}{nanoseconds // 1000:06d}Z"


def _value(value: object) -> str:
    return quoted(value) if type(value) is str else json.dumps(value)


def request_logger() -> RequestLogger:
    """What writes the lines of requests, as `configure` set up the log."""
    stream = json_stream()
    return structlog.get_logger().bind() if stream is None else RequestLines(stream)
