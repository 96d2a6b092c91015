"""Calls of a training client, judged by numbers."""

from __future__ import annotations

import math
import re
import time
from typing import Any

from tinker import types

from tests.compat.registry import check
from tests.compat.world import (
    TOKENS,
    Call,
    datum,
    examples,
    logprobs,
    prompt,
    require_close,
    resolved,
    sampled_logprobs,
    train,
)


@check("TrainingClient.forward", "TrainingClient.forward_backward")
def passes(call: Call) -> None:
    data = examples()
    output = call(data, "cross_entropy")
    assert len(output.loss_fn_outputs) == len(data)
    expected = 0.0
    for item, entry in zip(data, output.loss_fn_outputs, strict=True):
        values = list(entry["logprobs"].data)
        weights = list(item.loss_fn_inputs["weights"].data)
        assert len(values) == len(weights) and all(value <= 0 for value in values), values
        expected -= sum(weight * value for weight, value in zip(weights, values, strict=True))
    assert math.isclose(output.metrics["loss:sum"], expected, rel_tol=1e-4), (output.metrics, expected)
    require_close(list(output.loss_fn_outputs[0]["logprobs"].data), logprobs(call.target, TOKENS))


@check("TrainingClient.forward_backward_custom")
def custom_loss(call: Call) -> None:
    """The same loss as cross_entropy, written by a user: equal gradients, and the user's own metrics."""

    def loss(data: list[Any], values: list[Any]) -> tuple[Any, dict[str, float]]:
        import torch

        weights = [torch.tensor(list(item.loss_fn_inputs["weights"].data)) for item in data]
        total = -sum((weight * value).sum() for weight, value in zip(weights, values, strict=True))
        return total, {"mine:mean": 4.5}

    output = call(examples(), loss)
    assert output.metrics["mine:mean"] == 4.5, output.metrics
    assert len(output.loss_fn_outputs) == 2
    _optimize(call.target)
    twin = call.world.new_run()
    resolved(twin.forward_backward(examples(), "cross_entropy"))
    _optimize(twin)
    require_close(logprobs(call.target, TOKENS), logprobs(twin, TOKENS))


def _optimize(run: Any) -> Any:
    return resolved(run.optim_step(types.AdamParams(learning_rate=0.05)))


@check("TrainingClient.optim_step")
def optim_step(call: Call) -> None:
    before = sum(logprobs(call.target, TOKENS))
    resolved(call.target.forward_backward(examples(), "cross_entropy"))
    result = call(types.AdamParams(learning_rate=0.05))
    metrics = result.metrics
    assert metrics is not None and metrics["unclipped_grad_l2:mean"] > 0, metrics
    after = sum(logprobs(call.target, TOKENS))
    assert after > before + 0.01, (before, after)


@check("TrainingClient.save_state", "TrainingClient.save_weights_for_sampler")
def save(call: Call) -> None:
    kind = "weights" if call.name.startswith("save_state") else "sampler_weights"
    name = call.world.name()
    options = call.given(ttl_seconds=7200, user_metadata={"by": "compat"})
    path = call(name, **options).path
    run_id = path.removeprefix("tinker://").split("/")[0]
    assert path == f"tinker://{run_id}/{kind}/{name}"
    listed = resolved(call.world.rest.list_checkpoints(run_id)).checkpoints
    (entry,) = [item for item in listed if item.tinker_path == path]
    assert entry.checkpoint_id == f"{kind}/{name}"
    assert entry.checkpoint_type == ("training" if kind == "weights" else "sampler")
    if call.accepts("overwrite"):
        assert call(name, overwrite=True).path == path


@check("TrainingClient.load_state", "TrainingClient.load_state_with_optimizer")
def load(call: Call) -> None:
    path = resolved(call.target.save_state(call.world.name())).path
    before = logprobs(call.target, TOKENS)
    train(call.target)
    assert abs(sum(logprobs(call.target, TOKENS)) - sum(before)) > 1e-3
    loaded = call(path)
    assert loaded.path in (None, path), loaded
    require_close(logprobs(call.target, TOKENS), before)


@check("TrainingClient.create_sampling_client")
def sampling_client(call: Call) -> None:
    sampler = call(call.world.sampler_path)
    require_close(sampled_logprobs(sampler, TOKENS), call.world.trained_logprobs)


@check(
    "TrainingClient.save_weights_and_get_sampling_client",
    "TrainingClient.save_weights_and_get_sampling_client_submit",
)
def save_and_sample(call: Call) -> None:
    train(call.target)
    before = logprobs(call.target, TOKENS)
    needs_name = not call.name.endswith("_submit")
    sampler = call(call.world.name()) if needs_name else call()
    train(call.target)
    require_close(sampled_logprobs(sampler, TOKENS), before)  # a sampler keeps its weights
    if call.accepts("kind"):
        newest = call(kind="inflight")
        train(call.target)
        require_close(sampled_logprobs(call(kind="inflight"), TOKENS), logprobs(call.target, TOKENS))
        require_close(sampled_logprobs(newest, TOKENS), logprobs(call.target, TOKENS))


@check("TrainingClient.save_weights_external")
def save_external(call: Call) -> None:
    train(call.target)
    saved = call(call.world.name(), ttl_seconds=3600)
    assert "/external_weights/" in saved.path
    files = resolved(call.world.rest.get_external_weights_urls(saved.path)).urls
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files), files
    sizes = [len(call.world.download(url)) for url in files.values()]
    assert all(sizes), files


@check("TrainingClient.get_info")
def get_info(call: Call) -> None:
    info = call()
    assert info.model_data.model_name == call.world.base_model
    assert info.is_lora and info.lora_rank == 4
    assert resolved(call.world.rest.get_training_run(info.model_id)).base_model == call.world.base_model


@check("TrainingClient.get_tokenizer", "SamplingClient.get_tokenizer")
def get_tokenizer(call: Call) -> None:
    tokenizer = call()
    assert tokenizer.encode("Hi!") == [72, 105, 33]  # the numpy engine's tokens are bytes
    assert tokenizer.decode([72, 105, 33]) == "Hi!"


@check("TrainingClient.unload_model")
def unload_model(call: Call) -> None:
    run_id = call.target.model_id
    assert call().model_id == run_id
    try:
        resolved(call.target.forward([datum(TOKENS)], "cross_entropy"))
    except Exception as error:  # its type is the SDK's, and differs between versions
        assert "unloaded" in str(error), error
    else:
        raise AssertionError("an unloaded run still computes")


@check("TrainingClient.get_console_url", "ServiceClient.get_console_url")
def get_console_url(call: Call) -> None:
    resolved(call.world.run.save_weights_for_sampler(call.world.name()))  # the session exists
    url = call()
    assert re.search(r"^https?://.*/(sessions|training_runs)/[0-9a-f-]{36}", url), url


@check(
    "TrainingClient.get_telemetry",
    "SamplingClient.get_telemetry",
    "ServiceClient.get_telemetry",
    "RestClient.get_telemetry",
    "AdminClient.get_telemetry",
)
def get_telemetry(call: Call) -> None:
    """An exception is sent, and the gateway takes it: otherwise each one stalls the client for 30 s."""
    telemetry = call()
    assert telemetry is not None
    started = time.monotonic()
    assert telemetry.log_fatal_exception_sync(ValueError("of the compatibility test"))
    assert time.monotonic() - started < 10


@check("TrainingClient.on_queue_state_change", "SamplingClient.on_queue_state_change")
def on_queue_state_change(call: Call) -> None:
    """What the SDK calls when the gateway tells why it takes long; then the client works on."""
    from tinker.lib.api_future_impl import QueueState

    for state in QueueState:
        arguments = (state, "a reason") if call.accepts("queue_state_reason") else (state,)
        assert call(*arguments) is None
    if hasattr(call.target, "sample"):
        assert resolved(call.target.compute_logprobs(prompt()))[0] is None
