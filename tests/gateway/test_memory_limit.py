"""A real engine in a process that may not grow: what needs more than there is is computed in smaller passes."""

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


def test_an_operation_that_is_too_large_for_one_pass_is_made_in_several(gateway: ServedGateway) -> None:
    [engine] = gateway.engine_pids()
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        greedy, modest = (
            service.create_lora_training_client("tandem/tiny", rank=4, seed=1).result() for _ in range(2)
        )
        data = [datum(seed, 1000) for seed in range(60)]
        large = greedy.forward_backward(data, "cross_entropy")
        small = [modest.forward_backward([one], "cross_entropy") for one in data[:3]]
        losses = large.result(timeout=300).metrics["loss:sum"], [each.result(timeout=300) for each in small]
        for one, output in zip(losses[1], large.result().loss_fn_outputs, strict=False):
            logprobs = [each["logprobs"].data for each in (output, one.loss_fn_outputs[0])]
            assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
        assert greedy.optim_step(ADAM).result(timeout=60).metrics
    assert losses[0] > 0
    assert gateway.engine_pids() == [engine], "the process that lacked memory lives on"
    assert "tokens at most now" in gateway.log.read_text()
