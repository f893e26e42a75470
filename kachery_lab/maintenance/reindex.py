"""Make the index agree with the volume, which is the truth.

Feeds and mutables are rebuilt from their logs when the node opens; this walks the blobs and the link records.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kachery_lab.blobs.layout import is_blob_name
from kachery_lab.core.ids import Sha1
from kachery_lab.errors import KacheryLabError, LinkChanged, NotFound, Quarantined

if TYPE_CHECKING:
    from kachery_lab.node import Node

AT_ONCE = 4


@dataclass(slots=True)
class Report:
    """What was found. Rows and files are counts; a `failed` one could not be read now and is left as it is."""

    blobs: int = 0
    links: int = 0
    indexed: int = 0
    quarantined: int = 0
    links_unusable: int = 0
    rows_removed: int = 0
    failed: int = 0
    feeds: int = 0
    messages: int = 0
    mutables: int = 0
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """As a plain object."""
        return asdict(self)


async def reindex(node: Node, dry_run: bool = False) -> Report:
    """Verify and index every file without a row, and remove rows without a file. Wrong bytes go to the quarantine.

    What only the database knows of a blob (who stored it, when) is kept. Running it again finds nothing to do.
    Raises Unavailable when the volume cannot be listed; no row is removed then.
    """
    report = Report(dry_run=dry_run)
    store = node.store
    seen_shards: set[str] = set()
    cursor = ""
    while names := await store.disk.run_long(store.walk, cursor):
        cursor = names[0][:2]
        seen_shards.add(cursor)
        await _shard(node, report, names, cursor, dry_run)
    for shard in (f"{number:02x}" for number in range(256)):
        if shard not in seen_shards:
            await _shard(node, report, [], shard, dry_run)
    report.feeds, report.messages, report.mutables = await node.index_counts()
    return report


async def _shard(node: Node, report: Report, names: list[str], shard: str, dry_run: bool) -> None:
    """One `aa` directory: at most a 256th of all blobs is in memory."""
    rows = await node.blobs.rows_of_shard(shard)
    link_rows = await node.links.rows_of_shard(shard)
    found_blobs = {name for name in names if is_blob_name(name)}
    found_links = {name.removesuffix(".link") for name in names if name.endswith(".link")}
    report.blobs += len(found_blobs)
    report.links += len(found_links)
    gate = asyncio.Semaphore(AT_ONCE)
    async with asyncio.TaskGroup() as tasks:
        for name in sorted(found_blobs):
            tasks.create_task(_blob(node, report, gate, name, rows.get(name), dry_run))
        for name in sorted(found_links - found_blobs - set(link_rows)):
            tasks.create_task(_link(node, report, gate, name, dry_run))
    # A blob may have been stored since the shard was listed: look again before a row goes.
    gone = [name for name in rows if name not in found_blobs and await node.store.stat(Sha1(name)) is None]
    gone_links = [name for name in link_rows if name not in found_links]
    report.rows_removed += len(gone) + len(gone_links)
    if not dry_run and (gone or gone_links):
        await node.blobs.forget_rows(gone, gone_links)


async def _blob(
    node: Node, report: Report, gate: asyncio.Semaphore, name: str, size: int | None, dry_run: bool
) -> None:
    async with gate:
        try:
            stat = await node.store.stat(Sha1(name))
            if stat is None or stat.size == size:
                return
            if not dry_run:
                await node.blobs.verify(Sha1(name))
            report.indexed += 1
        except Quarantined:
            report.quarantined += 1
        except KacheryLabError:
            report.failed += 1


async def _link(node: Node, report: Report, gate: asyncio.Semaphore, name: str, dry_run: bool) -> None:
    async with gate:
        try:
            if not dry_run:
                (await node.blobs.open(Sha1(name))).close()
            report.indexed += 1
        except (LinkChanged, NotFound):
            report.links_unusable += 1
        except KacheryLabError:
            report.failed += 1
