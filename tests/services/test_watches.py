"""Waiting for messages: however many one message wakes, few of them look for it at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import pytest
from sqlalchemy import Connection

from kachery_lab.core.ids import SubfeedHash
from kachery_lab.db.engine import Database
from kachery_lab.node import Node
from kachery_lab.services import watches
from kachery_lab.services.watches import WOKEN_AT_ONCE, Span, Watch, WatchService
from tests.services.opened import run_on

T = TypeVar("T")

SUBFEED = SubfeedHash("ab" * 20)
WAITING = 3 * WOKEN_AT_ONCE


class Counted:
    """A database's reads, and how many of them there were at once."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.reads = self.most = self.done = 0

    async def read(self, fn: Callable[[Connection], T]) -> T:
        self.reads += 1
        self.most = max(self.most, self.reads)
        try:
            return await self._database.read(fn)
        finally:
            self.reads -= 1
            self.done += 1


async def woken_at_once(node: Node) -> int:
    """How many look at once when a message wakes all that wait for it; each of them gets it."""
    counted = Counted(node.database)
    service = WatchService(cast(Database, counted), node.events)
    feed_id = await node.feeds.create(None)
    watch = Watch(feed_id, SUBFEED, 0)
    waiting = [asyncio.create_task(service.watch({"w": watch}, wait_ms=600_000)) for _ in range(WAITING)]
    async with asyncio.timeout(60):
        while counted.done < WAITING:
            await asyncio.sleep(0.01)
        counted.most = 0
        await node.feeds.append(feed_id, SUBFEED, [{"text": "now"}])
        found = await asyncio.gather(*waiting)
    assert found == [({"w": Span(watch, 0, 1)}, True)] * WAITING
    return counted.most


def test_few_look_at_once(tmp_path: Path) -> None:
    assert run_on(tmp_path, woken_at_once) == WOKEN_AT_ONCE


def test_control_all_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watches, "WOKEN_AT_ONCE", 10 * WAITING)
    assert run_on(tmp_path, woken_at_once) > WOKEN_AT_ONCE
