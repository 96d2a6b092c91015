"""The running batch: who joins when, what a step says, how slots are used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engines.hf import HfEngine
from engines.hf.samples import Sample
from engines.interface import SampleEnd, SampleEvent, SampleStep
from engines.operations import SampleRequest, SampleResult
from tests.hf.conftest import MakeEngine
from tests.hf.material import numbers, request, sample_all, text


def tokens_of(events: Sequence[SampleEvent]) -> dict[int, int]:
    """Number of new tokens of each sample in one step."""
    counts: dict[int, int] = {}
    for event in events:
        if isinstance(event, SampleStep):
            counts[event.call_id] = counts.get(event.call_id, 0) + 1
    return counts


def start(engine: HfEngine, requests: Sequence[SampleRequest]) -> None:
    for call_id, wanted in enumerate(requests):
        engine.start_sample(call_id, wanted)


def test_every_sequence_gets_a_token_at_every_step(engine: HfEngine) -> None:
    start(engine, [request(text(0, 4), max_tokens=3, num_samples=2), request(text(1, 9), max_tokens=2)])
    assert tokens_of(engine.advance()) == {0: 2, 1: 1}
    second = engine.advance()
    assert tokens_of(second) == {0: 2, 1: 1}
    assert [event.call_id for event in second if isinstance(event, SampleEnd)] == [1]
    assert tokens_of(engine.advance()) == {0: 2}
    assert not engine.sampling


def test_reasons_come_with_the_last_token(engine: HfEngine) -> None:
    start(engine, [request(text(0, 4), max_tokens=3)])
    events = [event for _ in range(3) for event in engine.advance()]
    reasons = [event.stop_reason for event in events if isinstance(event, SampleStep)]
    assert reasons == [None, None, "length"]
    assert isinstance(events[-1], SampleEnd)


def test_a_sample_joins_the_batch_while_others_run(engine: HfEngine) -> None:
    first, second = request(text(0, 30), max_tokens=9), request(text(1, 3), max_tokens=9)
    expected = [sample_all(engine, [one])[0].sequences[0].tokens for one in (first, second)]
    engine.start_sample(0, first)
    events = [*engine.advance(), *engine.advance()]
    engine.start_sample(1, second)
    while engine.sampling:
        step = engine.advance()
        assert len(tokens_of(step)) == 2 or len(events) > 10
        events += step
    ends = {event.call_id: event.result for event in events if isinstance(event, SampleEnd)}
    for call_id, tokens in enumerate(expected):
        result = ends[call_id]
        assert isinstance(result, SampleResult) and result.sequences[0].tokens == tokens


def test_slots_are_the_limit_and_are_used_again(make_engine: MakeEngine) -> None:
    engine = make_engine(sample_slots=3)
    start(engine, [request(text(i, 5), max_tokens=4, num_samples=2) for i in range(4)])
    assert engine.stats()["active_samples"] == 4
    steps = []
    while engine.sampling:
        steps.append(tokens_of(engine.advance()))
    assert max(sum(step.values()) for step in steps) == 3
    assert steps[0] == {0: 1, 1: 1, 2: 1}
    assert sum(sum(step.values()) for step in steps) == 4 * 2 * 4


def test_long_prompts_do_not_all_come_at_once(make_engine: MakeEngine) -> None:
    """Prompts of 40 tokens, 100 a step: two join at the first step, two at the next. One of 200 is run in pieces
    of 50 from the first step on, while the others go on, and joins with the last one."""
    engine = make_engine(prefill_tokens=100)
    prompts = [text(i, 40) for i in range(4)] + [text(5, 200)]
    start(engine, [request(prompt, max_tokens=10) for prompt in prompts])
    assert [len(tokens_of(engine.advance())) for _ in range(6)] == [2, 4, 4, 5, 5, 5]


def test_the_prompt_is_run_once_for_all_its_samples(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    plain = engine.base.hidden

    def counting(*arguments: object) -> object:
        hidden = plain(*arguments)  # type: ignore[arg-type]
        passed.append(hidden.shape[0])
        return hidden

    monkeypatch.setattr(engine.base, "hidden", counting)
    sample_all(engine, [request(text(0, 50), max_tokens=3, num_samples=6)])
    assert passed == [50, 6, 6]


def test_who_asks_for_many_does_not_keep_the_others_waiting(make_engine: MakeEngine) -> None:
    """200 sequences of 20 tokens fill 4 slots for 1,000 steps; one token is drawn in the first of them."""
    engine = make_engine(sample_slots=4)
    many, few = request(text(0, 9), max_tokens=20, num_samples=200), request(text(1, 5), max_tokens=1)
    start(engine, [many, few, request(text(2, 5), max_tokens=8, num_samples=3)])
    first = engine.advance()
    assert tokens_of(first) == {0: 2, 1: 1, 2: 1}
    assert [event.call_id for event in first if isinstance(event, SampleEnd)] == [1]
    ended: dict[int, int] = {}
    for taken in range(2, 60):
        ended |= {event.call_id: taken for event in engine.advance() if isinstance(event, SampleEnd)}
    assert ended.keys() == {2}
    engine.cancel_sample(0)
    assert not engine.sampling


def test_samples_that_take_turns_are_what_they_are_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt is run once, and held until its last sequence has joined."""
    engine = make_engine(sample_slots=3)
    wanted = [request(text(i, 20 + i), max_tokens=2 + i, num_samples=4, seed=i) for i in range(4)]
    expected = [sample_all(engine, [one])[0] for one in wanted]
    prefilled: list[int] = []
    plain = engine.decoder.prefill.run

    def counting(samples: list[Sample]) -> None:
        prefilled.extend(sample.call_id for sample in samples)
        plain(samples)

    monkeypatch.setattr(engine.decoder.prefill, "run", counting)
    for found, known in zip(sample_all(engine, wanted), expected, strict=True):
        assert [one.tokens for one in found.sequences] == [one.tokens for one in known.sequences]
    assert sorted(prefilled) == [0, 1, 2, 3]


def test_prompts_held_for_waiting_sequences_are_bounded(make_engine: MakeEngine) -> None:
    """8 prefills of 30 tokens: two prompts of 100 are held, never three; a sequence that needs none passes by."""
    engine = make_engine(sample_slots=6, prefill_tokens=30)
    start(engine, [request(text(i, 100), max_tokens=2, num_samples=30) for i in range(4)])
    engine.start_sample(4, request(text(4, 5), max_tokens=1))
    held: list[int] = []
    ended: list[int] = []
    while engine.sampling:
        ended += [event.call_id for event in engine.advance() if isinstance(event, SampleEnd)]
        prefixes = [sample.prefix for sample in engine.decoder.queue if sample.prefix]
        held.append(len(prefixes))
        for prefix in prefixes:
            assert all(part.untyped_storage().size() == part.numel() * 4 for part in prefix[0])
    assert max(held) == 2
    assert ended[0] == 4 and sorted(ended) == [0, 1, 2, 3, 4]


def test_sequences_end_at_eos_only_when_asked(
    make_engine: MakeEngine, model_folders: dict[str, str], tmp_path: Path
) -> None:
    """A model with two end-of-sequence tokens, one of which is drawn."""
    free = numbers(sample_all(make_engine(), [request(text(3, 6), max_tokens=40)])[0].sequences[0].tokens)
    unseen = next(token for token in range(288) if token not in free)
    folder = shutil.copytree(model_folders["tied"], tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [int(free[10]), unseen]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    engine = make_engine(str(folder))
    first = int(np.flatnonzero(free == free[10])[0])
    ended = sample_all(engine, [request(text(3, 6), max_tokens=40, stop_at_eos=True)])[0].sequences[0]
    assert numbers(ended.tokens).tolist() == free[: first + 1].tolist()
    assert (ended.stop_reason, ended.logprobs.shape) == ("stop", (first + 1,))
    assert engine.info().eos_tokens == (int(free[10]), unseen)
    unended = sample_all(engine, [request(text(3, 6), max_tokens=40)])[0].sequences[0]
    assert numbers(unended.tokens).tolist() == free.tolist()


def test_many_and_long_samples_outgrow_the_first_cache(make_engine: MakeEngine) -> None:
    """More than 8 slots and 128 tokens: the cache grows under running sequences, and is given back."""
    engine = make_engine()
    requests = [request(text(i, 20 + i), max_tokens=150, seed=i, temperature=0.0) for i in range(11)]
    results = sample_all(engine, requests)
    assert not engine.decoder.cache.layers
    for wanted, result in list(zip(requests, results, strict=True))[::5]:
        assert sample_all(engine, [wanted])[0].sequences[0].tokens == result.sequences[0].tokens


def test_parties_share_the_slots_and_a_new_one_never_waits(make_engine: MakeEngine) -> None:
    engine = make_engine(sample_slots=4)
    for call_id in range(6):
        engine.start_sample(call_id, request(text(call_id, 4), max_tokens=3, stop_at_eos=False), "a")
    assert set(tokens_of(engine.advance())) == {0, 1, 2, 3}
    for call_id in range(10, 14):
        engine.start_sample(call_id, request(text(call_id, 4), max_tokens=3, stop_at_eos=False), "b")
    assert set(tokens_of(engine.advance())) == {0, 1, 2, 3, 10}  # a guest beyond the four slots
    assert set(tokens_of(engine.advance())) == {0, 1, 2, 3, 10}  # the four of a end with this step
    assert set(tokens_of(engine.advance())) == {10, 11, 4, 5}  # equal shares
    while engine.sampling:
        assert len(tokens_of(engine.advance())) <= 4
