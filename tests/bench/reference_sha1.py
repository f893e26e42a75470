"""Reference for storing: SHA-1 over the same bytes in pieces of 1 MiB, one thread, nothing else."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

PIECE = 1 << 20


def measure(path: Path, prefix: bytes) -> tuple[float, str]:
    """(Seconds, SHA-1) of `prefix` and what the file holds behind that many bytes."""
    buffer = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as file:
        begun = time.perf_counter()
        digest = hashlib.sha1(prefix, usedforsecurity=False)
        file.seek(len(prefix))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        return time.perf_counter() - begun, digest.hexdigest()
