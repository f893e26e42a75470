"""Bounds on how much somebody may do in a second, in constant memory. `now` is always a monotonic clock's."""

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
        """0: go ahead, it is counted. Else the seconds until it may be tried again."""
        left, since = self._buckets.pop(name, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        allowed = left >= 1.0
        self._buckets[name] = (left - 1.0 if allowed else left, now)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1.0 - left) / self._per_second


class Allowance:
    """`burst` units at once, then `per_second`. Nothing is refused: who takes more than is left waits."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._left = burst
        self._since: float | None = None

    def take(self, amount: float, now: float) -> float:
        """Use up `amount`, which may be more than is left; the seconds to wait before more is taken."""
        gained = 0.0 if self._since is None else (now - self._since) * self._per_second
        self._left = min(self._burst, self._left + gained) - amount
        self._since = now
        return max(0.0, -self._left / self._per_second)
