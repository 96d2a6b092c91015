"""From what an engine answers to what is stored: outcomes with their checkpoints and samplers."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from engines import messages
from engines.operations import SaveWeightsResult, decode_result
from gateway.store.records import Checkpoint, CheckpointKind, Future, Outcome, Sampler, Usage
from gateway.store.usage import session_of_id


def outcomes_of(
    batch: list[Future], base_model: str, performed: messages.Performed, payloads: list[bytes]
) -> list[Outcome]:
    """One outcome for each future of a batch, in order; `payloads` has the results of those that succeeded."""
    results = iter(payloads)
    outcomes = []
    for future, answer in zip(batch, performed.outcomes, strict=True):
        if answer.failure is not None:
            outcomes.append(
                failed(future, answer.failure.category, answer.failure.message, answer.failure.error_id)
            )
        else:
            succeeded = _succeeded(future, base_model, next(results), answer.summary)
            outcomes.append(replace(succeeded, digest=answer.digest or None))
    return outcomes


def failed(future: Future, category: str, message: str, error_id: str | None = None) -> Outcome:
    """The outcome of an operation that had no effect."""
    return Outcome(future, error=message, error_category=category, error_id=error_id)


def _succeeded(future: Future, base_model: str, result: bytes, summary: dict[str, float]) -> Outcome:
    """The outcome of an operation that took effect, with what it brings into being."""
    finite = {name: value for name, value in summary.items() if math.isfinite(value)}
    tokens = int(finite.get("tokens", 0))
    session_id = session_of_id(future.run_id or "")
    usage = Usage(future.owner, session_id, base_model, training_tokens=tokens) if tokens else None
    outcome = Outcome(future, result=result, summary=finite, usage=usage)
    if future.kind != "save_weights":
        return outcome
    saved = decode_result(result)
    assert isinstance(saved, SaveWeightsResult)
    context = future.context
    if (entry := context.get("checkpoint")) is not None:
        checkpoint = _checkpoint(future, entry, saved.size_bytes)
        outcome = replace(outcome, checkpoint=checkpoint, overwrite=entry["overwrite"])
    if (entry := context.get("sampler")) is not None:
        outcome = replace(outcome, sampler=_sampler(future, entry, saved.size_bytes))
    return outcome


def _checkpoint(future: Future, entry: dict[str, Any], size_bytes: int) -> Checkpoint:
    now = time.time()
    ttl = entry["ttl_seconds"]
    return Checkpoint(
        path=entry["path"],
        owner=future.owner,
        run_id=future.run_id or "",
        kind=CheckpointKind(entry["kind"]),
        name=entry["name"],
        folder=future.folder or "",
        base_model=entry["base_model"],
        lora=entry["lora"],
        has_optimizer=entry["has_optimizer"],
        size_bytes=size_bytes,
        public=False,
        user_metadata=entry["user_metadata"],
        created_at=now,
        expires_at=None if ttl is None else now + ttl,
    )


def _sampler(future: Future, entry: dict[str, Any], size_bytes: int) -> Sampler:
    return Sampler(
        sampler_id=entry["sampler_id"],
        owner=future.owner,
        session_id=entry["session_id"],
        engine=entry["engine"],
        base_model=entry["base_model"],
        run_id=future.run_id,
        path=None,
        folder=future.folder,
        created_at=time.time(),
        inflight_seq=future.seq_id if entry.get("inflight") else None,
        size_bytes=size_bytes,
    )
