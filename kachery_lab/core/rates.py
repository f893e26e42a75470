"""A bound on how often somebody may do something, in constant memory."""

from __future__ import annotations

from collections import OrderedDict


class Rates:
    """Token buckets by name: `burst` at once, then `per_second`. Names beyond `most` push out the one idle longest."""

    def __init__(self, per_second: float, burst: int, most: int = 10_000) -> None:
        self._per_second = per_second
        self._burst = float(burst)
        self._most = most
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, name: str, now: float) -> float:
        """0: go ahead, it is counted. Else the seconds until it may be tried again. `now`: a monotonic clock's."""
        left, since = self._buckets.pop(name, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        allowed = left >= 1.0
        self._buckets[name] = (left - 1.0 if allowed else left, now)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self._per_second
