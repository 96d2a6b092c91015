"""A real engine in a process that may not grow: what asks for too much fails, alone, through gateway and SDK."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker

from tests.gateway.conftest import KEY, datum
from tests.served import TINY_ENGINE, ServedGateway

# The SDK warns of its own deprecations, and leaves the connections of its background loops to the garbage collector.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning",
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ),
]
LIMIT_KIB = 3 * 2**19
ADAM = tinker.AdamParams(learning_rate=0.01)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[ServedGateway]:
    """Its engine has 1.5 GiB of addresses, most of which its libraries take, and makes one pass of whatever it gets."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nulimit -v {LIMIT_KIB}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    options = {"threads": 1, "device": "cpu", "pass_tokens": 10**9}
    gateway = ServedGateway(tmp_path / "data", [{**TINY_ENGINE, "python": str(python), "options": options}])
    try:
        gateway.start(100)
        yield gateway
    finally:
        gateway.close()


def test_an_operation_that_is_too_large_fails_alone_and_says_what_to_do(gateway: ServedGateway) -> None:
    [engine] = gateway.engine_pids()
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        greedy, modest = (
            service.create_lora_training_client("tandem/tiny", rank=4, seed=1).result() for _ in range(2)
        )
        before = [client.forward_backward([datum()], "cross_entropy") for client in (greedy, modest)]
        too_large = greedy.forward_backward([datum(seed, 1000) for seed in range(60)], "cross_entropy")
        stepped = [client.optim_step(ADAM) for client in (greedy, modest)]
        after = [client.forward([datum()], "cross_entropy") for client in (greedy, modest)]
        with pytest.raises(
            tinker.RequestFailedError, match="no memory left for a pass over so much data"
        ) as told:
            too_large.result()
        assert "error id" in str(told.value)
        assert all(future.result().metrics["loss:sum"] > 0 for future in before)
        assert all(future.result().metrics for future in stepped)
        losses = [future.result().metrics["loss:sum"] for future in after]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # what failed left nothing behind
    assert gateway.engine_pids() == [engine], "the process that lacked memory lives on"
    error_id = str(told.value).rpartition("error id ")[2][:12]
    assert f"error {error_id}: no memory for forward_backward" in gateway.log.read_text()
