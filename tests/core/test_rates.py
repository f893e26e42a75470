"""Token buckets: a burst, then a steady rate, in bounded memory."""

from __future__ import annotations

import pytest

from kachery_lab.core.rates import Allowance, Rates


def test_a_burst_then_a_rate() -> None:
    rates = Rates(per_second=2.0, burst=3)
    assert [rates.wait("a", 10.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert rates.wait("a", 10.0) == pytest.approx(0.5)
    assert rates.wait("a", 10.25) == pytest.approx(0.25)
    assert rates.wait("a", 10.5) == 0.0
    assert rates.wait("a", 10.5) > 0.0
    # What was not used is kept up to the burst, and no further.
    assert [rates.wait("a", 1000.0) for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(0.5)]


def test_names_are_apart() -> None:
    rates = Rates(per_second=1.0, burst=1)
    assert rates.wait("a", 0.0) == 0.0
    assert rates.wait("b", 0.0) == 0.0
    assert rates.wait("a", 0.0) == pytest.approx(1.0)


def test_memory_is_bounded() -> None:
    rates = Rates(per_second=1.0, burst=1, most=10)
    for number in range(1000):
        rates.wait(str(number), 0.0)
    assert len(rates._buckets) == 10
    # The one that is idle longest went; a busy one stays.
    assert rates.wait("999", 0.0) > 0.0
    assert rates.wait("0", 0.0) == 0.0


def test_an_allowance_may_be_overdrawn_and_is_waited_for() -> None:
    allowance = Allowance(per_second=10, burst=20)
    assert [allowance.take(1, 100.0) for _ in range(20)] == [0] * 20
    assert allowance.take(1, 100.0) == pytest.approx(0.1)
    assert allowance.take(4, 100.0) == pytest.approx(0.5)
    assert allowance.take(0, 100.5) == 0
    assert allowance.take(20, 1100.5) == 0
    assert allowance.take(1, 1100.5) > 0, "what was not used is kept up to the burst only"
