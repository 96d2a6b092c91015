"""One base model, trained by one engine and sampled by another: who answers, and where that can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest

from engines.interface import EngineInfo
from engines.operations import LoraSpec, SampleRequest
from engines.tensors import Matrix, Tensor
from gateway.dispatch import Dispatcher
from gateway.engine_settings import EngineSettings
from gateway.errors import NotFound
from gateway.fleet import Fleet, Needs
from gateway.replicas import Replicas
from gateway.submit import lora_json
from gateway.supervisor import EngineState
from tests.gateway.conftest import KEY, begin_run, outcome
from tests.served import ServedGateway

TRAINER = {"name": "trainer", "plugin": "fake", "base_model": "fake/model"}
SAMPLER = {
    "name": "sampler",
    "plugin": "fake",
    "base_model": "fake/model",
    "roles": ["sample"],
    "options": {"max_rank": 8},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    served = ServedGateway(tmp_path_factory.mktemp("two"), [TRAINER, SAMPLER])
    served.start()
    yield served
    served.stop()
    served.close()


@pytest.fixture
def client(gateway: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield client


def sampler_of(client: httpx.Client, rank: int) -> str:
    """A sampler of a run's weights."""
    run_id = begin_run(client, rank=rank)
    save = {"model_id": run_id, "seq_id": 1, "sampling_session_seq_id": 0}
    promise = client.post("/api/v1/save_weights_for_sampler", json=save).json()
    result = outcome(client, promise["request_id"])
    return str(result["sampling_session_id"])


def sample(client: httpx.Client, sampler_id: str | None, **more: Any) -> dict[str, Any]:
    """A sample's future in the admin API, once it has come."""
    body: dict[str, Any] = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
        "sampling_params": {"max_tokens": 2},
        "num_samples": 1,
        **({"base_model": "fake/model"} if sampler_id is None else {"sampling_session_id": sampler_id}),
        **more,
    }
    promise = client.post("/api/v1/asample", json=body).json()
    result = outcome(client, promise["request_id"])
    assert result.get("type") == "sample", result
    future: dict[str, Any] = client.get(f"/admin/v1/futures/{promise['request_id']}").json()
    return future


@pytest.mark.parametrize(("rank", "engine"), [(4, "sampler"), (16, "trainer")])
def test_samples_go_to_the_engine_that_serves_their_adapter(
    client: httpx.Client, rank: int, engine: str
) -> None:
    sampler_id = sampler_of(client, rank)
    assert client.get(f"/admin/v1/samplers/{sampler_id}").json()["engine"] == engine
    assert sample(client, sampler_id, seq_id=1)["engine"] == engine


def test_the_base_model_is_sampled_beside_training(client: httpx.Client) -> None:
    assert sample(client, None)["engine"] == "sampler"


def test_openai_requests_go_the_same_way(client: httpx.Client) -> None:
    before = client.get("/admin/v1/metrics").json()["engines"]
    body = {"model": "fake/model", "prompt": "abc", "max_tokens": 2}
    answer = client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200, answer.text
    assert before.keys() == {"trainer", "sampler"}


def test_one_model_is_told_of(client: httpx.Client) -> None:
    [model] = client.get("/api/v1/get_server_capabilities").json()["supported_models"]
    assert (model["trainable"], model["sampleable"]) == (True, True)


# ---------------------------------------------------------------------------- the choice


def engine(name: str, roles: tuple[str, ...], info: EngineInfo | None, state: EngineState) -> Dispatcher:
    settings = EngineSettings(name=name, base_model="m", roles=cast(Any, roles))
    supervisor = SimpleNamespace(engine=settings, info=info, wherever=state)
    return cast(Dispatcher, SimpleNamespace(name=name, supervisor=supervisor))


def info(**limits: Any) -> EngineInfo:
    return EngineInfo(
        base_model="m",
        architecture="a",
        roles=("sample",),
        vocab_size=9,
        max_context=9,
        losses=(),
        eos_tokens=(),
        max_top_logprobs=9,
        device="cpu",
        dtype="float32",
        deterministic=False,
        versions={},
        **{"max_rank": 16, **limits},
    )


NARROW = {"train_unembed": False, "any_prompt_token": False}
TARGETS = SampleRequest(
    prompt=Tensor.of(np.array([1, 2], dtype=np.int32)),
    num_samples=1,
    seed=0,
    target_prompt_tokens=Matrix((1, 1), Tensor.of(np.array([[3]], dtype=np.int64))),
)
PLAIN = SampleRequest(prompt=TARGETS.prompt, num_samples=1, seed=0)


def fleet(
    narrow: EngineInfo | None, state: EngineState = EngineState.READY, *, trainer_samples: bool = True
) -> Fleet:
    made = Fleet.__new__(Fleet)
    roles = ("train", "sample") if trainer_samples else ("train",)
    dispatchers = [
        engine("wide", roles, info(max_rank=128), EngineState.READY),
        engine("narrow", ("sample",), narrow, state),
    ]
    made.entries = {
        each.name: cast(Replicas, SimpleNamespace(entry=each.supervisor.engine, active={1: each}))
        for each in dispatchers
    }
    made.dispatchers = {each.name: each for each in dispatchers}
    return made


@pytest.mark.parametrize(
    ("lora", "request_", "expected"),
    [
        (None, PLAIN, "narrow"),
        (LoraSpec(8, 1, train_unembed=False), PLAIN, "narrow"),
        (LoraSpec(8, 1), PLAIN, "wide"),
        (LoraSpec(32, 1, train_unembed=False), PLAIN, "wide"),
        (None, TARGETS, "wide"),
        (None, SampleRequest(prompt=PLAIN.prompt, num_samples=1, seed=0, prompt_alternatives=2), "wide"),
    ],
)
def test_what_the_sampling_engine_cannot_do_the_training_one_does(
    lora: LoraSpec | None, request_: SampleRequest, expected: str
) -> None:
    needs = Needs.of(lora_json(lora) if lora is not None else None, request_)
    assert fleet(info(**NARROW)).to_sample("m", needs).name == expected


def test_without_another_engine_the_one_there_is_refuses_by_itself() -> None:
    needs = Needs.of(lora_json(LoraSpec(8, 1)))
    assert fleet(info(**NARROW), trainer_samples=False).to_sample("m", needs).name == "narrow"


def test_an_engine_that_starts_is_waited_for_and_one_that_cannot_load_is_not() -> None:
    adapter = Needs.of(lora_json(LoraSpec(8, 1, train_unembed=False)))
    assert fleet(None, EngineState.STARTING).to_sample("m", adapter).name == "narrow"
    assert (
        fleet(None, EngineState.STARTING).to_sample("m", Needs.of(lora_json(LoraSpec(8, 1)))).name == "wide"
    )
    assert fleet(None, EngineState.FAILED).to_sample("m", adapter).name == "wide"
    assert fleet(info(**NARROW), EngineState.DOWN).to_sample("m", adapter).name == "narrow"


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(NotFound, match="'other' is not sampled here; available: m"):
        fleet(info()).to_sample("other", Needs())
