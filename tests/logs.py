"""The log of this process in a file, for a test that reads it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from kachery_lab.observability import logging as product


@contextmanager
def own_logging() -> Iterator[None]:
    """Puts back the configuration of structlog and of standard logging."""
    root = logging.getLogger()
    handlers, level, streams = root.handlers[:], root.level, product._JSON_STREAM[:]
    try:
        yield
    finally:
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
        # A stream that stays would write to a descriptor that is closed, and later another file's.
        product._JSON_STREAM[:] = streams
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """JSON lines of level info go to `path`, complete at the end. A server's request lines go where the log was when
    it answered its first request."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        with own_logging():
            stream = product.configure("json", "info", descriptor=descriptor)
            yield
            stream.flush()
    finally:
        os.close(descriptor)
