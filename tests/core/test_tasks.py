"""Hashes, ids and statuses of tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kachery_lab.core.ids import Sha1, TaskFunctionId
from kachery_lab.core.tasks import TaskRequest, new_task_id, result_path, shorten_error, task_hash
from kachery_lab.errors import InvalidInput

CASES = json.loads((Path(__file__).parents[1] / "vectors" / "task_hashes.json").read_text("utf-8"))["cases"]
HASH = Sha1("5ac2c576c3f1c72031875da143c99e4a498f2084")


@pytest.mark.parametrize("case", CASES, ids=[f"{n}-{case['taskFunctionId']}" for n, case in enumerate(CASES)])
def test_recorded_hashes(case: dict[str, str]) -> None:
    assert task_hash(TaskFunctionId(case["taskFunctionId"]), json.loads(case["kwargsJson"])) == case["taskHash"]


@pytest.mark.parametrize("kwargs", [{"n": 2**53 + 1}, {"n": float("nan")}, {"__proto__": 1}, {"s": "\ud800"}])
def test_arguments_without_an_exact_form(kwargs: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        task_hash(TaskFunctionId("add.1"), kwargs)


def test_ids() -> None:
    assert new_task_id("pure-calculation", HASH, "x") == HASH
    first, second = new_task_id("query", HASH), new_task_id("query", HASH)
    assert first != second and len(first) == 10 and first.isalpha()
    assert new_task_id("action", HASH, "x") == new_task_id("action", HASH, "x") != new_task_id("action", HASH, "y")
    assert len(new_task_id("action", HASH, "x")) == 40


def test_a_request_there_and_back() -> None:
    request = TaskRequest("abc", HASH, TaskFunctionId("add.1"), "query", "gpu")
    assert TaskRequest.parse(request.to_json()) == request


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("taskId", "x" * 41),
        ("taskId", 5),
        ("taskHash", "abc"),
        ("taskFunctionId", "a b"),
        ("taskFunctionType", "other"),
        ("taskFunctionType", "pure-calculation"),
        ("backendId", 1),
        ("backendId", "x" * 1001),
    ],
)
def test_what_is_no_request(field: str, value: object) -> None:
    fields = TaskRequest("abc", HASH, TaskFunctionId("add.1"), "query").to_json()
    with pytest.raises(InvalidInput, match=field if value != "pure-calculation" else "taskId"):
        TaskRequest.parse({**fields, field: value})


def test_errors_are_cut() -> None:
    assert shorten_error("x" * 999) == "x" * 999
    assert shorten_error("x" * 1000) == "x" * 996 + "..."


def test_where_results_lie() -> None:
    path = result_path(HASH)
    assert path.text == f"task_results/5a/c2/c5/{HASH}"
    assert (path.kind, path.sha1) == ("task", HASH)
