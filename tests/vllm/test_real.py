"""The real vLLM beside the Transformers engine: the same numbers whichever adapters are loaded, and processes' ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from engines.contract.material import Caller, batch, drawn, prompt_scores, request, same, text
from engines.host import EXIT_BROKEN
from engines.interface import RunOperation, SampleEnd
from engines.messages import Sample
from engines.operations import AdapterRef, CreateRun, LoraSpec, SampleRequest, SampleResult, encode
from tests.vllm.paired import PairedEngine, VllmProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TOLERANCE = 1e-4
DEATH_S = 60.0


@pytest.fixture
def engine(vllm_process: VllmProcess, storage: Path) -> PairedEngine:
    return PairedEngine(vllm_process, storage)


def trained(caller: Caller, name: str, seed: int, rank: int = 8) -> AdapterRef:
    """A run's adapter after some steps."""
    caller.create(name, rank=rank, seed=seed)
    caller.train(batch(caller.info, seed=seed), 4, name)
    return caller.snapshot(f"checkpoints/{name}", name)


def by_trainer(engine: PairedEngine, asked: SampleRequest) -> SampleResult:
    """What the Transformers engine draws for the same request."""
    trainer = engine.trainer
    trainer.start_sample(1, asked)
    while trainer.sampling:
        for event in trainer.advance():
            if isinstance(event, SampleEnd):
                assert isinstance(event.result, SampleResult)
                return event.result
    raise AssertionError("it drew nothing")


def test_tokens_and_log_probs_are_those_of_the_transformers_engine(engine: PairedEngine) -> None:
    """Greedily, and drawn at two temperatures with cuts and penalties; base model and adapter."""
    caller = Caller(engine)
    adapter = trained(caller, "a", 1)
    prompt = text(caller.info, 24)
    for settings in (
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "frequency_penalty": 0.5},
    ):
        for own in (None, adapter):
            asked = request(
                prompt,
                num_samples=2,
                max_tokens=40,
                adapter=own,
                prompt_logprobs=True,
                topk_sample_logprobs=3,
                **settings,
            )
            expected, [found] = by_trainer(engine, asked), caller.sample(asked)
            assert drawn(found) == drawn(expected)
            pairs = [
                (ours.logprobs, theirs.logprobs)
                for ours, theirs in zip(found.sequences, expected.sequences, strict=True)
            ]
            for ours, theirs in [*pairs, (found.prompt_logprobs, expected.prompt_logprobs)]:
                assert ours is not None and theirs is not None
                assert np.nanmax(np.abs(np.subtract(ours.array(), theirs.array()))) < TOLERANCE


def test_four_adapters_and_the_base_model_in_one_batch(engine: PairedEngine) -> None:
    """Each with its own weights: log-probs of a common text against each trainer's forward."""
    caller = Caller(engine)
    names = ["a", "b", "c", "d"]
    adapters = [
        trained(caller, name, seed, rank)
        for seed, (name, rank) in enumerate(zip(names, (4, 8, 16, 2), strict=True), 1)
    ]
    caller.create("untrained")
    prompt = text(caller.info, 40)
    asked = [request(prompt, max_tokens=24, prompt_logprobs=True, adapter=own) for own in (*adapters, None)]
    results = caller.sample(*asked * 2)
    scores = []
    for name, *found in zip([*names, "untrained"], results[:5], results[5:], strict=True):
        expected = caller.score(prompt, name)
        scores.append(expected)
        for result in found:
            assert np.abs(prompt_scores(result.prompt_logprobs) - expected).max() < TOLERANCE
            [tokens], [sequence] = drawn(result), result.sequences
            own = caller.score(prompt + tokens, name)[len(prompt) - 1 :]
            assert np.abs(sequence.logprobs.array() - own).max() < TOLERANCE
    for i, one in enumerate(scores):
        assert not any(same([one], [other]) for other in scores[i + 1 :])


def test_twenty_successive_versions_answer_with_their_own_weights(engine: PairedEngine) -> None:
    """While the next one is trained, saved and loaded; five places, so that each has to make room."""
    caller = Caller(engine)
    caller.create()
    prompt = text(caller.info, 48)
    expected = []
    for version in range(20):
        caller.train(batch(caller.info, seed=version), 1)
        adapter = caller.snapshot(f"checkpoints/v{version}")
        expected.append(caller.score(prompt))
        asked = request(prompt, max_tokens=30, prompt_logprobs=True, session="one", adapter=adapter)
        engine.start_sample(version, asked)
    ends = {event.call_id: event.result for event in caller.drain() if isinstance(event, SampleEnd)}
    again = caller.sample(
        *(
            request(
                prompt, max_tokens=1, prompt_logprobs=True, session="one", adapter=AdapterRef(folder, folder)
            )
            for folder in (f"checkpoints/v{version}" for version in range(20))
        )
    )
    for version in range(20):
        for result in (ends[version], again[version]):
            assert isinstance(result, SampleResult)
            found = prompt_scores(result.prompt_logprobs)
            assert np.abs(found - expected[version]).max() < TOLERANCE
        if version:
            assert np.abs(expected[version] - expected[version - 1]).max() > 10 * TOLERANCE


def test_an_adapter_on_the_unembedding_is_refused(engine: PairedEngine) -> None:
    caller = Caller(engine)
    engine.create_runs([RunOperation("u", CreateRun(LoraSpec(4, 1)))])
    adapter = caller.snapshot("checkpoints/u", "u")
    with pytest.raises(Exception, match="unembedding"):
        engine.start_sample(1, request(text(caller.info, 3), adapter=adapter))
    assert not engine.sampling


# ---------------------------------------------------------------------------- deaths


def descendants(pid: int) -> list[int]:
    """Processes that a process has begun, and theirs."""
    threads = [path / "children" for path in Path(f"/proc/{pid}/task").iterdir()]
    children = [child for path in threads for child in path.read_text().split()]
    found = [int(child) for child in children]
    return found + [each for child in found for each in descendants(child)]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("victim", ["host", "vllm"])
def test_no_process_outlives_another(
    vllm_python: str, model_folder: str, tmp_path: Path, victim: str
) -> None:
    """A killed host leaves no vLLM behind; a killed vLLM ends its host, which is replaced."""
    with VllmProcess(vllm_python, tmp_path, model_folder) as process:
        asked = request([5, 6, 7], max_tokens=200, num_samples=4)
        process.owner.send(Sample(1), encode(asked))
        children = descendants(process.owner.process.pid)
        assert children
        if victim == "host":
            process.owner.process.kill()
        else:
            [core] = [pid for pid in children if descendants(pid)]  # which has begun the worker
            os.kill(core, signal.SIGKILL)
            assert process.owner.exit_status(DEATH_S) == EXIT_BROKEN
        deadline = time.monotonic() + DEATH_S
        while left := [pid for pid in children if alive(pid)]:
            assert time.monotonic() < deadline, f"{left} still live"
            time.sleep(0.2)
