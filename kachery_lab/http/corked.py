"""A transport that sends the head of an answer together with the body behind it: one system call, one segment."""

from __future__ import annotations

import asyncio
from typing import Any

_JOINED = 64 * 1024
"""Below this many bytes a body is copied behind its head; a greater one is sent as it is, and never held back."""


class CorkedTransport(asyncio.Transport):
    """Holds back a small write until the next one, the end of the connection, or the next turn of the event loop.

    uvloop sends each write at once, and an answer is two: head and body. What is held is not counted by
    `get_write_buffer_size`, and `abort` drops it. `plain` is the transport itself.
    """

    def __init__(self, plain: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.plain = plain
        self._loop = loop
        self._held: bytes | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        held, self._held = self._held, None
        if len(data) >= _JOINED:
            self.plain.writelines((data,) if held is None else (held, data))
        elif held is not None:
            self.plain.write(held + data)
        else:
            self._held = bytes(data)
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self.plain.write(held)

    def write_eof(self) -> None:
        self._flush()
        self.plain.write_eof()

    def close(self) -> None:
        self._flush()
        self.plain.close()

    def abort(self) -> None:
        self._held = None
        self.plain.abort()

    def is_closing(self) -> bool:
        return self.plain.is_closing()

    def can_write_eof(self) -> bool:
        return self.plain.can_write_eof()

    def pause_reading(self) -> None:
        self.plain.pause_reading()

    def resume_reading(self) -> None:
        self.plain.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self.plain.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.plain.get_extra_info(name, default)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.plain.get_protocol()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.plain.set_protocol(protocol)
