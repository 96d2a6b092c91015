"""More runs than an engine has memory for: clients notice nothing, and every number is what it would be alone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from engines.fake import FakeEngine
from engines.interface import EngineConfig
from engines.operations import LoraSpec
from tests.gateway.conftest import KEY, begin_run, datum, outcome, send_pass, send_step
from tests.served import FAKE_ENGINE, TINY_ENGINE, ServedGateway
from tests.threads import beside

# The SDK warns of its own deprecations, and leaves the connections of its background loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
ADAM = tinker.AdamParams(learning_rate=0.01)
Trained = tuple[list[list[float]], list[bytes]]


def fake_run_bytes(rank: int = 4) -> int:
    """What a run of the fake engine occupies."""
    config = EngineConfig("e", "fake", "m", "", ("train",), "", 1)
    return FakeEngine.load(config).run_bytes(LoraSpec(rank=rank, seed=1))


def train(service: tinker.ServiceClient, model: str, seed: int, steps: int) -> list[float]:
    """Losses of a run whose client has two steps under way at a time; its weights are saved."""
    client = service.create_lora_training_client(model, rank=4, seed=seed).result()
    passes, updates = [], []
    for step in range(steps):
        passes.append(client.forward_backward([datum(seed * 100 + step)], "cross_entropy"))
        updates.append(client.optim_step(ADAM))
        if step > 0:
            updates[step - 1].result()
    losses = [future.result().metrics["loss:sum"] for future in passes]
    client.save_state("end").result()
    return losses


def train_all(gateway: ServedGateway, model: str, runs: int, steps: int, at_a_time: int) -> Trained:
    """The losses of each run, and the files of all adapters, in an order that their numbers decide."""
    places = threading.Semaphore(at_a_time)

    def train_one(service: tinker.ServiceClient, seed: int) -> list[float]:
        with places:
            return train(service, model, seed, steps)

    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        trained = [beside(train_one, service, seed) for seed in range(runs)]
        losses = [each.result(600) for each in trained]
    files = gateway.data_dir.glob("storage/checkpoints/*/adapter_model.safetensors")
    adapters = sorted(path.read_bytes() for path in files)
    assert len(adapters) == runs
    return losses, adapters


def engine_view(gateway: ServedGateway) -> dict[str, Any]:
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        [engine] = http.get("/admin/v1/engines").json()["items"]
    view: dict[str, Any] = engine
    return view


def paged_and_alone(
    root: Path, engine: dict[str, Any], places: int, run_bytes: int, runs: int, steps: int
) -> tuple[Trained, Trained, dict[str, Any]]:
    """All runs at once through few places; each by itself in an engine that has room; the paging engine's counters."""
    model = engine["base_model"]
    paging = ServedGateway(root / "paging", [{**engine, "run_memory_bytes": places * run_bytes}])
    roomy = ServedGateway(root / "roomy", [engine])
    try:
        paging.start()
        paged = train_all(paging, model, runs, steps, at_a_time=runs)
        view = engine_view(paging)
        assert paging.stop() == 0
        roomy.start()
        alone = train_all(roomy, model, runs, steps, at_a_time=1)
        assert roomy.stop() == 0
    finally:
        paging.close()
        roomy.close()
    return paged, alone, view


def test_twelve_runs_pass_through_three_places_with_the_same_numbers(tmp_path: Path) -> None:
    paged, alone, view = paged_and_alone(
        tmp_path, FAKE_ENGINE, places=3, run_bytes=fake_run_bytes(), runs=12, steps=6
    )
    assert paged == alone
    assert view["evictions"] >= 9
    assert view["run_bytes"] <= view["run_memory_bytes"] == 3 * fake_run_bytes()
    assert view["restores"] >= 9


@pytest.mark.slow
def test_runs_of_a_real_model_pass_through_few_places_with_the_same_numbers(tmp_path: Path) -> None:
    options = {"threads": 1, "device": "cpu", "deterministic": True}
    engine = {**TINY_ENGINE, "options": options}
    measured = ServedGateway(tmp_path / "measured", [engine])
    measured.start()
    try:
        with tinker.ServiceClient(base_url=measured.url, api_key=KEY) as service:
            service.create_lora_training_client("tandem/tiny", rank=4, seed=1).result()
            run_bytes = engine_view(measured)["run_bytes"]  # it is dropped with its session
    finally:
        measured.close()
    paged, alone, view = paged_and_alone(tmp_path, engine, places=3, run_bytes=run_bytes, runs=12, steps=6)
    assert paged == alone
    assert view["evictions"] >= 9


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """A gateway whose engine has room for two runs of rank 4."""
    gateway = ServedGateway(
        tmp_path / "small", [{**FAKE_ENGINE, "run_memory_bytes": 2 * fake_run_bytes() + 100}]
    )
    gateway.start()
    yield gateway
    gateway.close()


def test_a_run_that_is_too_large_for_its_engine_is_refused_in_a_sentence(small: ServedGateway) -> None:
    with httpx.Client(base_url=small.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        session = http.post("/api/v1/create_session", json={}).json()["session_id"]
        body = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "fake/model",
            "lora_config": {"rank": 64, "seed": 1},
        }
        answer = outcome(http, http.post("/api/v1/create_model", json=body).json()["request_id"])
        assert answer["category"] == "user"
        assert f"may take {2 * fake_run_bytes() + 100} (run_memory_bytes)" in answer["error"]
        assert f"needs {fake_run_bytes(64)} bytes" in answer["error"]
        run_id = begin_run(http)
        assert "metrics" in outcome(http, send_pass(http, run_id, 1, [1, 2, 3]).json()["request_id"])


def test_it_is_shown_which_runs_are_in_memory(small: ServedGateway) -> None:
    with httpx.Client(base_url=small.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        runs = [begin_run(http, seed=seed) for seed in range(3)]

        def resident() -> list[bool]:
            return [http.get(f"/admin/v1/runs/{run_id}").json()["resident"] for run_id in runs]

        assert resident() == [False, True, True]
        outcome(http, send_pass(http, runs[0], 1, [1, 2, 3]).json()["request_id"])
        assert resident() == [True, False, True]
        view = engine_view(small)
        assert (view["resident_runs"], view["evictions"], view["restores"], view["waiting_runs"]) == (
            2,
            2,
            1,
            0,
        )
        assert view["run_bytes"] == 2 * fake_run_bytes()
        assert view["run_memory_bytes"] == 2 * fake_run_bytes() + 100
        metrics = http.get("/admin/v1/metrics").json()["engines"]["fake"]
        assert (metrics["evictions"], metrics["restores"]) == (2, 1)


def test_runs_survive_a_restart_that_finds_more_of_them_than_fit(small: ServedGateway) -> None:
    with httpx.Client(base_url=small.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        runs = [begin_run(http, seed=seed) for seed in range(5)]
        accepted = [send_pass(http, run_id, 1, [1, 2, 3]).json()["request_id"] for run_id in runs]
        small.kill()
        small.start()
        accepted += [send_step(http, run_id, 2).json()["request_id"] for run_id in runs]
        for request_id in accepted:
            assert "metrics" in outcome(http, request_id)
