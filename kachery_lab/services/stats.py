"""Counters since start that the daemon API reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Stats:
    """Bytes to and from buckets, and messages published on bands, since the process started."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
