"""Files of older kachery directories, which a zone offers on demand without copying them.

Asked for a file, the server looks for it in the zone's directories, hashes it, and refers to it in the zone; from then
on it is read as any other, and hashed again when its fingerprint has changed. The zone's owner decides: this server's
own node needs provideFiles there, and what was deleted in the zone stays absent.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import structlog
from sqlalchemy import select
from sqlalchemy.dialects.sqlite import insert

from kachery_lab.blobs.disk import Disk
from kachery_lab.blobs.files import Fingerprint, OpenFile
from kachery_lab.blobs.links import LinkPolicy
from kachery_lab.blobs.resource_dirs import Candidate, candidates, hash_counting
from kachery_lab.core.ids import NodeId, Sha1
from kachery_lab.core.objects import ObjectPath, file_path
from kachery_lab.core.roles import Role
from kachery_lab.db.engine import Database
from kachery_lab.db.models import resource_files
from kachery_lab.errors import Forbidden, KacheryLabError, LinkChanged, NotFound, Quarantined
from kachery_lab.services.blobs import BlobService
from kachery_lab.services.buckets import BucketService
from kachery_lab.services.origins import OriginService
from kachery_lab.services.subjects import RoleService, Subject

AT_ONCE = 2
"""Files that are hashed at the same time."""
MOST_WAITING = 100
"""Files that may wait for that; who asks for another one is told `queued` and asks again."""
MOST_CANDIDATES = 8
MISS_SECONDS = 10.0
_MISSES = 10_000

State = Literal["not-found", "queued", "running", "completed", "error"]

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Progress:
    """How far a file is. Sizes in bytes, None while unknown."""

    state: State
    size: int | None = None
    done: int | None = None
    error: str | None = None


class ResourceService:
    """The resource directories of all zones."""

    def __init__(
        self,
        directories: Mapping[str, list[Path]],
        policy: LinkPolicy,
        disk: Disk,
        database: Database,
        roles: RoleService,
        blobs: BlobService,
        buckets: BucketService,
        origins: OriginService,
        own_node: NodeId,
    ) -> None:
        self._directories = directories
        self._policy = policy
        self._disk = disk
        self._database = database
        self._roles = roles
        self._blobs = blobs
        self._buckets = buckets
        self._origins = origins
        self._own = Subject("node", own_node)
        self._jobs: dict[tuple[str, str], tuple[asyncio.Task[None], Progress]] = {}
        self._misses: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._turn = asyncio.Semaphore(AT_ONCE)

    @property
    def channels(self) -> list[str]:
        """The zones that have resource directories."""
        return list(self._directories)

    async def brings(self, channel: str, sha1: Sha1, wait: float) -> bool:
        """Whether `request` completes within `wait` seconds. A file that was just not there is not looked for again for
        MISS_SECONDS: whoever reads by hash does not wait for a person who is about to link it."""
        if not self.offers(channel):
            return False
        now = time.monotonic()
        if now - self._misses.get((channel, sha1), -MISS_SECONDS) < MISS_SECONDS:
            return False
        progress = await self.request(channel, sha1, wait)
        if progress.state == "not-found":
            self._misses[channel, sha1] = now
            if len(self._misses) > _MISSES:
                self._misses.popitem(last=False)
        return progress.state == "completed"

    def offers(self, channel: str) -> bool:
        """Whether a zone has a resource directory at all."""
        return channel in self._directories

    async def request(self, channel: str, sha1: Sha1, wait: float) -> Progress:
        """Make a file of a zone's directories readable there. Waits at most `wait` seconds; the work goes on, and
        asking again tells how far it is. No rights of the caller are checked. Raises Unavailable."""
        running = self._jobs.get((channel, sha1))
        if running is None:
            try:
                known = await self._known(channel, sha1)
            except Forbidden as error:
                return Progress("error", error=f"{error.message}; {error.hint}")
            if known is not None:
                return known
            running = self._jobs.get((channel, sha1)) or self._begin(channel, sha1)
        if running is None:
            return Progress("queued")
        task, progress = running
        await asyncio.wait({task}, timeout=max(wait, 0.0))
        return progress

    async def _known(self, channel: str, sha1: Sha1) -> Progress | None:
        """What is known without looking at any directory."""
        path = ObjectPath.parse(file_path(sha1))
        if await self._buckets.find(channel, path.text) is not None:
            try:
                return Progress("completed", await self._blobs.stat(sha1))
            except (NotFound, LinkChanged, Quarantined):
                pass
        if not self.offers(channel) or await self._buckets.is_deleted(channel, path.text):
            return Progress("not-found")
        self._roles.require(self._own, channel, Role.PROVIDE_FILES)
        return None

    def _begin(self, channel: str, sha1: Sha1) -> tuple[asyncio.Task[None], Progress] | None:
        if len(self._jobs) >= AT_ONCE + MOST_WAITING:
            return None
        progress = Progress("queued")
        task = asyncio.create_task(self._work(channel, sha1, progress))
        self._jobs[channel, sha1] = task, progress
        task.add_done_callback(lambda _: self._jobs.pop((channel, sha1)))
        return task, progress

    async def _work(self, channel: str, sha1: Sha1, progress: Progress) -> None:
        try:
            async with self._turn:
                progress.state = "running"
                file = await self._verified(channel, sha1, progress)
            if file is None:
                progress.state = "not-found"
                return
            size = file.fingerprint.size
            file.close()
            here = await self._blobs.store_on_volume.stat(sha1) is not None
            await self._origins.arriving(sha1, f"{self._own.name}/{channel}", here=here)
            await self._buckets.refer(channel, ObjectPath.parse(file_path(sha1)), sha1, size, self._own)
            progress.size = progress.done = size
            progress.state = "completed"
        except KacheryLabError as error:
            log.warning("a file of a resource directory cannot be offered", channel=channel, reason=error.message)
            progress.error, progress.state = error.message, "error"
        except Exception:
            log.exception("a file of a resource directory cannot be offered", channel=channel)
            progress.error, progress.state = "the server failed; its log says how", "error"

    async def open(self, sha1: Sha1) -> OpenFile | None:
        """The verified file of a blob that some zone's directories were found to have; None when there is none any
        more. One whose fingerprint has changed is hashed first. The caller closes it. Raises Unavailable."""
        if not self._directories:
            return None
        statement = select(resource_files.c.channel).where(resource_files.c.sha1 == sha1).distinct()
        for channel in await self._database.read(lambda conn: conn.execute(statement).scalars().all()):
            file = await self._known_file(channel, sha1)
            if file is None:
                async with self._turn:
                    file = await self._verified(channel, sha1, Progress("running"))
            if file is not None:
                return file
        return None

    async def _known_file(self, channel: str, sha1: Sha1) -> OpenFile | None:
        """The first candidate, if it is the one that was hashed before: the common case takes no turn."""
        found = await self._disk.run(self._candidates, channel, sha1, 1)
        for path, file in found:
            row = await self._row(channel, path)
            if row is not None and row.sha1 == sha1 and _fits(row, file):
                return file
            file.close()
        return None

    async def _verified(self, channel: str, sha1: Sha1, progress: Progress) -> OpenFile | None:
        """The first candidate whose content has this hash. What was hashed before and has not changed is not hashed
        again, whatever its hash was."""
        result = None
        for path, file in await self._disk.run(self._candidates, channel, sha1, MOST_CANDIDATES):
            if result is None and await self._is(channel, path, file, sha1, progress):
                result = file
            else:
                file.close()
        return result

    def _candidates(self, channel: str, sha1: Sha1, most: int) -> list[Candidate]:
        found = []
        for candidate in candidates(self._policy, self._directories.get(channel, []), sha1):
            found.append(candidate)
            if len(found) == most:
                break
        return found

    async def _is(self, channel: str, path: str, file: OpenFile, sha1: Sha1, progress: Progress) -> bool:
        row = await self._row(channel, path)
        if row is not None and _fits(row, file):
            return bool(row.sha1 == sha1)
        progress.size, progress.done = file.fingerprint.size, 0

        def count(size: int) -> None:
            progress.done = (progress.done or 0) + size

        found, sha256 = await self._disk.run_long(hash_counting, file, count)
        if not await self._disk.run(file.unchanged):
            log.warning("a file of a resource directory changed while it was hashed", channel=channel)
            return False
        if row is not None and row.sha1 == found == sha1 and row.sha256 != sha256:
            log.warning("a file of a resource directory has other bytes with the same SHA-1 now", channel=channel)
            return False
        await self._remember(channel, path, file, found, sha256)
        if found != sha1:
            log.warning("a file of a resource directory has other content than its name says", channel=channel)
        return found == sha1

    async def _row(self, channel: str, path: str) -> Any:
        statement = select(resource_files).where(
            resource_files.c.channel == channel, resource_files.c.path == _text(path)
        )
        return await self._database.read(lambda conn: conn.execute(statement).one_or_none())

    async def _remember(self, channel: str, path: str, file: OpenFile, sha1: Sha1, sha256: str) -> None:
        mark = file.fingerprint
        row = {
            "sha1": sha1,
            "sha256": sha256,
            "size": mark.size,
            "mtime_ns": mark.mtime_ns,
            "ctime_ns": mark.ctime_ns,
            "inode": mark.inode,
            "device": file.stat.st_dev,
            "hashed_at": int(time.time() * 1000),
        }
        statement = insert(resource_files).values(channel=channel, path=_text(path), **row)
        keys = [resource_files.c.channel, resource_files.c.path]
        statement = statement.on_conflict_do_update(index_elements=keys, set_=row)
        await self._database.write(lambda conn: conn.execute(statement).rowcount)

    async def close(self) -> None:
        """End the work; a file that is being hashed is left to its thread."""
        tasks = [task for task, _ in self._jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _fits(row: Any, file: OpenFile) -> bool:
    known = Fingerprint(row.size, row.mtime_ns, row.ctime_ns, row.inode)
    return known == file.fingerprint and row.device == file.stat.st_dev


def _text(path: str) -> str:
    """A path as the database can hold it: file names are bytes, which need not be UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
