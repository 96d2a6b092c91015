"""What kills engines is found out, and nothing that ran beside it is blamed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.gateway.conftest import KEY, datum
from tests.served import ServedGateway

DEADLY = 251
"""A token that no other data has."""
DIES = {"delay_s": 0.05, "crash_on_token": DEADLY}
DIED = "the engine died 2 times"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    engine = {"name": "fake", "plugin": "fake", "base_model": "fake/model", "options": DIES}
    gateway = ServedGateway(tmp_path_factory.mktemp("deadly"), [engine], engine_restart_delay_s="0.05")
    gateway.start()
    yield gateway
    gateway.close()


def deadly_datum() -> tinker.Datum:
    harmless = datum()
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([DEADLY] * harmless.model_input.length),
        loss_fn_inputs=harmless.loss_fn_inputs,
    )


def test_a_sample_that_kills_the_engine_takes_no_training_with_it(gateway: ServedGateway) -> None:
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
        sampler = service.create_sampling_client(base_model="fake/model").result()
        params = tinker.SamplingParams(max_tokens=4, seed=1)
        passes = [client.forward_backward([datum(seed)], "cross_entropy") for seed in range(60)]
        deadly = sampler.sample(tinker.ModelInput.from_ints([DEADLY]), num_samples=1, sampling_params=params)
        harmless = [
            sampler.sample(tinker.ModelInput.from_ints([1, 2]), num_samples=1, sampling_params=params)
            for _ in range(3)
        ]
        with pytest.raises(tinker.RequestFailedError, match=DIED):
            deadly.result()
        assert all(future.result().metrics["loss:sum"] > 0 for future in passes)
        assert all(len(future.result().sequences[0].tokens) <= 4 for future in harmless)


def test_an_operation_that_kills_the_engine_takes_no_sample_and_no_other_run_with_it(
    gateway: ServedGateway,
) -> None:
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        guilty = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
        beside = service.create_lora_training_client("fake/model", rank=4, seed=2).result()
        sampler = service.create_sampling_client(base_model="fake/model").result()
        long = tinker.SamplingParams(max_tokens=60, seed=1, stop=[])
        samples = [
            sampler.sample(tinker.ModelInput.from_ints([1, 2]), num_samples=1, sampling_params=long)
            for _ in range(3)
        ]
        passes = [beside.forward_backward([datum(seed)], "cross_entropy") for seed in range(20)]
        deadly = guilty.forward_backward([deadly_datum()], "cross_entropy")
        afterwards = guilty.forward_backward([datum()], "cross_entropy")
        with pytest.raises(tinker.RequestFailedError, match=DIED):
            deadly.result()
        assert afterwards.result().metrics["loss:sum"] > 0
        assert all(future.result().metrics["loss:sum"] > 0 for future in passes)
        assert all(len(future.result().sequences[0].tokens) == 60 for future in samples)


def test_the_log_names_what_the_engine_died_over(gateway: ServedGateway) -> None:
    assert "failed: the engine died 2 times while it performed this operation" in gateway.log.read_text()


def test_a_gateway_that_dies_blames_nobody(tmp_path: Path) -> None:
    slow = {"name": "fake", "plugin": "fake", "base_model": "fake/model", "options": {"delay_s": 1.0}}
    gateway = ServedGateway(tmp_path / "data", [slow], max_attempts="1")
    gateway.start()
    try:
        with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
            client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
            under_way = client.forward_backward([datum()], "cross_entropy")
            time.sleep(0.5)  # it is in the engine now, for another half second
            gateway.kill()
            gateway.start()
            assert under_way.result().metrics["loss:sum"] > 0
    finally:
        gateway.close()
