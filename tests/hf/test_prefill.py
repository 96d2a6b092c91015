"""Long prompts run in pieces: the same numbers, and nobody waits for the whole."""

from __future__ import annotations

import pytest
import torch

from engines.hf import HfEngine
from engines.interface import OutOfMemory, SampleEnd, SampleStep
from engines.operations import LoraSpec, SampleRequest, SampleResult
from tests.hf.conftest import MakeEngine
from tests.hf.material import (
    create,
    numbers,
    plain_model,
    request,
    sample_all,
    saved,
    supervised,
    text,
    train,
)


def passes_of(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass from now on."""
    seen: list[int] = []
    plain = engine.base.hidden

    def counting(*arguments: object) -> object:
        hidden = plain(*arguments)  # type: ignore[arg-type]
        seen.append(hidden.shape[0])
        return hidden

    monkeypatch.setattr(engine.base, "hidden", counting)
    return seen


def steps_of(engine: HfEngine) -> list[int]:
    """Of one step the samples that got a token."""
    return sorted({event.call_id for event in engine.advance() if isinstance(event, SampleStep)})


@pytest.mark.parametrize("length", [101, 150, 151, 390])
def test_a_prompt_in_pieces_is_continued_as_transformers_does(
    make_engine: MakeEngine, model_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """Expected: greedy tokens of the plain model, and its log-probs of all of the prompt."""
    engine = make_engine(prefill_tokens=100)
    passed = passes_of(engine, monkeypatch)
    prompt = text(7, length)
    wanted = request(prompt, max_tokens=12, temperature=0.0, prompt_logprobs=True)
    found = sample_all(engine, [wanted])[0]
    assert passed[: -(-length // 50)] == [50] * ((length - 1) // 50) + [(length - 1) % 50 + 1]
    model = plain_model(model_folders["tied"])
    row = torch.tensor(prompt.astype("int64"))[None]
    with torch.no_grad():
        scores = model(row).logits[0].log_softmax(-1)
        for _ in range(12):
            row = torch.cat([row, model(row).logits[:, -1].argmax(-1)[:, None]], dim=1)
    assert numbers(found.sequences[0].tokens).tolist() == row[0, length:].tolist()
    assert found.prompt_logprobs is not None
    expected = scores[:-1].gather(1, row[0, 1:length, None])[:, 0]
    torch.testing.assert_close(
        torch.tensor(numbers(found.prompt_logprobs)[1:]), expected, rtol=1e-4, atol=1e-4
    )


def test_running_sequences_and_short_prompts_go_on_between_the_pieces(make_engine: MakeEngine) -> None:
    engine = make_engine(prefill_tokens=60)
    engine.start_sample(0, request(text(0, 5), max_tokens=30))
    assert steps_of(engine) == [0]
    engine.start_sample(1, request(text(1, 300), max_tokens=3))
    assert steps_of(engine) == [0]
    engine.start_sample(2, request(text(2, 55), max_tokens=30))
    assert [steps_of(engine) for _ in range(8)] == [[0, 2]] * 8
    assert steps_of(engine) == [0, 1, 2]


def test_one_long_prompt_at_a_time_and_all_are_what_they_are_alone(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(prefill_tokens=80, sample_slots=2)
    wanted = [request(text(i, 210 + 10 * i), max_tokens=4, num_samples=2, seed=i) for i in range(3)]
    alone = [sample_all(engine, [one])[0] for one in wanted]
    passed = passes_of(engine, monkeypatch)
    for known, found in zip(alone, sample_all(engine, wanted), strict=True):
        assert [one.tokens for one in found.sequences] == [one.tokens for one in known.sequences]
    assert sum(count for count in passed if count > 6) == 210 + 220 + 230


def test_pieces_of_an_adapter_and_of_a_deterministic_engine(make_engine: MakeEngine) -> None:
    """In deterministic mode bit-identical, whatever is decoded beside it."""
    engine = make_engine(prefill_tokens=80, deterministic=True)
    create(engine, spec=LoraSpec(rank=4, seed=3))
    train(engine, supervised([30]), 3)
    adapter = saved(engine, "run", "sampler/a")
    wanted = request(text(1, 300), max_tokens=6, adapter=adapter, prompt_logprobs=True)
    alone = sample_all(engine, [wanted])[0]
    beside = sample_all(engine, [request(text(i, 90), max_tokens=9, seed=i) for i in range(3)] + [wanted])[-1]
    assert alone == beside
    plain = sample_all(engine, [request(text(1, 300), max_tokens=6, prompt_logprobs=True)])[0]
    assert plain != alone
    whole = make_engine(prefill_tokens=1000, deterministic=True)
    again = sample_all(whole, [wanted])[0]
    assert again.prompt_logprobs is not None and alone.prompt_logprobs is not None
    difference = numbers(again.prompt_logprobs)[1:] - numbers(alone.prompt_logprobs)[1:]
    assert abs(difference).max() < 1e-4


def test_a_long_prompt_begins_with_what_is_known_of_it(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(prefill_tokens=80)
    first = request(text(1, 300), max_tokens=2, session="s")
    sample_all(engine, [first])
    passed = passes_of(engine, monkeypatch)
    longer = [*text(1, 300).tolist(), *text(2, 100).tolist()]
    found = sample_all(engine, [request(longer, max_tokens=2, session="s")])[0]
    assert found.prompt_cache_hit_tokens == 300
    assert passed == [40, 40, 20, 1]


def test_a_cancelled_long_prompt_is_forgotten(make_engine: MakeEngine) -> None:
    engine = make_engine(prefill_tokens=60)
    engine.start_sample(0, request(text(1, 300), max_tokens=3))
    engine.start_sample(1, request(text(2, 300), max_tokens=3))
    assert steps_of(engine) == [] and engine.stats()["active_samples"] == 2
    engine.cancel_sample(0)
    assert engine.stats()["active_samples"] == 1
    ended: list[int] = []
    while engine.sampling:
        ended += [event.call_id for event in engine.advance() if isinstance(event, SampleEnd)]
    assert ended == [1]


def outcomes(engine: HfEngine, wanted: list[SampleRequest]) -> dict[int, SampleResult | Exception]:
    for call_id, one in enumerate(wanted):
        engine.start_sample(call_id, one)
    ends: dict[int, SampleResult | Exception] = {}
    for _ in range(200):
        ends |= {event.call_id: event.result for event in engine.advance() if isinstance(event, SampleEnd)}
    assert not engine.sampling
    return ends


@pytest.mark.parametrize("beside", [0, 1, 3])
def test_a_piece_for_which_memory_runs_out_fails_its_own_sample(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, beside: int
) -> None:
    """Memory for 100 tokens of a prompt, whatever else is decoded: the third piece of 40 is too much."""
    engine = make_engine(prefill_tokens=80)
    plain = engine.decoder.prefill._run

    def narrow(samples: list[object], stops: list[int]) -> None:
        if max(stops) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. (simulated)")
        plain(samples, stops)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.decoder.prefill, "_run", narrow)
    others = [request(text(i, 20), max_tokens=9, seed=i) for i in range(beside)]
    ends = outcomes(engine, [request(text(9, 300), max_tokens=3), *others])
    failed = ends.pop(0)
    assert isinstance(failed, OutOfMemory) and failed.passing == (beside > 0)
    assert len(ends) == beside and all(isinstance(end, SampleResult) for end in ends.values())


def test_an_adapter_stays_until_its_long_prompt_is_over(make_engine: MakeEngine) -> None:
    engine = make_engine(prefill_tokens=60)
    create(engine, spec=LoraSpec(rank=4, seed=3))
    adapter = saved(engine, "run", "sampler/a")
    engine.start_sample(0, request(text(1, 300), max_tokens=3, adapter=adapter))
    engine.advance()
    engine.adapters.memory.drop_unused()
    assert engine.stats()["resident_adapters"] == 1
    engine.cancel_sample(0)
    engine.adapters.memory.drop_unused()
    assert engine.stats()["resident_adapters"] == 0
