"""Sampling through the official SDK: everything that it can ask about a prompt, clones, and other processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tinker
import torch
from numpy.typing import NDArray

from tests.gateway.conftest import KEY, begin_run, datum, outcome, send_pass, send_step
from tests.served import FAKE_ENGINE, TINY_ENGINE, ServedGateway

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
PROMPT = [1, 2, 3, 4, 5, 6]
ONE_TOKEN = tinker.SamplingParams(max_tokens=1, seed=1)


def trained(service: tinker.ServiceClient) -> tuple[tinker.TrainingClient, tinker.SamplingClient]:
    """A run that has learned something, and a sampler of it."""
    client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
    for seed in range(4):
        client.forward_backward([datum(seed)], "cross_entropy").result()
        client.optim_step(tinker.AdamParams(learning_rate=0.02)).result()
    return client, client.save_weights_and_get_sampling_client().result()


def scored(client: tinker.TrainingClient, cells: NDArray[Any]) -> NDArray[Any]:
    """The trainer's log-probs of K targets after each token but the last."""
    inputs = {
        "target_tokens": tinker.TensorData.from_numpy(cells.astype(np.int64)),
        "weights": tinker.TensorData.from_numpy(np.ones(cells.shape, np.float32)),
    }
    example = tinker.Datum(model_input=tinker.ModelInput.from_ints(PROMPT[:-1]), loss_fn_inputs=inputs)
    outputs = client.forward([example], "cross_entropy").result().loss_fn_outputs
    found: NDArray[Any] = outputs[0]["logprobs"].to_numpy()
    return found


@pytest.mark.parametrize("sparse", [False, True])
def test_named_and_drawn_tokens_have_the_trainers_log_probs(
    service: tinker.ServiceClient, sparse: bool
) -> None:
    client, sampler = trained(service)
    cells = torch.full((5, 30), -1)
    cells[0, 3], cells[2, 29], cells[2, 0], cells[4, 1] = 7, 0, 258, 9
    sent = (
        tinker.TensorData.from_torch_sparse(cells, pad_value=-1)
        if sparse
        else tinker.TensorData.from_torch(cells)
    )
    assert (sent.sparse_crow_indices is not None) is sparse
    result = sampler.sample(
        tinker.ModelInput.from_ints(PROMPT),
        1,
        ONE_TOKEN,
        target_prompt_logprobs=sent,
        prompt_alt_tokens_k=6,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
    ).result()
    found, drawn = result.target_prompt_logprobs, result.prompt_alt_tokens
    assert found is not None and drawn is not None
    assert (found.sparse_crow_indices, found.sparse_col_indices) == (
        sent.sparse_crow_indices,
        sent.sparse_col_indices,
    )
    listed = cells.numpy() >= 0
    expected = np.where(listed, scored(client, cells.clamp(min=0).numpy()), 0.0)
    np.testing.assert_allclose(found.to_numpy(), expected, atol=1e-5)
    assert np.abs(expected[listed]).min() > 0
    tokens = drawn.tokens.to_numpy()
    assert tokens.shape == (5, 6)
    np.testing.assert_allclose(drawn.logprobs.to_numpy(), scored(client, tokens), atol=1e-5)
    own = scored(client, np.array(PROMPT[1:])[:, None])[:, 0]
    np.testing.assert_allclose(result.prompt_logprobs[1:], own, atol=1e-5)  # type: ignore[index,arg-type]
    assert result.topk_prompt_logprobs is not None and result.topk_prompt_logprobs[0] is None
    best = result.topk_prompt_logprobs[3]
    assert best is not None
    np.testing.assert_allclose(
        [score for _, score in best],
        np.sort(scored(client, np.tile(np.arange(259), (5, 1)))[2])[:-3:-1],
        atol=1e-5,
    )


def test_the_last_tokens_of_a_prompt_alone(service: tinker.ServiceClient) -> None:
    """The SDK itself raises when earlier ones are scored."""
    _, sampler = trained(service)
    prompt = tinker.ModelInput.from_ints(PROMPT)
    whole = sampler.compute_logprobs(prompt).result()
    last = sampler.compute_logprobs(prompt, prompt_logprobs_last_n=2).result()
    assert last == [None] * 4 + whole[-2:]
    assert all(score is not None for score in whole[1:])


def test_alternatives_of_sampled_tokens(service: tinker.ServiceClient) -> None:
    """As many as are asked for, best first; a token's own log-prob is among them when it is one of the best."""
    sampler = service.create_sampling_client(base_model="fake/model")
    params = tinker.SamplingParams(max_tokens=5, seed=3, temperature=0.5, stop=[])
    result = sampler.sample(tinker.ModelInput.from_ints(PROMPT), 2, params, topk_sample_logprobs=259).result()
    for sequence in result.sequences:
        assert sequence.topk_logprobs is not None and sequence.logprobs is not None
        assert len(sequence.topk_logprobs) == len(sequence.tokens) == 5
        for token, logprob, best in zip(
            sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True
        ):
            assert best is not None and len(best) == 259
            scores = [score for _, score in best]
            assert scores == sorted(scores, reverse=True)
            assert dict(best)[token] == pytest.approx(logprob, abs=1e-6)
            assert sum(math.exp(score) for score in scores) == pytest.approx(1, abs=1e-4)


def test_a_sampler_of_stability_records_is_told_what_there_is(service: tinker.ServiceClient) -> None:
    client, _ = trained(service)
    sampler = client.save_weights_and_get_sampling_client(record_stability_info=True).result()
    with pytest.raises(
        tinker.RequestFailedError, match=r"record_stability_info.* importance_sampling, ppo or cispo"
    ):
        sampler.sample(tinker.ModelInput.from_ints(PROMPT), 1, ONE_TOKEN).result()


# ---------------------------------------------------------------------------- identity


def test_samples_have_64_bit_numbers_and_no_order(http: httpx.Client) -> None:
    """The blocks of clones, out of order, with gaps; a repeated number is the sample that it was at first."""
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    sampler = http.post(
        "/api/v1/create_sampling_session",
        json={"session_id": session, "sampling_session_seq_id": 0, "base_model": "fake/model"},
    ).json()["sampling_session_id"]
    numbers = [10**18 + 999_999_999, 0, 7 * 10**9 + 5, 2**63 - 1, 1, 10**9, 7 * 10**9 + 4]

    def ask(seq_id: int, seed: int) -> str:
        body = {
            "sampling_session_id": sampler,
            "seq_id": seq_id,
            "prompt": {"chunks": [{"tokens": PROMPT}]},
            "sampling_params": {"max_tokens": 6, "seed": seed, "stop": []},
            "num_samples": 2,
        }
        promise = http.post("/api/v1/asample", json=body).json()
        assert len(set(promise["sample_sequence_ids"])) == 2
        return str(promise["request_id"])

    promises = {number: ask(number, seed) for seed, number in enumerate(numbers)}
    assert len(set(promises.values())) == len(numbers)
    results = {number: outcome(http, promises[number])["sequences"] for number in reversed(numbers)}
    for seed, number in enumerate(numbers):
        assert ask(number, seed) == promises[number]
        assert outcome(http, promises[number])["sequences"] == results[number]
        assert outcome(http, ask(10**12 + seed, seed))["sequences"] == results[number]


def _draw_elsewhere(sampler: Any, seed: int, answers: Any) -> None:
    """In another process: a sampler that came by pickle, or as a handle."""
    if isinstance(sampler, str):
        sampler = tinker.SamplingClient.from_sampler_handle(sampler, api_key=KEY)
    params = tinker.SamplingParams(max_tokens=8, seed=seed, stop=[])
    result = sampler.sample(tinker.ModelInput.from_ints(PROMPT), 1, params).result()
    answers.put((sampler._cloned_sampler_id, result.sequences[0].tokens, result.sequences[0].logprobs))


@pytest.mark.parametrize("form", ["pickle", "handle"])
def test_another_process_samples_the_same_weights(service: tinker.ServiceClient, form: str) -> None:
    client, sampler = trained(service)
    client.optim_step(tinker.AdamParams(learning_rate=1.0)).result()
    params = tinker.SamplingParams(max_tokens=8, seed=5, stop=[])
    here = sampler.sample(tinker.ModelInput.from_ints(PROMPT), 1, params).result().sequences[0]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    sent = sampler if form == "pickle" else sampler.get_sampler_handle()
    workers = [context.Process(target=_draw_elsewhere, args=(sent, 5, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=30)
    assert len({clone for clone, _, _ in found}) == 2
    assert all(clone >= 1 for clone, _, _ in found)
    for _, tokens, logprobs in found:
        assert (tokens, logprobs) == (here.tokens, here.logprobs)


@pytest.mark.slow
def test_what_was_reused_of_a_prompt_is_told(tmp_path: Path) -> None:
    """With the Transformers engine: within one sampler, and nothing between two."""
    gateway = ServedGateway(tmp_path, [TINY_ENGINE])
    gateway.start(timeout_s=120)
    try:
        with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
            one, other = (service.create_sampling_client(base_model="tandem/tiny") for _ in range(2))
            params = tinker.SamplingParams(max_tokens=1, seed=1)
            first, longer = list(range(100, 160)), list(range(100, 175))

            def told(sampler: tinker.SamplingClient, tokens: list[int], samples: int = 1) -> int:
                prompt = tinker.ModelInput.from_ints(tokens)
                return sampler.sample(prompt, samples, params).result().prompt_cache_hit_tokens

            assert told(one, first, samples=4) == 0
            assert told(one, longer, samples=4) == 60
            assert told(other, longer) == 0
            prompt = tinker.ModelInput.from_ints([*longer, 5, 6])
            whole = one.compute_logprobs(prompt).result()
            last = one.compute_logprobs(prompt, prompt_logprobs_last_n=2).result()
            assert last[:-2] == [None] * 75
            np.testing.assert_allclose(last[-2:], whole[-2:], atol=1e-4)  # type: ignore[arg-type]
    finally:
        gateway.close()


# ---------------------------------------------------------------------------- inflight


def step(client: tinker.TrainingClient, rate: float = 0.05) -> None:
    client.forward_backward([datum(9)], "cross_entropy").result()
    client.optim_step(tinker.AdamParams(learning_rate=rate)).result()


def told(sampler: tinker.SamplingClient) -> list[Any]:
    """What tells one set of weights from another."""
    return list(sampler.compute_logprobs(tinker.ModelInput.from_ints(PROMPT)).result())


def test_inflight_samplers_follow_the_newest_inflight_save(service: tinker.ServiceClient) -> None:
    """Existing and new ones, not snapshots; neither training nor a snapshot that is saved later moves them."""
    client, snapshot = trained(service)
    first = client.save_weights_and_get_sampling_client(kind="inflight").result()
    before = told(first)
    assert before == told(snapshot)
    step(client)
    later = client.save_weights_and_get_sampling_client().result()
    assert told(first) == before != told(later)
    step(client)
    second = client.save_weights_and_get_sampling_client(kind="inflight").result()
    assert told(first) == told(second)
    assert told(second) not in (before, told(later))
    assert told(snapshot) == before
    assert first.get_base_model() == "fake/model"


def test_inflight_samplers_of_other_runs_are_others(service: tinker.ServiceClient) -> None:
    one, _ = trained(service)
    other, _ = trained(service)
    sampler = one.save_weights_and_get_sampling_client(kind="inflight").result()
    before = told(sampler)
    step(other, rate=1.0)
    assert told(other.save_weights_and_get_sampling_client(kind="inflight").result()) != before
    assert told(sampler) == before


def test_an_inflight_sampler_in_another_process_follows_too(service: tinker.ServiceClient) -> None:
    client, _ = trained(service)
    sampler = client.save_weights_and_get_sampling_client(kind="inflight").result()
    step(client, rate=1.0)
    newest = client.save_weights_and_get_sampling_client(kind="inflight").result()
    params = tinker.SamplingParams(max_tokens=8, seed=5, stop=[])
    expected = newest.sample(tinker.ModelInput.from_ints(PROMPT), 1, params).result().sequences[0]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    worker = context.Process(target=_draw_elsewhere, args=(sampler, 5, answers))
    worker.start()
    _, tokens, logprobs = answers.get(timeout=60)
    worker.join(timeout=30)
    assert (tokens, logprobs) == (expected.tokens, expected.logprobs)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "inflight", "path": "named"}, "kind is inflight, which has no name"),
        ({"kind": "inflight", "sampling_session_seq_id": 9, "ttl_seconds": 3600}, "give it a name in path"),
        ({"kind": "mutable", "sampling_session_seq_id": 9}, "allowed are snapshot and inflight"),
    ],
)
def test_kinds_that_there_are_not(http: httpx.Client, fields: dict[str, Any], words: str) -> None:
    run = begin_run(http)
    promise = http.post(
        "/api/v1/save_weights_for_sampler", json={"model_id": run, "seq_id": 1, **fields}
    ).json()
    failed = outcome(http, promise["request_id"])
    assert failed["category"] == "user" and words in failed["error"]


@pytest.mark.slow
def test_a_sample_keeps_the_weights_that_it_was_accepted_with(tmp_path: Path) -> None:
    """Accepted while its engine is dead; newer weights are published before it is drawn. The input has the old ones."""
    gateway = ServedGateway(tmp_path, [{**FAKE_ENGINE, "options": {"delay_s": 0.2}}])
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as http:
            run = begin_run(http)
            train(http, run, 1)
            first = publish(http, run, 3, 0)
            drawn = [outcome(http, draw(http, first, number))["sequences"] for number in (0, 1)]
            assert drawn[0] == drawn[1]
            accepted = draw(http, first, 2, max_tokens=40)
            os.kill(gateway.engine_pids()[0], signal.SIGKILL)
            train(http, run, 4)
            publish(http, run, 6, 1)
            newer = outcome(http, draw(http, first, 3))["sequences"]
            assert newer != drawn[0]
            again = outcome(http, accepted)["sequences"][0]
            assert again["tokens"][:8] == drawn[0][0]["tokens"]
            assert again["logprobs"][:8] == drawn[0][0]["logprobs"]
    finally:
        gateway.close()


def train(http: httpx.Client, run: str, seq_id: int) -> None:
    send_pass(http, run, seq_id, [*PROMPT, 7, 8])
    promise = send_step(http, run, seq_id + 1, learning_rate=0.3).json()
    assert "error" not in outcome(http, promise["request_id"])


def publish(http: httpx.Client, run: str, seq_id: int, number: int) -> str:
    """Save inflight weights; the sampler's id."""
    body = {"model_id": run, "seq_id": seq_id, "sampling_session_seq_id": number, "kind": "inflight"}
    promise = http.post("/api/v1/save_weights_for_sampler", json=body).json()
    return str(outcome(http, promise["request_id"])["sampling_session_id"])


def draw(http: httpx.Client, sampler: str, seq_id: int, max_tokens: int = 8) -> str:
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt": {"chunks": [{"tokens": PROMPT}]},
        "sampling_params": {"max_tokens": max_tokens, "seed": 3, "stop": []},
    }
    return str(http.post("/api/v1/asample", json=body).json()["request_id"])
