"""A bounded pool of threads for calls of microseconds: what ThreadPoolExecutor keeps for each call costs more than one
of these takes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class Threads(Executor):
    """At most `most` threads; another one begins only when none is idle. They end with the process at the latest: one
    that hangs on the volume must not keep it."""

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = self._idle = 0
        self._closed = False

    def begin(self, call: Callable[..., object], *arguments: Any) -> None:
        """Run a call that raises nothing. Raises RuntimeError after `shutdown`."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the threads have ended")
            self._calls.put((call, arguments))
            if self._idle:
                self._idle -= 1
            elif self._started < self._most:
                self._started += 1
                threading.Thread(target=self._work, name=f"{self._name}_{self._started}", daemon=True).start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """For libraries that take an executor."""
        future: Future[Any] = Future()
        self.begin(_fill, future, fn, args, kwargs)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end after what they do now and, unless `cancel_futures`, what waits. Never waits itself."""
        with self._lock:
            self._closed = True
            while cancel_futures and not self._calls.empty():
                self._calls.get()
            for _ in range(self._started):
                self._calls.put(None)

    def _work(self) -> None:
        while (given := self._calls.get()) is not None:
            call, arguments = given
            call(*arguments)
            # What a waiting thread still holds, as an open file, would live until its next call.
            del given, call, arguments
            with self._lock:
                self._idle += 1


def _fill(future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        value = fn(*args, **kwargs)
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(value)
