"""Reference for durable stores: create, write, fsync, rename, fsync the directory, in a bare loop.

Each thread has a directory of its own, so that no two wait for one directory's lock.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

DATA = bytes(4096)


def measure(work: Path, threads: int, each: int) -> float:
    """Files per second, `each` of them in every thread."""
    directories = [work / str(number) for number in range(threads)]
    for directory in directories:
        directory.mkdir(parents=True)
    start = threading.Barrier(threads + 1)
    workers = [threading.Thread(target=_work, args=(str(path), each, start)) for path in directories]
    for worker in workers:
        worker.start()
    start.wait()
    begun = time.perf_counter()
    for worker in workers:
        worker.join()
    return threads * each / (time.perf_counter() - begun)


def _work(directory: str, each: int, start: threading.Barrier) -> None:
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    start.wait()
    for number in range(each):
        draft = f"{directory}/{number}.tmp"
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(fd, DATA)
        os.fsync(fd)
        os.close(fd)
        os.rename(draft, f"{directory}/{number}")
        os.fsync(opened)
    os.close(opened)
