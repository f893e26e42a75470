"""What one caller may have under way at once, so that there is something left for the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kachery_lab.errors import StorageFull, TooManyRequests


@dataclass(slots=True)
class _Held:
    count: int = 0
    bytes: int = 0


class Shares:
    """Counts what is under way, by caller: at most `most` for each. `what` names it in refusals, `setting` says what to
    change. Memory is bounded by what is under way."""

    def __init__(self, most: int, what: str, setting: str) -> None:
        self._most = most
        self._what = what
        self._setting = setting
        self._held: dict[str, _Held] = {}

    @contextmanager
    def take(self, who: str | None, size: int = 0, room: int | None = None) -> Iterator[None]:
        """One more for a caller (None: this server's own work, which is not limited), of `size` bytes.

        Raises TooManyRequests over the limit; StorageFull when all that the caller has under way does not fit into
        `room` bytes.
        """
        if who is None:
            yield
            return
        held = self._held.setdefault(who, _Held())
        try:
            if held.count >= self._most:
                raise TooManyRequests(
                    f"{held.count} {self._what} of {who} are under way, no more are taken at once",
                    retry_after=1,
                    hint=f"Wait until some are done; {self._setting} sets the number",
                )
            if room is not None and held.bytes + size > room:
                raise StorageFull(
                    f"{size} bytes do not fit on the storage beside what {who} is uploading", hint="Try again later"
                )
            held.count += 1
            held.bytes += size
            try:
                yield
            finally:
                held.count -= 1
                held.bytes -= size
        finally:
            if not held.count:
                self._held.pop(who, None)
