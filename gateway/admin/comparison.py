"""Whether a sampler's log-probs are the trainer's: it draws, and the training engine scores the same tokens.

Reinforcement learning divides one by the other, so that a difference is a bias of every step. Nothing of a comparison
is in a run's log: the trainer gets a run of its own with the sampler's weights, which is dropped again.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from contextlib import aclosing
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from engines.interface import EngineInfo, UserError
from engines.messages import Performed, RunAddress
from engines.operations import (
    AdapterRef,
    CreateRun,
    Datum,
    Forward,
    ForwardResult,
    LoraSpec,
    SampleRequest,
    SampleResult,
    decode_result,
    encode,
)
from engines.tensors import Tensor
from gateway.admin import views
from gateway.admin.checkpoints import sampler_of_caller
from gateway.auth import Who
from gateway.dispatch import Dispatcher
from gateway.engine_process import Drawn, EngineProcess
from gateway.errors import BadRequest, EngineFailed, EngineLost, EngineUnavailable
from gateway.fleet import Needs
from gateway.queries import KnownQueryRoute
from gateway.state import Running
from gateway.store.records import Comparison, Sampler
from gateway.submit import weights_of

router = APIRouter(prefix="/admin/v1", tags=["admin"], route_class=KnownQueryRoute)

_PROMPT_TOKENS = 16
_BASE = LoraSpec(rank=1, seed=0, train_unembed=False)
"""An adapter that has not been trained adds nothing: the base model."""


class Wanted(BaseModel):
    """What is drawn for a comparison."""

    samples: Annotated[int, Field(ge=1, le=64, description="continuations of the prompt")] = 8
    max_tokens: Annotated[int, Field(ge=1, le=1024, description="of each")] = 32
    prompt: Annotated[
        list[int] | None, Field(min_length=1, max_length=4096, description="tokens; none: some at random")
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Compared(views.ComparisonView):
    """A comparison, and who computed it."""

    sampler_id: str
    run_id: str | None
    sampled_by: Annotated[str, Field(description="engine that drew the tokens")]
    trained_by: Annotated[str, Field(description="engine that computed their log-probs in a forward pass")]


@router.post("/samplers/{sampler_id}/compare")
async def compare_sampler(sampler_id: str, wanted: Wanted, caller: Who, gateway: Running) -> Compared:
    """Draw from a sampler at temperature 1, and compare its log-probs with the training engine's for the same tokens.

    The newest outcome for each run stands with the run too. It takes the engines' time like a sample and a pass.
    """
    sampler = await sampler_of_caller(gateway, caller, sampler_id)
    lora = await gateway.lora_of(sampler.run_id)
    folder = await weights_of(gateway, sampler)
    by = gateway.fleet.to_sample(sampler.base_model, Needs.of(lora))
    trainer = gateway.fleet.for_base_model(sampler.base_model, "train")
    drawing, training = by.supervisor.now(), trainer.supervisor.now()
    request = _request(wanted, by, folder, sampler)
    try:
        result = await _drawn(drawing, sampler.owner, request)
        run = CreateRun(LoraSpec(**lora) if lora is not None else _BASE, folder=folder)
        expected = await _trained(training, run, _data(request, result))
    except UserError as error:
        raise BadRequest(str(error)) from error
    differences = _differences(request, result, expected)
    found = Comparison(len(differences), float(differences.mean()), float(differences.max()), time.time())
    if sampler.run_id is not None:
        await gateway.store.runs.record_comparison(sampler.run_id, sampler.owner, found)
    return Compared(
        sampler_id=sampler.sampler_id,
        run_id=sampler.run_id,
        sampled_by=by.name,
        trained_by=trainer.name,
        **views.comparison_view(found).model_dump(),
    )


def _request(wanted: Wanted, by: Dispatcher, folder: str | None, sampler: Sampler) -> SampleRequest:
    info: EngineInfo | None = by.supervisor.info
    assert info is not None  # it is ready
    tokens = wanted.prompt
    if tokens is None:
        tokens = np.random.default_rng(wanted.seed).integers(0, info.vocab_size, _PROMPT_TOKENS).tolist()
    if max(tokens) >= 2**31 or min(tokens) < 0:
        raise BadRequest("prompt holds a number that is no token", param="prompt")
    return SampleRequest(
        prompt=Tensor.of(np.array(tokens, dtype=np.int32)),
        num_samples=wanted.samples,
        seed=wanted.seed,
        max_tokens=wanted.max_tokens,
        stop_at_eos=False,
        adapter=None if folder is None else AdapterRef(folder, folder),
        session=sampler.sampler_id,
    )


async def _drawn(engine: EngineProcess, party: str, request: SampleRequest) -> SampleResult:
    async with aclosing(engine.sample(encode(request), party)) as events:
        async for event in events:
            assert isinstance(event, Drawn)
            result = decode_result(event.body)
            assert isinstance(result, SampleResult)
            return result
    raise EngineUnavailable("the engine that samples has ended; try again in a moment")


def _data(request: SampleRequest, result: SampleResult) -> list[Datum]:
    """Each continuation behind its prompt, as a client would train on it."""
    prompt = request.prompt.array()
    data = []
    for sequence in result.sequences:
        tokens = np.concatenate([prompt, sequence.tokens.array()])
        inputs = {
            "target_tokens": Tensor.of(tokens[1:].astype(np.int64)),
            "weights": Tensor.of(np.ones(len(tokens) - 1, dtype=np.float32)),
        }
        data.append(Datum(Tensor.of(tokens[:-1].astype(np.int32)), inputs))
    return data


async def _trained(engine: EngineProcess, run: CreateRun, data: list[Datum]) -> ForwardResult:
    """A forward pass of the trainer with these weights. Raises UserError and EngineUnavailable."""
    run_id = f"comparison-{secrets.token_hex(8)}"
    try:
        await _perform(engine, "create_run", RunAddress(run_id, 0), encode(run))
        passed = encode(Forward(data, "cross_entropy"))
        result = decode_result(await _perform(engine, "forward", RunAddress(run_id, 1), passed))
    finally:
        with contextlib.suppress(EngineLost):
            await engine.drop_run(run_id)
    assert isinstance(result, ForwardResult)
    return result


async def _perform(engine: EngineProcess, kind: Any, address: RunAddress, body: bytes) -> bytes:
    performed: Performed
    performed, results = await engine.perform(kind, [address], [body])
    [outcome] = performed.outcomes
    if performed.no_room:
        raise EngineUnavailable(
            "the engine that trains has no room for one more run now; try again in a moment"
        )
    if outcome.failure is not None and outcome.failure.category == "user":
        raise UserError(outcome.failure.message)
    if outcome.failure is not None:
        raise EngineFailed(outcome.failure.message, error_id=outcome.failure.error_id)
    return results[0]


def _differences(
    request: SampleRequest, result: SampleResult, expected: ForwardResult
) -> NDArray[np.float64]:
    """Of each drawn token."""
    first = request.prompt.shape[0] - 1
    parts = [
        np.abs(np.subtract(sequence.logprobs.array(), output["logprobs"].array()[first:], dtype=np.float64))
        for sequence, output in zip(result.sequences, expected.outputs, strict=True)
    ]
    return np.concatenate(parts)
