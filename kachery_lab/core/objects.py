"""Paths of objects in a channel's bucket: the four forms of spec/hub-api.md section 5, and `<n>-<m>`, messages n to m
(exclusive) of a subfeed, which only nodes of this kind ask for and upload."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kachery_lab.core.ids import FeedId, Sha1, SubfeedHash
from kachery_lab.core.roles import Role
from kachery_lab.errors import InvalidInput

Kind = Literal["file", "message", "messages", "subfeed", "task"]

_SHARD = r"([0-9a-f]{2})/([0-9a-f]{2})/([0-9a-f]{2})"
_FILE = re.compile(rf"(sha1|task_results)/{_SHARD}/([0-9a-f]{{40}})", re.ASCII)
_FEED = re.compile(
    rf"feeds/{_SHARD}/([0-9a-f]{{64}})/subfeeds/{_SHARD}/([0-9a-f]{{40}})/"
    r"(subfeed\.json|(?:0|[1-9][0-9]{0,14})(?:-[1-9][0-9]{0,14})?)",
    re.ASCII,
)
_PROVIDE = {
    "file": Role.PROVIDE_FILES,
    "message": Role.PROVIDE_FEEDS,
    "messages": Role.PROVIDE_FEEDS,
    "subfeed": Role.PROVIDE_FEEDS,
    "task": Role.PROVIDE_TASKS,
}
_REQUEST = {
    "file": Role.REQUEST_FILES,
    "message": Role.REQUEST_FEEDS,
    "messages": Role.REQUEST_FEEDS,
    "subfeed": Role.REQUEST_FEEDS,
    "task": Role.REQUEST_TASKS,
}


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """A well-formed path below a channel. `sha1`: of a file, or the hash of a task; the others belong to feeds, `end`
    to a range of messages that begins at `position`."""

    text: str
    kind: Kind
    sha1: Sha1 | None = None
    feed_id: FeedId | None = None
    subfeed_hash: SubfeedHash | None = None
    position: int | None = None
    end: int | None = None

    @property
    def provide(self) -> Role:
        """The role that writing it needs."""
        return _PROVIDE[self.kind]

    @property
    def immutable(self) -> bool:
        """Whether an object at this path never changes once it is there."""
        return self.kind in ("file", "message")

    @property
    def request(self) -> Role:
        """The role that reading it needs."""
        return _REQUEST[self.kind]

    @classmethod
    def parse(cls, text: str, where: str = "path") -> ObjectPath:
        """Raises InvalidInput for every other form, wrong shards included."""
        match = _FILE.fullmatch(text)
        if match is not None:
            folder, aa, bb, cc, name = match.groups()
            if name.startswith(aa + bb + cc):
                return cls(text, "file" if folder == "sha1" else "task", sha1=Sha1(name))
        match = _FEED.fullmatch(text)
        if match is not None:
            aa, bb, cc, feed_id, dd, ee, ff, subfeed, last = match.groups()
            if feed_id.startswith(aa + bb + cc) and subfeed.startswith(dd + ee + ff):
                place = {"feed_id": FeedId(feed_id), "subfeed_hash": SubfeedHash(subfeed)}
                if last == "subfeed.json":
                    return cls(text, "subfeed", **place)  # type: ignore[arg-type]
                first, dash, end = last.partition("-")
                if not dash:
                    return cls(text, "message", position=int(first), **place)  # type: ignore[arg-type]
                if int(first) < int(end):
                    return cls(text, "messages", position=int(first), end=int(end), **place)  # type: ignore[arg-type]
        raise InvalidInput(
            f"{where}: expected sha1/aa/bb/cc/<sha1>, task_results/aa/bb/cc/<hash>, or a feed's message or subfeed.json"
        )


def file_path(sha1: Sha1) -> str:
    """The path of a file."""
    return f"sha1/{sha1[:2]}/{sha1[2:4]}/{sha1[4:6]}/{sha1}"


def subfeed_folder(feed_id: FeedId, subfeed_hash: SubfeedHash) -> str:
    """The path below which everything of a subfeed lies."""
    feed, subfeed = (f"{name[:2]}/{name[2:4]}/{name[4:6]}/{name}" for name in (feed_id, subfeed_hash))
    return f"feeds/{feed}/subfeeds/{subfeed}"
