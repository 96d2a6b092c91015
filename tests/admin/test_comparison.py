"""Comparing a sampler with the trainer: equal engines differ by nothing, others by what they differ."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import numpy as np
import pytest

from engines.operations import ForwardResult, SampledSequence, SampleRequest, SampleResult
from engines.tensors import Tensor
from gateway.admin.comparison import _differences
from sdk import AdminClient
from tests.gateway.conftest import KEY, begin_run, outcome, send_pass, send_step
from tests.gateway.test_two_engines import SAMPLER, TRAINER, sampler_of
from tests.served import ServedGateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    served = ServedGateway(tmp_path_factory.mktemp("compared"), [{**TRAINER, "roles": ["train"]}, SAMPLER])
    served.start()
    yield served
    served.stop()
    served.close()


@pytest.fixture
def client(gateway: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client


def test_the_trainers_forward_pass_is_compared_with_what_was_drawn(
    gateway: ServedGateway, client: httpx.Client
) -> None:
    sampler_id = sampler_of(client, rank=4)
    with AdminClient(gateway.url, key=KEY) as admin:
        found = admin.compare_sampler(sampler_id, samples=3, max_tokens=5, prompt=[1, 2, 3])
        assert (found.sampled_by, found.trained_by, found.tokens) == ("sampler", "trainer", 15)
        assert found.mean_difference <= found.max_difference < 1e-5
        assert found.run_id is not None
        run = admin.run(found.run_id)
        assert run.sampler_difference is not None
        assert run.sampler_difference.max_difference == found.max_difference


def test_trained_weights_are_compared_and_nothing_stays(gateway: ServedGateway, client: httpx.Client) -> None:
    run_id = begin_run(client)
    for seq_id in (1, 3):
        outcome(client, send_pass(client, run_id, seq_id, [1, 2, 3, 4]).json()["request_id"])
        outcome(client, send_step(client, run_id, seq_id + 1).json()["request_id"])
    save = {"model_id": run_id, "seq_id": 5, "sampling_session_seq_id": 0}
    promise = client.post("/api/v1/save_weights_for_sampler", json=save).json()
    sampler_id = outcome(client, promise["request_id"])["sampling_session_id"]
    answer = client.post(f"/admin/v1/samplers/{sampler_id}/compare", json={})
    assert answer.status_code == 200, answer.text
    assert answer.json()["tokens"] == 8 * 32 and answer.json()["max_difference"] < 1e-5
    time.sleep(2)  # the engine has told of its runs since
    runs = len(client.get("/admin/v1/runs").json()["items"])
    deadline = time.monotonic() + 30
    while client.get("/admin/v1/engines/trainer").json()["stats"].get("resident_runs") != runs:
        assert time.monotonic() < deadline, "the comparison's own run has stayed"
        time.sleep(0.1)
    # the run's own log goes on
    result = outcome(client, send_pass(client, run_id, 6, [1, 2, 3, 4]).json()["request_id"])
    assert "error" not in result


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"samples": 0}, 422),
        ({"max_tokens": 100_000}, 422),
        ({"prompt": [-1]}, 400),
        ({"prompt": [10**12]}, 400),
        ({"prompt": [999_999]}, 400),
    ],
)
def test_what_cannot_be_compared_is_refused(
    client: httpx.Client, body: dict[str, object], status: int
) -> None:
    answer = client.post(f"/admin/v1/samplers/{sampler_of(client, rank=4)}/compare", json=body)
    assert answer.status_code == status, answer.text


def test_an_unknown_sampler_is_not_found(client: httpx.Client) -> None:
    assert client.post("/admin/v1/samplers/none/compare", json={}).status_code == 404


def test_differences_are_those_of_the_drawn_tokens() -> None:
    """Of a prompt of two tokens, the trainer's first number belongs to its second token."""
    floats = [np.array(values, dtype=np.float32) for values in ([-1.0, -2.0], [-9.0, -1.5, -2.0])]
    drawn = SampledSequence(Tensor.of(np.array([5, 6], dtype=np.int32)), Tensor.of(floats[0]), "length")
    request = SampleRequest(prompt=Tensor.of(np.array([1, 2], dtype=np.int32)), num_samples=1, seed=0)
    expected = ForwardResult([{"logprobs": Tensor.of(floats[1])}], {})
    assert _differences(request, SampleResult([drawn]), expected).tolist() == [0.5, 0.0]


def test_it_outlives_the_gateway(gateway: ServedGateway, client: httpx.Client) -> None:
    """The last test here: engines have other runs in memory after a restart."""
    sampler_id = sampler_of(client, rank=4)
    with AdminClient(gateway.url, key=KEY) as admin:
        found = admin.compare_sampler(sampler_id, samples=1, max_tokens=2)
        assert found.run_id is not None
        before = admin.run(found.run_id).sampler_difference
        assert before is not None and before.tokens == 2
        gateway.stop()
        gateway.start()
        assert admin.run(found.run_id).sampler_difference == before
