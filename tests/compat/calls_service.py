"""Calls of a service client: what it makes, and its end."""

from __future__ import annotations

from typing import Any

import tinker

from tests.compat.registry import check
from tests.compat.world import (
    TOKENS,
    Call,
    examples,
    logprobs,
    require_close,
    resolved,
    sampled_logprobs,
    train,
)


@check("ServiceClient()")
def constructed(call: Call) -> None:
    service = call.world.new_service()
    assert sampled_logprobs(
        resolved(service.create_sampling_client(base_model=call.world.base_model)), TOKENS
    )


@check("ServiceClient.get_server_capabilities", "RestClient.get_server_capabilities")
def capabilities(call: Call) -> None:
    names = [model.model_name for model in call().supported_models]
    assert call.world.base_model in names, names


@check("ServiceClient.create_lora_training_client")
def create_lora(call: Call) -> None:
    options = call.given(user_metadata={"by": "compat"})
    run = call(call.world.base_model, rank=8, seed=5, train_unembed=False, **options)
    require_close(
        logprobs(run, TOKENS), sampled_logprobs(call.world.sampler, TOKENS)
    )  # a fresh adapter adds nothing
    info = resolved(run.get_info())
    assert info.lora_rank == 8 and info.model_data.model_name == call.world.base_model
    if options:
        listed = resolved(call.world.rest.get_training_run(info.model_id))
        assert listed.user_metadata == {"by": "compat"}, listed
    if call.accepts("optimizer"):
        assert call(call.world.base_model, optimizer=tinker.AdamOptimizerConfig()) is not None


@check("ServiceClient.create_training_client")
def attach(call: Call) -> None:
    """A second client of a run: 0.1.0 knows no sessions."""
    second = call(call.world.trained.model_id)
    require_close(logprobs(second, TOKENS), call.world.trained_logprobs)


@check("ServiceClient.create_training_client_from_state")
def from_state(call: Call) -> None:
    run = call(call.world.trained_path)
    require_close(logprobs(run, TOKENS), call.world.trained_logprobs)
    train(run)
    require_close(logprobs(call.world.trained, TOKENS), call.world.trained_logprobs)  # another run


@check("ServiceClient.create_training_client_from_state_with_optimizer")
def from_state_with_optimizer(call: Call) -> None:
    """Goes on exactly as the run that was saved would."""
    original = call.world.new_run(seed=13)
    train(original)
    train(original)
    resumed = call(resolved(original.save_state(call.world.name())).path)
    for run in (original, resumed):
        train(run)
    require_close(logprobs(resumed, TOKENS), logprobs(original, TOKENS), 1e-5)


@check("ServiceClient.create_sampling_client")
def create_sampling(call: Call) -> None:
    base = call(base_model=call.world.base_model)
    require_close(sampled_logprobs(base, TOKENS), logprobs(call.world.new_run(), TOKENS))
    tuned = call(model_path=call.world.sampler_path)
    require_close(sampled_logprobs(tuned, TOKENS), call.world.trained_logprobs)


@check("ServiceClient.create_rest_client")
def create_rest(call: Call) -> None:
    path = call.world.trained_path
    assert resolved(call().get_training_run_by_tinker_path(path)).base_model == call.world.base_model


@check("ServiceClient.create_custom_loss")
def create_custom_loss(call: Call) -> None:
    """The cross entropy as a handle: equal gradients."""
    handle = call(_weighted, {"logprobs": 1, "weights": 1})
    run, twin = call.world.new_run(), call.world.new_run()
    output = resolved(run.forward_backward_custom(examples(), handle))
    assert output.metrics["custom/twice:sum"] > 0, output.metrics
    resolved(twin.forward_backward(examples(), "cross_entropy"))
    for each in (run, twin):
        resolved(each.optim_step(tinker.AdamParams(learning_rate=0.05)))
    require_close(logprobs(run, TOKENS), logprobs(twin, TOKENS))


def _weighted(logprobs: Any, weights: Any) -> tuple[Any, dict[str, Any]]:
    total = -(logprobs * weights).sum()
    return total, {"custom/twice:sum": 2 * total}


@check("LossHandle.input_names", "LossHandle.key")
def loss_handle(call: Call) -> None:
    handle = resolved(call.world.new_service().create_custom_loss(_weighted, {"logprobs": 1, "weights": 1}))
    assert tuple(handle.input_names) == ("weights",)
    assert len(handle.key) == 64


@check("ServiceClient.close", "with ServiceClient")
def close(call: Call) -> None:
    service = call.world.new_service()
    if call.name == "close":
        session_id = _work(service, call)
        assert resolved(service.close("success", "done")) is None
    else:
        with service:
            session_id = _work(service, call)
    answer = call.world.http.post("/api/v1/session_heartbeat", json={"session_id": session_id})
    assert answer.status_code == 410, answer.text


def _work(service: Any, call: Call) -> str:
    sampler = resolved(service.create_sampling_client(base_model=call.world.base_model))
    assert sampled_logprobs(sampler, TOKENS)
    return str(service.holder.get_session_id())


@check("ServiceClient.holder")
def holder(call: Call) -> None:
    session_id = call.target.holder.get_session_id()
    assert session_id in resolved(call.world.rest.list_sessions(limit=100)).sessions


@check("ServiceClient.copy_weights", "RestClient.copy_weights")
def copy_weights(call: Call) -> None:
    project: dict[str, str] = {}
    if call.accepts("destination_project_id"):
        project["destination_project_id"] = "compat-project"
    else:
        call.target = call.world.new_service(project_id="compat-project")
    copy = call(call.world.trained_path, ttl_seconds=7200, **project)
    assert copy.startswith("tinker://") and copy != call.world.trained_path
    run = resolved(call.world.service.create_training_client_from_state(copy))
    require_close(logprobs(run, TOKENS), call.world.trained_logprobs)
