"""What the tests of feeds between nodes share: a member's own requests, and what it costs the server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.federations import CHANNEL
from tests.servers import RunningNode

SUBFEED = "5" * 40


def create(node: RunningNode) -> str:
    return str(node.post("/feed/createFeed", {}).json()["feedId"])


def append(node: RunningNode, feed: str, messages: list[Any], **more: Any) -> Any:
    return node.post("/feed/appendMessages", {"feedId": feed, "subfeedHash": SUBFEED, "messages": messages, **more})


def count(node: RunningNode, feed: str) -> int:
    answer = node.post("/feed/getNumLocalMessages", {"feedId": feed, "subfeedHash": SUBFEED})
    return int(answer.json()["numMessages"])


def watch_body(feed: str, position: int, wait_ms: int) -> dict[str, Any]:
    watch = {"feedId": feed, "subfeedHash": SUBFEED, "position": position, "channelName": CHANNEL}
    return {"subfeedWatches": {"w": watch}, "waitMsec": wait_ms, "maxNumMessages": 1000}


def follow_until(node: RunningNode, feed: str, total: int, seconds: float) -> float:
    """Watch at the end until there are so many messages; seconds that it took."""
    begun = time.monotonic()
    while (have := count(node, feed)) < total:
        assert time.monotonic() - begun < seconds, f"{have} of {total}\n{node.log[-3000:]}"
        node.post("/feed/watchForNewMessages", watch_body(feed, have, 500))
    return time.monotonic() - begun


def memory(node: RunningNode) -> int:
    """The greatest number of resident bytes so far."""
    assert node.process is not None
    status = Path(f"/proc/{node.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
