"""A client whose connection loses, repeats and reorders requests gets what an undisturbed one gets, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
import tinker

from tests.chaos.comparison import ANSWERS, compare
from tests.chaos.proxy import Proxy, Trouble
from tests.chaos.workload import (
    KEY,
    calls_of_run,
    example,
)
from tests.served import ServedGateway

SESSIONS = 15
"""So many that some creations are sure to lose their answer."""


@pytest.fixture
def troubled(gateway: ServedGateway) -> Iterator[Proxy]:
    with Proxy(gateway.port, Trouble(), seed=3, answers=ANSWERS).running() as proxy:
        yield proxy


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("hurried_sdk")
def test_two_hundred_pipelined_steps_end_with_the_same_weights(gateway: ServedGateway) -> None:
    compare(gateway, steps=200, seed=3)


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("hurried_sdk")
def test_runs_samplers_and_samples_are_made_once(gateway: ServedGateway, troubled: Proxy) -> None:
    with tinker.ServiceClient(base_url=troubled.url, api_key=KEY, display_name="once") as service:
        begun = [service.create_lora_training_client("fake/model", rank=2, seed=n) for n in range(3)]
        clients = [future.result(timeout=60) for future in begun]
        opened = [service.create_sampling_client(base_model="fake/model") for _ in range(3)]
        samplers = [future.result(timeout=60) for future in opened]
        for client in clients:
            client.forward_backward([example(1)], "cross_entropy").result(timeout=60)
            client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result(timeout=60)
            samplers.append(client.save_weights_and_get_sampling_client().result(timeout=60))
            client.save_state("kept").result(timeout=60)
        params = tinker.SamplingParams(max_tokens=5, seed=7, stop=[])
        prompt = tinker.ModelInput.from_ints([5, 6, 7])
        sent = [sampler.sample(prompt, 2, params) for sampler in samplers for _ in range(10)]
        drawn = [[sequence.tokens for sequence in future.result(timeout=60).sequences] for future in sent]
        for index in range(len(samplers)):
            alike = drawn[10 * index : 10 * index + 10]
            assert all(tokens == alike[0] for tokens in alike)
        run_id = clients[0].get_info().model_id
    session_id = run_id.split(":")[0]
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}) as http:
        sessions = http.get("/admin/v1/sessions", params={"limit": 1000}).raise_for_status().json()["items"]
        session = http.get(f"/api/v1/sessions/{session_id}").raise_for_status().json()
        checkpoints = http.get("/api/v1/checkpoints", params={"limit": 1000}).json()["checkpoints"]
    assert [item["session_id"] for item in sessions if item["display_name"] == "once"] == [session_id]
    assert len(session["training_run_ids"]) == 3
    assert len(session["sampler_ids"]) == 6
    saved = [item for item in checkpoints if item["tinker_path"].startswith(f"tinker://{session_id}")]
    assert len(saved) == 3
    for run_id in session["training_run_ids"]:
        calls = calls_of_run(gateway, run_id)
        kinds = ["create_run", "forward_backward", "optim_step"]
        assert calls == Counter({("save_weights", "done"): 2, **{(kind, "done"): 1 for kind in kinds}})


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("hurried_sdk")
def test_sessions_are_made_once(gateway: ServedGateway, troubled: Proxy) -> None:
    """A session has no number; a repeated request is known by its idempotency key."""
    for _ in range(SESSIONS):
        with tinker.ServiceClient(base_url=troubled.url, api_key=KEY, display_name="counted") as service:
            service.create_sampling_client(base_model="fake/model").result(timeout=60)
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}) as http:
        sessions = http.get("/admin/v1/sessions", params={"limit": 1000}).raise_for_status().json()["items"]
    assert len([item for item in sessions if item["display_name"] == "counted"]) == SESSIONS
