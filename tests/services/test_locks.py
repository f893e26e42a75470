"""Locks by key: blocks of one key come one after the other, others do not wait, and nothing is kept."""

from __future__ import annotations

import asyncio

import pytest

from kachery_lab.services.locks import KeyLocks

GENEROUS = 10


def test_one_block_of_a_key_at_a_time_in_order() -> None:
    async def work() -> None:
        locks: KeyLocks[str] = KeyLocks()
        inside: list[int] = []
        order: list[int] = []

        async def block(number: int) -> None:
            async with locks.hold("a"):
                assert not inside
                inside.append(number)
                await asyncio.sleep(0)
                order.append(inside.pop())

        await asyncio.gather(*(block(number) for number in range(10)))
        assert order == list(range(10))

    asyncio.run(work())


def test_other_keys_do_not_wait() -> None:
    async def work() -> None:
        locks: KeyLocks[tuple[str, str]] = KeyLocks()
        async with asyncio.timeout(GENEROUS), locks.hold(("a", "b")), locks.hold(("a", "c")):
            assert len(locks) == 2

    asyncio.run(work())


def test_nothing_is_kept_of_blocks_that_are_over_failed_or_given_up() -> None:
    async def work() -> None:
        locks: KeyLocks[str] = KeyLocks()

        async def wait_for_it() -> None:
            async with locks.hold("a"):
                pytest.fail("the other block is not over")

        async with locks.hold("a"):
            waiting = asyncio.create_task(wait_for_it())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            # Nothing of the one that gave up is left, and the lock is still the one that is held.
            assert len(locks) == 1
        with pytest.raises(ValueError, match="inside"):
            async with locks.hold("a"):
                raise ValueError("inside")
        async with asyncio.timeout(GENEROUS), locks.hold("a"):
            pass
        assert len(locks) == 0

    asyncio.run(work())
