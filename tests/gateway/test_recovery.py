"""Processes are killed; clients see a pause, then the same numbers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tinker

from tests.gateway.conftest import KEY, begin_run, datum, send_step
from tests.postgres import PostgresServer
from tests.served import ServedGateway, has_ended
from tests.threads import beside

# The SDK warns of its own deprecations, and leaves the connections of its background loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
STEPS = 30
ADAM = tinker.AdamParams(learning_rate=0.01)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def mortal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServedGateway]:
    """A gateway of this test's own, started and ended by it."""
    settings = {"lease_s": "4", "engine_owner_timeout_s": "2.5"}
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("pg_server")
        template: str = request.getfixturevalue("_pg_template")
        settings["database_url"] = server.url(server.create_database(template=template))
    gateway = ServedGateway(tmp_path / "data", None, **settings)
    yield gateway
    gateway.close()


def train(
    gateway: ServedGateway, disasters: dict[int, Callable[[ServedGateway], None]]
) -> tuple[list[float], bytes]:
    """Losses of a pipelined run, and the final adapter; at some steps something happens to the processes."""
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
        passes, steps = [], []
        for step in range(STEPS):
            passes.append(client.forward_backward([datum(step)], "cross_entropy"))
            steps.append(client.optim_step(ADAM))
            if step in disasters:
                disasters[step](gateway)
        losses = [future.result().metrics["loss:sum"] for future in passes]
        assert all(future.result() for future in steps)
        client.save_state("end").result()
    [adapter] = gateway.data_dir.glob("storage/checkpoints/*/adapter_model.safetensors")
    return losses, adapter.read_bytes()


def kill_engine(gateway: ServedGateway) -> None:
    ready = {"fake": "ready"}  # and not still at the gateway that was killed
    gateway.wait_until_ready()
    while httpx.get(f"{gateway.url}/readyz", timeout=5).json()["engines"] != ready:
        time.sleep(0.05)
    for pid in gateway.engine_pids():
        os.kill(pid, signal.SIGKILL)


def kill_gateway(gateway: ServedGateway) -> None:
    gateway.kill()
    beside(gateway.start)


def undisturbed(tmp_path: Path) -> tuple[list[float], bytes]:
    gateway = ServedGateway(tmp_path / "calm")
    gateway.start()
    try:
        return train(gateway, {})
    finally:
        gateway.stop()


@pytest.mark.slow
def test_killed_processes_change_no_number(mortal: ServedGateway, tmp_path: Path) -> None:
    expected = undisturbed(tmp_path)
    mortal.start()
    assert train(mortal, {5: kill_engine, 12: kill_gateway, 24: kill_engine}) == expected
    log = mortal.log.read_text()
    assert "killed by signal 9" in log
    assert "is restored" in log


def test_what_was_accepted_before_a_kill_runs_after_the_restart(mortal: ServedGateway) -> None:
    mortal.start()
    with tinker.ServiceClient(base_url=mortal.url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
        sampler = service.create_sampling_client(base_model="fake/model").result()
        accepted = [client.forward_backward([datum(seed)], "cross_entropy") for seed in range(20)]
        prompt = tinker.ModelInput.from_ints([1, 2, 3])
        params = tinker.SamplingParams(max_tokens=5, seed=1)
        sampled = sampler.sample(prompt, num_samples=1, sampling_params=params)
        mortal.kill()
        mortal.start()
        assert all(future.result().metrics["loss:sum"] > 0 for future in accepted)
        assert sampled.result().sequences[0].tokens


def test_the_engine_ends_with_its_gateway(mortal: ServedGateway) -> None:
    mortal.start()
    [engine] = mortal.engine_pids()
    mortal.kill()
    deadline = time.monotonic() + 30
    while not has_ended(engine):
        assert time.monotonic() < deadline, "the engine outlived its gateway"
        time.sleep(0.1)


def test_a_stop_does_not_wait_for_long_polls(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path / "data")
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as http:
            promise = send_step(http, begin_run(http), 2).json()  # number 1 never comes
            with ThreadPoolExecutor(1) as pool:
                waiting = pool.submit(
                    http.post, "/api/v1/retrieve_future", json={"request_id": promise["request_id"]}
                )
                time.sleep(0.5)
                started = time.monotonic()
                assert gateway.stop() == 0
                assert waiting.result().json()["type"] == "try_again"
        assert time.monotonic() - started < 15  # the poll alone would be held for 30
    finally:
        gateway.close()


def test_a_clean_stop_has_status_zero_and_a_second_gateway_is_refused(tmp_path: Path) -> None:
    first = ServedGateway(tmp_path / "data")
    first.start()
    try:
        second = ServedGateway(tmp_path / "data")
        with pytest.raises(RuntimeError, match=r"another gateway process \(\d+\) uses"):
            second.start()
        assert first.stop() == 0
    finally:
        first.close()
