"""Futures, however their outcome is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.compat.registry import check
from tests.compat.world import LIMIT_S, TOKENS, Call, examples, logprobs, resolved

_WAYS: dict[str, Callable[[Any], Any]] = {
    "result": lambda future: future.result(timeout=LIMIT_S),
    "result_async": lambda future: asyncio.run(future.result_async(timeout=LIMIT_S)),
    "coroutine": lambda future: asyncio.run(future.coroutine()),
    "future": lambda future: future.future().result(LIMIT_S),
    "await": lambda future: asyncio.run(_awaited(future)),
}


async def _awaited(future: Any) -> Any:
    return await future


@check(
    *(f"APIFuture.{way}" for way in ("result", "coroutine", "future")),
    *(f"AwaitableConcurrentFuture.{way}" for way in ("result", "coroutine", "future")),
    "await APIFuture",
    "await AwaitableConcurrentFuture",
)
def of_a_pass(call: Call) -> None:
    future = call.world.run.forward(examples(), "cross_entropy")
    output = _WAYS[call.name](future)
    assert len(output.loss_fn_outputs) == 2 and output.metrics["loss:sum"] > 0
    assert _WAYS[call.name](future).metrics == output.metrics  # can be asked for again


@check(
    *(
        f"Backcompat{of}ClientFuture.{way}"
        for of in ("", "Training", "Sampling")
        for way in ("result", "coroutine", "future")
    ),
    *(f"await Backcompat{of}ClientFuture" for of in ("", "Training", "Sampling")),
)
def of_a_client(call: Call) -> None:
    run = _WAYS[call.name](call.world.service.create_lora_training_client(call.world.base_model, rank=2))
    assert logprobs(run, TOKENS)
    sampler = _WAYS[call.name](call.world.service.create_sampling_client(base_model=call.world.base_model))
    assert resolved(sampler.compute_logprobs(examples()[0].model_input))[0] is None
