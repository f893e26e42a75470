"""Where a chunked body ends. Pure; judges nothing: the parser refuses what is wrong."""

from __future__ import annotations

_ENOUGH = 64
"""Bytes of a line that are looked at: a size, or that the line is not empty."""


class ChunkScanner:
    """Follows the framing of one body through its pieces. Costs a step for each chunk, whatever the chunks hold."""

    __slots__ = ("_line", "_skip", "_trailers")

    def __init__(self) -> None:
        self._line = b""
        self._skip = 0
        self._trailers = False

    def end(self, data: bytes) -> int:
        """How many bytes of the next piece belong to the body; all of them unless it ends in there."""
        at, size = 0, len(data)
        while at < size:
            if self._skip:
                step = min(self._skip, size - at)
                self._skip -= step
                at += step
                continue
            newline = data.find(b"\n", at)
            stop = size if newline < 0 else newline
            line = (self._line + data[at : min(stop, at + _ENOUGH)])[:_ENOUGH]
            at = stop + 1
            if newline < 0:
                self._line = line
                break
            self._line = b""
            if self._take(line.rstrip(b"\r")):
                return at
        return size

    def _take(self, line: bytes) -> bool:
        """A line between the chunks or behind them; whether it is the body's last."""
        if self._trailers:
            return not line
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            size = 0
        if size > 0:
            self._skip = size + 2
        else:
            self._trailers = True
        return False
