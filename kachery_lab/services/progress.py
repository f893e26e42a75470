"""How far a load has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Progress:
    """Bytes that have arrived, and how many there will be; 0 until that is known."""

    loaded: int = 0
    total: int = 0

    def start(self, total: int) -> None:
        """The size of what is being loaded."""
        self.total = total

    def add(self, count: int) -> None:
        """So many bytes more."""
        self.loaded += count
