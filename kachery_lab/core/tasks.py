"""Tasks by their pure rules: kinds, statuses, hashes, and where a result lies (spec/tasks.md)."""

from __future__ import annotations

import hashlib
import secrets
import string
from dataclasses import dataclass
from typing import Literal, Self, get_args

from kachery_lab.core.canonical_json import canonical_2021
from kachery_lab.core.ids import Sha1, TaskFunctionId
from kachery_lab.core.objects import ObjectPath
from kachery_lab.core.strict_json import check_signable, shorten
from kachery_lab.errors import InvalidInput

TaskKind = Literal["pure-calculation", "query", "action"]
TaskStatus = Literal["waiting", "pending", "queued", "running", "finished", "error"]
KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
STATUSES: tuple[TaskStatus, ...] = get_args(TaskStatus)
FINAL: frozenset[TaskStatus] = frozenset({"finished", "error"})
MAX_TASK_ID = 40
MAX_BACKEND_ID = 1000
MAX_ERROR = 999
"""Characters of an error message; longer ones are cut, because older nodes drop the whole message."""


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """What somebody wants done, without the arguments: `task_hash` stands for function and arguments, `task_id` for
    this one wish (for pure calculations it is the hash). Only registrations with the same `backend_id` get it."""

    task_id: str
    task_hash: Sha1
    function_id: TaskFunctionId
    kind: TaskKind
    backend_id: str | None = None

    @property
    def has_result(self) -> bool:
        """Whether a result is uploaded; an action has none."""
        return self.kind != "action"

    @classmethod
    def parse(cls, fields: dict[str, object]) -> Self:
        """From `taskId`, `taskHash`, `taskFunctionId`, `taskFunctionType`, `backendId`. Raises InvalidInput."""
        task_id, digest = parse_task_id(fields["taskId"]), Sha1.parse(fields["taskHash"], "taskHash")
        kind = parse_kind(fields["taskFunctionType"])
        if kind == "pure-calculation" and task_id != digest:
            raise InvalidInput("taskId: expected the hash of function and arguments")
        function_id = TaskFunctionId.parse(fields["taskFunctionId"])
        return cls(task_id, digest, function_id, kind, parse_backend_id(fields.get("backendId")))

    def to_json(self) -> dict[str, object]:
        """What `parse` reads."""
        return {
            "taskId": self.task_id,
            "taskHash": self.task_hash,
            "taskFunctionId": self.function_id,
            "taskFunctionType": self.kind,
            "backendId": self.backend_id,
        }


def parse_kind(value: object, where: str = "taskFunctionType") -> TaskKind:
    """Raises InvalidInput."""
    for kind in KINDS:
        if value == kind:
            return kind
    raise InvalidInput(f"{where}: expected {', '.join(KINDS)}, got {shorten(value)}")


def parse_status(value: object, where: str = "status") -> TaskStatus:
    """Raises InvalidInput."""
    for status in STATUSES:
        if value == status:
            return status
    raise InvalidInput(f"{where}: expected {', '.join(STATUSES)}, got {shorten(value)}")


def parse_task_id(value: object, where: str = "taskId") -> str:
    """Any text of at most 40 characters, as older nodes take it. Raises InvalidInput."""
    if isinstance(value, str) and len(value) <= MAX_TASK_ID:
        return value
    raise InvalidInput(f"{where}: expected a text of at most {MAX_TASK_ID} characters, got {shorten(value)}")


def parse_backend_id(value: object, where: str = "backendId") -> str | None:
    """A text or None, which is a value of its own. Raises InvalidInput."""
    if value is None or (isinstance(value, str) and len(value) <= MAX_BACKEND_ID):
        return value
    raise InvalidInput(f"{where}: expected null or a text of at most {MAX_BACKEND_ID} characters")


def task_hash(function_id: TaskFunctionId, kwargs: dict[str, object]) -> Sha1:
    """The name of a function with its arguments (spec/signing.md section 4). Raises InvalidInput for arguments that
    have no exact canonical form, such as integers beyond 2^53."""
    check_signable(kwargs, "taskKwargs")
    text = canonical_2021({"functionId": str(function_id), "kwargs": kwargs})
    return Sha1(hashlib.sha1(text.encode("utf-8"), usedforsecurity=False).hexdigest())


def new_task_id(kind: TaskKind, digest: Sha1, request_id: str | None = None) -> str:
    """The hash for a pure calculation, else ten random letters; with a request id, always the same ones for it."""
    if kind == "pure-calculation":
        return digest
    if request_id is not None:
        return "r" + hashlib.sha256(request_id.encode("utf-8")).hexdigest()[: MAX_TASK_ID - 1]
    return "".join(secrets.choice(string.ascii_letters) for _ in range(10))


def result_path(digest: Sha1) -> ObjectPath:
    """Where a result lies in its channel's bucket."""
    return ObjectPath.parse(f"task_results/{digest[:2]}/{digest[2:4]}/{digest[4:6]}/{digest}")


def shorten_error(message: str) -> str:
    """A message that older nodes accept: at most MAX_ERROR characters, cut ones end in three dots."""
    return message if len(message) <= MAX_ERROR else f"{message[: MAX_ERROR - 3]}..."
