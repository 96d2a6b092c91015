"""A gateway whose model two tensor ranks train and Transformers samples, as its clients meet it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker

from tests.gateway.conftest import KEY
from tests.served import ServedGateway, has_ended

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # The SDK warns of its own deprecations, and leaves the connections of its background loops to the collector.
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]

MODEL = "tandem/tiny"
START_S = 120.0
STEPS = 8
ADAM = tinker.AdamParams(learning_rate=1e-3)
ENGINES: list[dict[str, Any]] = [
    {
        "name": "trainer",
        "plugin": "megatron",
        "base_model": MODEL,
        "roles": ["train"],
        "options": {"device": "cpu", "tensor": 2},
    },
    {
        "name": "sampler",
        "base_model": MODEL,
        "roles": ["sample"],
        "options": {"device": "cpu", "dtype": "float32", "threads": 1},
    },
]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[ServedGateway]:
    # What loads on a busy machine is given time.
    served = ServedGateway(tmp_path / "data", ENGINES, engine_silence_s="60", engine_owner_timeout_s="30")
    served.start(START_S)
    yield served
    served.stop()
    served.close()


def datum(seed: int) -> tinker.Datum:
    """An example with text that depends on the seed."""
    tokens = [3 + (seed * 31 + 7 * position) % 1000 for position in range(15)]
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "weights": tinker.TensorData(data=[1.0] * 14, dtype="float32"),
        },
    )


def followers(gateway: ServedGateway) -> dict[int, int]:
    """Process ids of ranks 1, and of the engine processes that they are children of."""
    found = {}
    for engine in gateway.engine_pids():
        children = Path(f"/proc/{engine}/task/{engine}/children").read_text().split()
        for child in children:
            if b"engines.megatron.rank" in Path(f"/proc/{child}/cmdline").read_bytes():
                found[int(child)] = engine
    return found


def until(condition: Callable[[], bool], timeout_s: float = START_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


def train(
    service: tinker.ServiceClient, disasters: dict[int, Callable[[], None]]
) -> tuple[list[float], list[int], tinker.TrainingClient]:
    """Losses of a pipelined run, the weights' sample at its end; at some steps something happens to the processes."""
    client = service.create_lora_training_client(MODEL, rank=4, seed=1)
    passes, steps = [], []
    for step in range(STEPS):
        passes.append(client.forward_backward([datum(step % 3), datum(step % 2)], "cross_entropy"))
        steps.append(client.optim_step(ADAM))
        if step in disasters:
            passes[-1].result()
            disasters[step]()
    losses = [future.result().metrics["loss:sum"] for future in passes]
    assert all(future.result() for future in steps)
    sampler = client.save_weights_and_get_sampling_client()
    wanted = tinker.SamplingParams(max_tokens=6, temperature=0.0)
    drawn = sampler.sample(tinker.ModelInput.from_ints([5, 6, 7]), 1, wanted).result()
    return losses, list(drawn.sequences[0].tokens), client


def weights(gateway: ServedGateway) -> list[bytes]:
    """The adapters that were saved for sampling, in the order of their writing."""
    found = sorted(
        gateway.data_dir.glob("storage/**/adapter_model.safetensors"),
        key=lambda path: path.stat().st_mtime_ns,
    )
    return [path.read_bytes() for path in found if "snapshots" not in path.parts]


def test_the_official_client_trains_on_two_ranks_and_kills_change_no_number(gateway: ServedGateway) -> None:
    """Rank 1 is killed in the middle of a run, then rank 0, then rank 1 while nothing is computed."""

    def kill(*, leader: bool) -> None:
        until(lambda: len(followers(gateway)) == 1)
        [(follower, engine)] = followers(gateway).items()
        os.kill(engine if leader else follower, signal.SIGKILL)
        until(lambda: has_ended(engine) and has_ended(follower))

    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        expected, drawn, _ = train(service, {})
        assert expected[-2] < expected[0]
        undisturbed = weights(gateway)[-1]
        losses, again, client = train(service, {2: lambda: kill(leader=False), 5: lambda: kill(leader=True)})
        assert losses == expected
        assert again == drawn
        assert weights(gateway)[-1] == undisturbed
        kill(leader=False)  # is noticed though nobody calls
        assert client.forward([datum(0)], "cross_entropy").result().metrics["loss:sum"] > 0
    log = gateway.log.read_text()
    assert "rank 1 has ended" in log
