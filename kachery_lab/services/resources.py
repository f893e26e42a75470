"""Files that a zone offers on demand: those of older kachery directories, and those that a provider uploads.

Asked for a file, the server looks for it in the zone's directories, hashes it, and refers to it in the zone without
copying it; from then on it is read as any other, and hashed again when its fingerprint has changed. What is in no
directory is asked of the zone's provider, if one is connected. The zone's owner decides: this server's own node needs
provideFiles there, as does whoever provides, and what was deleted in the zone stays absent.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from kachery_lab.services.resource_providers import ResourceProviders, State
from kachery_lab.services.subjects import RoleService, Subject

AT_ONCE = 2
"""Files that are hashed at the same time."""
MOST_WAITING = 100
"""Files that may wait for that; who asks for another one is told `queued` and asks again."""
MOST_CANDIDATES = 8
MISS_SECONDS = 10.0
_MISSES = 10_000
MOST_ASKED = 1000
"""Files that all providers together are asked for at the same time."""
ASK_AGAIN_SECONDS = 60.0
"""A provider that says of a file that it is at work is not asked for it again for so long: it would begin anew."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Progress:
    """How far a file is. Sizes in bytes, None while unknown."""

    state: State
    size: int | None = None
    done: int | None = None
    error: str | None = None


_Jobs = dict[tuple[str, str], tuple[asyncio.Task[None], Progress]]
"""Work on files by zone and hash. It goes on when nobody waits for it."""


class ResourceService:
    """The resource directories and providers of all zones."""

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
        providers: ResourceProviders,
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
        self._providers = providers
        self._jobs: _Jobs = {}
        self._asked: _Jobs = {}
        self._misses: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._turn = asyncio.Semaphore(AT_ONCE)

    @property
    def channels(self) -> list[str]:
        """The zones that have resource directories."""
        return list(self._directories)

    async def brings(self, channel: str, sha1: Sha1, wait: float) -> bool:
        """Whether a file of the zone's directories becomes readable within `wait` seconds. One that was just not there
        is not looked for again for MISS_SECONDS: whoever reads by hash does not wait for a person who is about to link
        it. Providers are not asked."""
        if channel not in self._directories:
            return False
        now = time.monotonic()
        if now - self._misses.get((channel, sha1), -MISS_SECONDS) < MISS_SECONDS:
            return False
        progress = await self._from_directories(channel, sha1, wait)
        if progress.state == "not-found":
            self._misses[channel, sha1] = now
            if len(self._misses) > _MISSES:
                self._misses.popitem(last=False)
        return progress.state == "completed"

    def offers(self, channel: str) -> bool:
        """Whether a zone has a resource directory, or a provider now."""
        return channel in self._directories or self._providers.of(channel) is not None

    async def request(self, channel: str, sha1: Sha1, wait: float) -> Progress:
        """Make a file of a zone's directories readable there, or have its provider upload it. Waits at most `wait`
        seconds; the work goes on, and asking again tells how far it is. No rights of the caller are checked. Raises
        Unavailable."""
        until = time.monotonic() + wait
        progress = await self._from_directories(channel, sha1, wait)
        if progress.state != "not-found" or self._providers.of(channel) is None:
            return progress
        if await self._buckets.is_deleted(channel, file_path(sha1)):
            return progress
        return await self._from_provider(channel, sha1, until - time.monotonic())

    async def _from_directories(self, channel: str, sha1: Sha1, wait: float) -> Progress:
        running = self._jobs.get((channel, sha1))
        if running is None:
            try:
                known = await self._known(channel, sha1)
            except Forbidden as error:
                return Progress("error", error=f"{error.message}; {error.hint}")
            if known is not None:
                return known
            most = AT_ONCE + MOST_WAITING
            running = self._jobs.get((channel, sha1)) or self._begin(self._jobs, most, self._look, channel, sha1)
        return await _waited(running, wait)

    async def _from_provider(self, channel: str, sha1: Sha1, wait: float) -> Progress:
        running = self._asked.get((channel, sha1))
        if running is None:
            running = self._begin(self._asked, MOST_ASKED, self._ask, channel, sha1)
        return await _waited(running, wait)

    async def _known(self, channel: str, sha1: Sha1) -> Progress | None:
        """What is known without looking at any directory."""
        size = await self._size(channel, sha1)
        if size is not None:
            return Progress("completed", size)
        if channel not in self._directories or await self._buckets.is_deleted(channel, file_path(sha1)):
            return Progress("not-found")
        self._roles.require(self._own, channel, Role.PROVIDE_FILES)
        return None

    async def _size(self, channel: str, sha1: Sha1) -> int | None:
        """The size of a file that the zone has and that can be read; None for any other."""
        if await self._buckets.find(channel, file_path(sha1)) is None:
            return None
        try:
            return await self._blobs.stat(sha1)
        except (NotFound, LinkChanged, Quarantined):
            return None

    def _begin(
        self,
        jobs: _Jobs,
        most: int,
        work: Callable[[str, Sha1, Progress], Awaitable[None]],
        channel: str,
        sha1: Sha1,
    ) -> tuple[asyncio.Task[None], Progress] | None:
        if len(jobs) >= most:
            return None
        progress = Progress("queued")
        task = asyncio.create_task(self._settle(work, channel, sha1, progress))
        jobs[channel, sha1] = task, progress
        task.add_done_callback(lambda _: jobs.pop((channel, sha1)))
        return task, progress

    async def _settle(
        self, work: Callable[[str, Sha1, Progress], Awaitable[None]], channel: str, sha1: Sha1, progress: Progress
    ) -> None:
        """Do the work; if it fails, the progress says so."""
        try:
            await work(channel, sha1, progress)
        except KacheryLabError as error:
            log.warning("a file of a resource cannot be offered", channel=channel, reason=error.message)
            progress.error, progress.state = error.message, "error"
        except Exception:
            log.exception("a file of a resource cannot be offered", channel=channel)
            progress.error, progress.state = "the server failed; its log says how", "error"

    async def _look(self, channel: str, sha1: Sha1, progress: Progress) -> None:
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

    async def _ask(self, channel: str, sha1: Sha1, progress: Progress) -> None:
        progress.state = "running"
        reply = await self._providers.ask(channel, sha1)
        if reply.state != "completed":
            progress.error, progress.state = reply.error, reply.state
            if reply.state in ("queued", "running"):
                await asyncio.sleep(ASK_AGAIN_SECONDS)
            return
        size = await self._size(channel, sha1)
        if size is None:
            progress.error = (
                f"the provider says that it uploaded the file, and the zone {channel} does not have it: its "
                "KACHERY_GATEWAY_URL or KACHERY_ZONE may name another place"
            )
            progress.state = "error"
        else:
            progress.size = progress.done = size
            progress.state = "completed"

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
        tasks = [task for jobs in (self._jobs, self._asked) for task, _ in jobs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _waited(job: tuple[asyncio.Task[None], Progress] | None, seconds: float) -> Progress:
    """The progress of a job, at its end or after so long; a job that found no room has not begun."""
    if job is None:
        return Progress("queued")
    task, progress = job
    await asyncio.wait({task}, timeout=max(seconds, 0.0))
    return progress


def _fits(row: Any, file: OpenFile) -> bool:
    known = Fingerprint(row.size, row.mtime_ns, row.ctime_ns, row.inode)
    return known == file.fingerprint and row.device == file.stat.st_dev


def _text(path: str) -> str:
    """A path as the database can hold it: file names are bytes, which need not be UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
