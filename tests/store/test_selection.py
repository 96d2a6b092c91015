"""Checkpoints by what they are, and the newest of each run and kind left out."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from gateway.store import Store
from gateway.store.checkpoints import Selection
from gateway.store.deposits import Deposit
from gateway.store.records import Checkpoint, CheckpointKind
from tests.store.test_references import a_checkpoint

TRAINING, SAMPLER = CheckpointKind.TRAINING, CheckpointKind.SAMPLER


async def several(store: Store) -> list[Checkpoint]:
    """Two runs; of the first, four of one kind and two of the other, made at 1, 2, 3 …"""
    first = await a_checkpoint(store, created_at=0.0)
    made = []
    for at, (kind, name) in enumerate(
        [
            (TRAINING, "step-1"),
            (SAMPLER, "step-1"),
            (TRAINING, "step-2"),
            (TRAINING, "final_1"),
            (SAMPLER, "step-2"),
            (TRAINING, "finalX1"),
        ],
        start=1,
    ):
        path = f"tinker://{first.run_id}/{kind}/{name}"
        made.append(
            replace(first, path=path, kind=kind, name=name, folder=f"checkpoints/s{at}", created_at=float(at))
        )
        await store.deposits.add(Deposit(made[-1]))
    await store.checkpoints.delete(first.path)
    made.append(await a_checkpoint(store, created_at=9.0, base_model="other", owner="bob"))
    return made


@pytest.mark.parametrize(
    ("selection", "places"),
    [
        (Selection(), [0, 1, 2, 3, 4, 5, 6]),
        (Selection(owner="bob"), [6]),
        (Selection(base_model="m"), [0, 1, 2, 3, 4, 5]),
        (Selection(kind=SAMPLER), [1, 4]),
        (Selection(name_prefix="step-"), [0, 1, 2, 4]),
        (Selection(name_prefix="final_"), [3]),
        (Selection(after=3.0, before=5.0), [2, 3]),
        (Selection(keep_last=1), [0, 1, 2, 3]),
        (Selection(keep_last=2), [0, 2]),
        (Selection(keep_last=3), [0]),
        (Selection(keep_last=1, kind=SAMPLER), [1]),
        # the newest of a run and kind stays, also when it does not fit the rest of the selection
        (Selection(keep_last=1, name_prefix="step-"), [0, 1, 2]),
        (Selection(keep_last=2, name_prefix="final"), []),
    ],
)
async def test_what_a_selection_is_of(store: Store, selection: Selection, places: list[int]) -> None:
    made = await several(store)
    found = await store.checkpoints.select(selection, 100)
    assert [each.path for each in found] == [made[place].path for place in places]
    assert await store.checkpoints.select(selection, 1) == found[:1]


async def test_the_expired_count_for_nothing(store: Store) -> None:
    made = await several(store)
    await store.checkpoints.set_expiry(made[5].path, time.time() - 1)
    found = await store.checkpoints.select(Selection(keep_last=1, kind=TRAINING), 100)
    assert [each.path for each in found] == [made[0].path, made[2].path]
