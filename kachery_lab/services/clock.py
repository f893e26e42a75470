"""Whether the time of day can be believed."""

from __future__ import annotations

import time

TOLERANCE = 60.0
STEADY_SECONDS = 3600.0
"""What is kept for a stated time goes only when the clock has run evenly for as long as this."""


class SteadyClock:
    """Compares the time of day with the clock that nobody sets. A clock that was set wrong, or is being set right, must
    not make things look older than they are: what has gone by mistake does not come back."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()
        self._since = time.monotonic()

    def look(self) -> None:
        """Notice a jump. To be called often: one there and back in between is not seen."""
        offset = time.time() - time.monotonic()
        if abs(offset - self._offset) > TOLERANCE:
            self._offset, self._since = offset, time.monotonic()

    @property
    def steady(self) -> bool:
        """Whether there was no jump, nor a start, within STEADY_SECONDS."""
        self.look()
        return time.monotonic() - self._since >= STEADY_SECONDS
