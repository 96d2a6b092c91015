"""The official SDK, unmodified: train, sample, save, load, list."""

from __future__ import annotations

import numpy as np
import pytest
import tinker

from tests.gateway.conftest import datum

# The SDK warns of its own deprecations, and leaves the connections of its background loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
ADAM = tinker.AdamParams(learning_rate=0.02)


def client_of(service: tinker.ServiceClient, seed: int = 1) -> tinker.TrainingClient:
    return service.create_lora_training_client("fake/model", rank=4, seed=seed).result()


def test_pipelined_training_learns(service: tinker.ServiceClient) -> None:
    client = client_of(service)
    futures = [
        (client.forward_backward([datum()], "cross_entropy"), client.optim_step(ADAM)) for _ in range(10)
    ]
    losses = [passed.result().metrics["loss:sum"] for passed, _ in futures]
    norms = [step.result().metrics for _, step in futures]
    assert losses[-1] < 0.8 * losses[0]
    assert all(metrics is not None and metrics["unclipped_grad_l2:mean"] > 0 for metrics in norms)


def test_chunked_and_whole_calls_give_the_same_gradient(service: tinker.ServiceClient) -> None:
    data = [datum(seed, length=3000) for seed in range(4)]
    whole, split = client_of(service), client_of(service)
    one = whole.forward_backward(data, "cross_entropy").result()
    two = [split.forward_backward([item], "cross_entropy") for item in data]
    assert one.metrics["loss:sum"] == pytest.approx(
        sum(f.result().metrics["loss:sum"] for f in two), rel=1e-6
    )
    norms = []
    for client in (whole, split):
        metrics = client.optim_step(ADAM).result().metrics
        assert metrics is not None
        norms.append(metrics["unclipped_grad_l2:mean"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_many_data_travel_in_several_requests_and_come_back_in_order(service: tinker.ServiceClient) -> None:
    client = client_of(service)
    data = [datum(seed, length=2 + seed % 5) for seed in range(2500)]
    outputs = client.forward(data, "cross_entropy").result().loss_fn_outputs
    assert [len(output["logprobs"].data) for output in outputs] == [2 + seed % 5 for seed in range(2500)]
    lone = client.forward([data[1777]], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    np.testing.assert_allclose(outputs[1777]["logprobs"].data, lone.data, rtol=1e-6)


def test_resuming_equals_an_uninterrupted_run(service: tinker.ServiceClient) -> None:
    client = client_of(service)
    for seed in range(3):
        client.forward_backward([datum(seed)], "cross_entropy").result()
        client.optim_step(ADAM).result()
    path = client.save_state("middle").result().path
    resumed = service.create_training_client_from_state_with_optimizer(path).result()
    losses = []
    for each in (client, resumed):
        for seed in (5, 6, 7):
            each.forward_backward([datum(seed)], "cross_entropy").result()
            each.optim_step(ADAM).result()
        losses.append(each.forward([datum(9)], "cross_entropy").result().metrics["loss:sum"])
    assert losses[0] == losses[1]


def test_loading_without_optimizer_state_starts_it_afresh(service: tinker.ServiceClient) -> None:
    client = client_of(service)
    for seed in range(3):
        client.forward_backward([datum(seed)], "cross_entropy").result()
        client.optim_step(ADAM).result()
    path = client.save_state("middle").result().path
    losses = []
    for begin in (
        service.create_training_client_from_state_with_optimizer,
        service.create_training_client_from_state,
    ):
        other = begin(path).result()
        other.forward_backward([datum(4)], "cross_entropy").result()
        other.optim_step(ADAM).result()
        losses.append(other.forward([datum(9)], "cross_entropy").result().metrics["loss:sum"])
    assert losses[0] != losses[1]


def test_a_sampler_keeps_its_weights_while_training_goes_on(service: tinker.ServiceClient) -> None:
    client = client_of(service)
    prompt = tinker.ModelInput.from_ints([1, 2, 3, 4, 5])
    client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(ADAM).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    before = sampler.compute_logprobs(prompt).result()
    client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(tinker.AdamParams(learning_rate=1.0)).result()
    assert sampler.compute_logprobs(prompt).result() == before
    newer = client.save_weights_and_get_sampling_client().result()
    assert newer.compute_logprobs(prompt).result() != before


def test_sampler_and_trainer_agree(service: tinker.ServiceClient) -> None:
    client = client_of(service)
    client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(ADAM).result()
    example = datum(3)
    trained = client.forward([example], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    tokens = [*example.model_input.to_ints(), example.loss_fn_inputs["target_tokens"].data[-1]]
    sampler = client.save_weights_and_get_sampling_client().result()
    sampled = sampler.compute_logprobs(tinker.ModelInput.from_ints([int(token) for token in tokens])).result()
    assert sampled[0] is None
    np.testing.assert_allclose(np.array(sampled[1:], dtype=float), trained, atol=1e-4)


def test_samples_repeat_with_a_seed_and_differ_within_a_group(service: tinker.ServiceClient) -> None:
    sampler = service.create_sampling_client(base_model="fake/model").result()
    prompt = tinker.ModelInput.from_ints([5, 6, 7])
    params = tinker.SamplingParams(max_tokens=12, seed=4, temperature=1.0)
    answers = [sampler.sample(prompt, num_samples=4, sampling_params=params).result() for _ in range(2)]
    tokens = [[sequence.tokens for sequence in answer.sequences] for answer in answers]
    assert tokens[0] == tokens[1]
    assert len({tuple(sequence) for sequence in tokens[0]}) > 1


def test_a_saved_sampler_is_found_by_its_path(service: tinker.ServiceClient) -> None:
    client = client_of(service)
    client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(ADAM).result()
    path = client.save_weights_for_sampler("final").result().path
    prompt = tinker.ModelInput.from_ints([1, 2, 3])
    saved = service.create_sampling_client(model_path=path).result()
    live = client.save_weights_and_get_sampling_client().result()
    assert saved.compute_logprobs(prompt).result() == live.compute_logprobs(prompt).result()


def test_a_custom_loss_on_the_client(service: tinker.ServiceClient) -> None:
    torch = pytest.importorskip("torch")
    plain, custom = client_of(service), client_of(service)

    def nll(data: list[tinker.Datum], logprobs: list[object]) -> tuple[object, dict[str, float]]:
        total = -sum(torch.as_tensor(values).sum() for values in logprobs)
        return total, {"seen": float(len(data))}

    plain.forward_backward([datum()], "cross_entropy").result()
    result = custom.forward_backward_custom([datum()], nll).result()
    assert result.metrics["seen"] == 1.0
    norms = []
    for client in (plain, custom):
        metrics = client.optim_step(ADAM).result().metrics
        assert metrics is not None
        norms.append(metrics["unclipped_grad_l2:mean"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_runs_and_checkpoints_are_listed(service: tinker.ServiceClient) -> None:
    client = service.create_lora_training_client(
        "fake/model", rank=4, seed=1, user_metadata={"renderer_name": "plain"}
    ).result()
    path = client.save_state("one", ttl_seconds=7200, user_metadata={"note": "x"}).result().path
    rest = service.create_rest_client()
    run = rest.get_training_run_by_tinker_path(path).result()
    assert (run.base_model, run.lora_rank, run.user_metadata) == ("fake/model", 4, {"renderer_name": "plain"})
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == path
    listed = rest.list_checkpoints(run.training_run_id).result().checkpoints
    assert [(checkpoint.checkpoint_id, checkpoint.user_metadata) for checkpoint in listed] == [
        ("weights/one", {"note": "x"})
    ]
    assert listed[0].expires_at is not None
    assert path in [
        checkpoint.tinker_path for checkpoint in rest.list_user_checkpoints().result().checkpoints
    ]
    info = rest.get_weights_info_by_tinker_path(path).result()
    assert (info.base_model, info.lora_rank) == ("fake/model", 4)
    rest.publish_checkpoint_from_tinker_path(path).result()
    rest.publish_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(run.training_run_id).result().checkpoints[0].public
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_checkpoints(run.training_run_id).result().checkpoints == []
    with pytest.raises(tinker.NotFoundError):
        service.create_training_client_from_state(path).result()


def test_a_run_outlives_the_checkpoint_it_began_at(service: tinker.ServiceClient) -> None:
    client = client_of(service)
    path = client.save_state("origin").result().path
    child = service.create_training_client_from_state(path).result()
    service.create_rest_client().delete_checkpoint_from_tinker_path(path).result()
    assert child.forward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0


def test_what_is_wrong_is_said_by_the_future_and_the_run_goes_on(service: tinker.ServiceClient) -> None:
    client = client_of(service)
    with pytest.raises(tinker.RequestFailedError, match="no_such_loss"):
        client.forward_backward([datum()], "no_such_loss").result()  # type: ignore[arg-type]
    client.save_state("taken").result()
    with pytest.raises(tinker.RequestFailedError, match="exists already"):
        client.save_state("taken").result()
    client.save_state("taken", overwrite=True).result()
    assert client.forward_backward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0
