"""S1: guessing a code, by its time and by many tries."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest

from kachery_lab.errors import TooManyRequests, Unauthenticated
from kachery_lab.services.access import WRONG_LIMIT, AccessService, _digest
from tests.faults.report import histogram, report
from tests.servers import RunningNode

CODE = "abcdefghijkL"
LIMIT = 4.5
"""|t| above this is taken for a difference; 4.5 is what side-channel evaluations use."""
Guess = Callable[[str], object]


def service() -> AccessService:
    """The real comparison, with a known code; tokens and disk are not reached by it."""
    nothing: Any = None
    found = AccessService(*[nothing] * len(signature(AccessService).parameters))
    found._codes = [_digest(CODE), _digest("ZYXWVUTSRQPO")]
    found.set_other_codes(["otherBrowser"])
    return found


def refused(access: AccessService) -> Guess:
    def guess(code: str) -> object:
        try:
            access.by_code(code, "192.0.2.1")
        except (Unauthenticated, TooManyRequests):
            return None
        raise AssertionError("a wrong code was taken")

    return guess


def naive(code: str) -> bool:
    """What `===` may do: ends at the first difference."""
    return len(code) == len(CODE) and all(given == known for given, known in zip(code, CODE, strict=True))


def near() -> str:
    """Right but for its last letter."""
    return CODE[:-1] + random.choice("ABCDEFGHIJK")


def far() -> str:
    """Wrong from its first letter on."""
    return random.choice("ABCDEFGHIJK") + CODE[1:-1] + "L"


def welch(first: list[int], second: list[int]) -> float:
    """Welch's t of two samples, without the slowest tenth of both together: those measure the machine."""
    limit = sorted(first + second)[int(0.9 * len(first + second))]
    groups = []
    for sample in (first, second):
        kept = [value for value in sample if value <= limit]
        mean = sum(kept) / len(kept)
        groups.append((mean, sum((value - mean) ** 2 for value in kept) / (len(kept) - 1) / len(kept)))
    (mean_1, error_1), (mean_2, error_2) = groups
    return (mean_1 - mean_2) / math.sqrt(error_1 + error_2 or 1e-9)


def measure(guess: Guess, pairs: int) -> float:
    """t of the times of nearly right and of wholly wrong codes, in pairs whose order is chance."""
    samples: dict[str, list[int]] = {"near": [], "far": []}
    # Made before the clock runs: what the maker of a code leaves in the caches must not count for one kind only.
    order = [kind for _ in range(pairs) for kind in random.sample(["near", "far"], 2)]
    codes = [(kind, near() if kind == "near" else far()) for kind in order]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for kind, code in codes:
            begun = time.perf_counter_ns()
            guess(code)
            samples[kind].append(time.perf_counter_ns() - begun)
    finally:
        if collecting:
            gc.enable()
    return welch(samples["near"][100:], samples["far"][100:])


def check(pairs: int) -> None:
    access = service()
    assert access.by_code(CODE, "192.0.2.1").kind == "local"
    guess = refused(access)
    tried = [measure(guess, pairs)]
    if abs(tried[0]) >= LIMIT:
        # A busy machine shows differences that are not there twice.
        tried.append(measure(guess, pairs))
    control = measure(naive, pairs)
    report("S1 timing", pairs, t=[round(t, 2) for t in tried], control_t=round(control, 2))
    assert abs(tried[-1]) < LIMIT, tried
    assert abs(control) > LIMIT, f"a comparison that ends early was not noticed: t = {control}"


def test_the_time_tells_nothing_of_the_code() -> None:
    check(5_000)


@pytest.mark.slow
def test_the_time_tells_nothing_of_the_code_in_many_samples() -> None:
    check(40_000)


@pytest.mark.parametrize("header", ["code", "bearer"])
def test_an_address_that_guesses_is_told_to_wait_and_a_right_code_still_works(node: RunningNode, header: str) -> None:
    def ask(secret: str) -> Any:
        headers = {"KACHERY-CLIENT-AUTH-CODE": secret} if header == "code" else {"Authorization": f"Bearer {secret}"}
        return node.request("GET", "/stats", headers=headers, auth=False)

    right = node.code if header == "code" else node.admin_token
    assert ask(right).status == 200
    answers = [ask(f"wrongGuess{number:02}") for number in range(WRONG_LIMIT + 10)]
    statuses = [answer.status for answer in answers]
    assert statuses == [403] * WRONG_LIMIT + [429] * 10
    assert all(0 < int(answer.headers["retry-after"]) <= 61 for answer in answers[WRONG_LIMIT:])
    assert b"too many wrong credentials" in answers[-1].body
    for _ in range(3):
        assert ask(right).status == 200
    assert ask("wrongAgain00").status == 429
    # Our own API counts with the same counter.
    own = node.request("GET", "/api/v1/blobs", auth="klk_wrong")
    assert (own.status, own.json()["code"]) == (429, "too_many_requests")
    assert node.request("GET", "/api/v1/blobs", auth=node.admin_token).status == 200
    assert node.request("GET", "/livez", auth=False).status == 200
    report("S1 guesses", len(answers), status_histogram=histogram(statuses))
