"""Calls of an administrator's client, and the functions of `tinker.auth`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import tinker
from tinker import types

from tests.compat.registry import BrokenInSdk, check
from tests.compat.world import Call, prompt, resolved, train


@check("AdminClient()")
def constructed(call: Call) -> None:
    client: Any = tinker.AdminClient(base_url=call.world.url, api_key=call.world.key)
    assert resolved(client.get_audit_log()).entries is not None


@check("AdminClient.get_audit_log", "RestClient.get_audit_log")
def audit_log(call: Call) -> None:
    path = call.world.new_checkpoint()
    asked = {"event_type": "checkpoints", "day": datetime.now(UTC).date()}
    try:
        answer, broken = call(**asked), False
    except AssertionError as error:
        assert "incorrect event loop" in str(error), error
        answer, broken = call.target.holder.run_coroutine_threadsafe(call.method(**asked)).result(), True
    entries = [entry for entry in answer.entries if path in (entry.tinker_path, *_details(entry))]
    assert entries, answer.entries[-5:]
    assert all(entry.timestamp.tzinfo is not None and "_" in entry.event for entry in entries)
    if broken:
        raise BrokenInSdk("it works on the SDK's own event loop only, and does not go there, as others do")


def _details(entry: Any) -> list[object]:
    return list(getattr(entry, "event_details", {}).values())


@check("AdminClient.get_billing_usage", "RestClient.get_billing_usage")
def billing_usage(call: Call) -> None:
    train(call.world.run)
    params = types.SamplingParams(max_tokens=3)
    resolved(call.world.sampler.sample(prompt(), 1, params))
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    answer = call(hour - timedelta(hours=1), hour + timedelta(hours=1))
    tokens: dict[str, int] = {}
    for event in answer.data:
        kind = event.event_info.type
        tokens[kind] = tokens.get(kind, 0) + getattr(event.event_info, "token_count", 0)
    assert tokens.get("training", 0) > 0 and tokens.get("sampling_sample", 0) >= 3, tokens
    assert tokens.get("sampling_prefill", 0) > 0, tokens


@check("AdminClient.get_current_checkpoint_storage_usage", "RestClient.get_current_checkpoint_storage_usage")
def storage_usage(call: Call) -> None:
    before = sum(row.checkpoint_count for row in call().data)
    call.world.new_checkpoint()
    rows = call().data
    assert sum(row.checkpoint_count for row in rows) == before + 1
    assert sum(row.size_bytes for row in rows) > 0


@check("tinker.auth.get_tinker_token")
def get_token(call: Call) -> None:
    assert tinker.auth.get_tinker_token() == call.world.key


@check("tinker.auth.tinker_has_credentials")
def has_credentials(call: Call) -> None:
    assert tinker.auth.tinker_has_credentials() is True


@check("tinker.auth.raise_if_tinker_not_accessible")
def accessible(call: Call) -> None:
    assert call() is None
