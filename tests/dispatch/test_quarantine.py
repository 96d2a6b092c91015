"""Who may be in an engine at the same time."""

from __future__ import annotations

import asyncio

from gateway.dispatch.quarantine import Quarantine


async def enters_within(quarantine: Quarantine, *, alone: bool) -> bool:
    """Whether there is no wait at the door; who has to wait goes away again."""
    try:
        await asyncio.wait_for(quarantine.enter(alone=alone), 0.02)
    except TimeoutError:
        return False
    return True


async def test_any_number_work_together() -> None:
    quarantine = Quarantine()
    for _ in range(3):
        assert await enters_within(quarantine, alone=False)


async def test_a_suspect_waits_until_it_is_alone_and_keeps_others_out() -> None:
    quarantine = Quarantine()
    await quarantine.enter(alone=False, count=2)
    suspect = asyncio.create_task(quarantine.enter(alone=True))
    quarantine.leave()
    await asyncio.sleep(0.01)
    assert not suspect.done()
    quarantine.leave()
    await suspect
    assert not await enters_within(quarantine, alone=False)
    assert not await enters_within(quarantine, alone=True)
    quarantine.leave()
    assert await enters_within(quarantine, alone=False)


async def test_newcomers_do_not_overtake_a_waiting_suspect() -> None:
    quarantine = Quarantine()
    await quarantine.enter(alone=False)
    suspect = asyncio.create_task(quarantine.enter(alone=True))
    await asyncio.sleep(0)
    newcomer = asyncio.create_task(quarantine.enter(alone=False))
    await asyncio.sleep(0.01)
    assert not newcomer.done()
    quarantine.leave()
    await suspect
    assert not newcomer.done()
    quarantine.leave()
    await newcomer


async def test_a_suspect_that_is_cancelled_lets_the_others_go_on() -> None:
    quarantine = Quarantine()
    await quarantine.enter(alone=False)
    assert not await enters_within(quarantine, alone=True)
    assert await enters_within(quarantine, alone=False)


async def test_leaving_with_none_of_those_that_were_to_come_in() -> None:
    """A claim may find that nothing of it is left to do."""
    quarantine = Quarantine()
    await quarantine.enter(alone=True)
    quarantine.leave(count=0)
    assert not await enters_within(quarantine, alone=False)
    quarantine.leave(count=1)
    assert await enters_within(quarantine, alone=True)
