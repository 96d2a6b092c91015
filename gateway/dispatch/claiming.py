"""Claiming, in either lane: what is sent to an engine is marked so, and its input found."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gateway.dispatch.inputs import RecentInputs
from gateway.store.futures import Claim, FutureStore
from gateway.store.records import Future


class Interrupted(Exception):
    """What is in memory and what is in the database have come apart; start over from the database."""


async def claimed_inputs(
    futures: FutureStore, recent: RecentInputs, claim: Claim, written: Callable[[asyncio.Future[Any]], None]
) -> dict[str, bytes]:
    """Inputs of what could be claimed, by request_id. When they are at hand, the claim is written while the engine
    works already, and `written` is told: it counts attempts and shows what runs, whereas settling decides whose outcome
    is stored."""
    inputs = recent.take(claim.request_ids)
    if inputs is None:
        return await futures.claim(claim)
    futures.claim_behind(claim).add_done_callback(written)
    return inputs


def sent(future: Future, epoch: int) -> Future:
    """The future as a claim leaves it: an attempt is a start of the engine that it was sent to."""
    attempts = future.attempts + (future.epoch != epoch)
    return replace(future, epoch=epoch, attempts=attempts, started_at=time.time())
