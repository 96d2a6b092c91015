"""The engines that compute for real, on a node: the numbers of the same engine on the gateway's machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import tinker

from tests.gateway.conftest import KEY, outcome
from tests.megatron.test_gateway import ADAM, MODEL, datum
from tests.on_ray.cluster import RayCluster
from tests.on_ray.test_nodes import nodes_of, speaking
from tests.served import ServedGateway

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(580),
    # The SDK warns of its own deprecations, and leaves the connections of its background loops to the collector.
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]

START_S = 300.0
HF: dict[str, Any] = {
    "name": "tiny",
    "base_model": MODEL,
    "options": {"device": "cpu", "threads": 1, "deterministic": True},
}
SLOWLY = {"engine_silence_s": "60", "engine_owner_timeout_s": "30"}


@pytest.fixture(scope="module")
def node(cluster: RayCluster) -> Iterator[str]:
    cluster.add("node", num_cpus=2)
    yield cluster.address


def numbers(gateway: ServedGateway) -> tuple[list[float], list[list[int]], list[list[float]]]:
    """Losses of a run; tokens and log-probs of samples of what it has learned."""
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as service:
        client = service.create_lora_training_client(MODEL, rank=4, seed=1)
        losses = []
        for step in range(4):
            done = client.forward_backward([datum(step % 3), datum(step % 2)], "cross_entropy")
            client.optim_step(ADAM).result()
            losses.append(done.result().metrics["loss:sum"])
        sampler = client.save_weights_and_get_sampling_client()
        wanted = tinker.SamplingParams(max_tokens=12, temperature=1.0, seed=5)
        drawn = sampler.sample(tinker.ModelInput.from_ints([5, 6, 7]), 3, wanted).result().sequences
    return losses, [list(each.tokens) for each in drawn], [list(each.logprobs or []) for each in drawn]


def test_transformers_train_and_sample_there_as_here(node: str, tmp_path: Path) -> None:
    found: list[Any] = []
    places: list[dict[str, Any]] = [{}, {"ray": {"address": node, "cpus": 2, "wait_s": START_S}}]
    for place in places:
        gateway = ServedGateway(tmp_path / f"gateway-{len(found)}", [{**HF, **place}], **SLOWLY)
        try:
            gateway.start(START_S)
            found.append(numbers(gateway))
            assert len(nodes_of(gateway)) == len(found) - 1
            assert gateway.stop() == 0
        finally:
            gateway.close()
    here, there = found
    assert here == there
    assert here[0][-1] < here[0][0] and all(len(tokens) for tokens in here[1])


def test_vllm_samples_there_in_an_interpreter_of_its_own(node: str, vllm_python: str, tmp_path: Path) -> None:
    """Greedy tokens and their log-probs are those of Transformers on the gateway's machine."""
    vllm = {
        "name": "sampler",
        "plugin": "vllm",
        "base_model": MODEL,
        "python": vllm_python,
        "roles": ["sample"],
        "options": {"dtype": "float32", "max_context": 512},
        "ray": {"address": node, "cpus": 2, "wait_s": START_S},
    }
    found: list[list[Drawn]] = []
    for number, engine in enumerate((HF, vllm)):
        gateway = ServedGateway(tmp_path / f"gateway-{number}", [engine], **SLOWLY)
        try:
            gateway.start(START_S)
            with speaking(gateway) as http:
                found.append([greedy(http, first) for first in range(5, 11)])
            assert len(nodes_of(gateway)) == number
        finally:
            gateway.close()
    for here, there in zip(*found, strict=True):
        assert here.tokens == there.tokens
        assert here.logprobs == pytest.approx(there.logprobs, abs=1e-3)
    firsts = [drawn.logprobs[0] for drawn in found[0]]
    assert max(firsts) - min(firsts) > 0.01  # prompts make a difference


class Drawn(NamedTuple):
    """A sequence of the base model."""

    tokens: list[int]
    logprobs: list[float]


def greedy(http: httpx.Client, first: int) -> Drawn:
    """What the base model says after a prompt that begins with a token."""
    body = {
        "base_model": MODEL,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [first, 6, 7]}]},
        "sampling_params": {"max_tokens": 12, "temperature": 0.0, "seed": 1},
        "num_samples": 1,
    }
    result = outcome(http, http.post("/api/v1/asample", json=body).json()["request_id"])
    assert result.get("type") == "sample", result
    (sequence,) = result["sequences"]
    return Drawn(sequence["tokens"], sequence["logprobs"])
