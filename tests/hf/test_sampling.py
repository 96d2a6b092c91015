"""Sampling: log-probs against the trainer and full logits, greedy against generate, mixed batches against one alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engines.hf import HfEngine
from engines.interface import SampleEnd, SampleStep, UserError
from engines.operations import AdapterRef, Datum, LoraSpec, SampleRequest, SampleResult
from engines.tensors import Tensor
from engines.tuning.runs import VECTORS
from tests.hf.conftest import MakeEngine
from tests.hf.material import (
    Array,
    create,
    forward,
    logprobs,
    numbers,
    plain_model,
    request,
    sample_all,
    saved,
    supervised,
    text,
    train,
)


def trained(engine: HfEngine, run_id: str, spec: LoraSpec) -> AdapterRef:
    """An adapter that is far from the base model."""
    create(engine, run_id, spec)
    train(engine, supervised([20, 15], seed=spec.seed), steps=4, run_id=run_id, rate=2e-2)
    return saved(engine, run_id, f"adapters/{run_id}")


def diverge(engine: HfEngine, adapter: AdapterRef) -> None:
    """Have a version in memory give no numbers."""
    version = engine.adapters.take(adapter.folder)
    assert version is not None
    version.values.fill_(float("nan"))
    engine.adapters.give_back(adapter.folder)


def scored(engine: HfEngine, run_id: str, tokens: Array) -> Array:
    """The trainer's log-probs of tokens[1:]."""
    targets = Tensor.of(tokens[1:].astype(np.int64))
    weights = Tensor.of(np.ones(len(tokens) - 1, np.float32))
    datum = Datum(Tensor.of(tokens[:-1]), {"target_tokens": targets, "weights": weights})
    return logprobs(forward(engine, [datum], run_id=run_id))[0]


@pytest.mark.parametrize("adapted", [False, True])
def test_sampled_prompt_and_training_logprobs_agree(engine: HfEngine, adapted: bool) -> None:
    adapter = trained(engine, "run", LoraSpec(rank=4, seed=1)) if adapted else None
    if not adapted:
        create(engine)
    prompt = text(3, 17)
    first = sample_all(
        engine, [request(prompt, num_samples=2, max_tokens=12, prompt_logprobs=True, adapter=adapter)]
    )[0]
    for sequence in first.sequences:
        whole = np.concatenate([prompt, numbers(sequence.tokens)])
        expected = scored(engine, "run", whole)
        again = sample_all(engine, [request(whole, max_tokens=1, prompt_logprobs=True, adapter=adapter)])[0]
        assert first.prompt_logprobs is not None and again.prompt_logprobs is not None
        np.testing.assert_allclose(numbers(sequence.logprobs), expected[16:], rtol=0, atol=1e-4)
        np.testing.assert_allclose(numbers(again.prompt_logprobs)[1:], expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(numbers(first.prompt_logprobs)[1:], expected[:16], rtol=0, atol=1e-4)
        assert np.isnan(numbers(again.prompt_logprobs)[0])
        assert again.prompt_logprobs.shape == (29,)


@pytest.mark.parametrize("model", ["tied", "untied", "llama"])
def test_greedy_is_generate(make_engine: MakeEngine, model_folders: dict[str, str], model: str) -> None:
    engine = make_engine(model, sample_slots=4)
    prompts = [text(seed, length) for seed, length in enumerate((5, 30, 1, 12, 12, 150))]
    results = sample_all(engine, [request(prompt, max_tokens=20, temperature=0.0) for prompt in prompts])
    reference = plain_model(model_folders[model])
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor(prompt.astype(np.int64))[None]
        whole = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            min_new_tokens=20,
            pad_token_id=0,
        )
        assert numbers(result.sequences[0].tokens).tolist() == whole[0, len(prompt) :].tolist()
        assert result.sequences[0].stop_reason == "length"


def close(found: SampleResult, expected: SampleResult) -> None:
    """The same tokens, log-probs within 1e-4."""
    assert len(found.sequences) == len(expected.sequences)
    for one, other in zip(found.sequences, expected.sequences, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(numbers(one.logprobs), numbers(other.logprobs), rtol=0, atol=1e-4)
        assert one.stop_reason == other.stop_reason


def mixture(engine: HfEngine) -> list[SampleRequest]:
    """Requests of three adapters and the base model, of all lengths and settings."""
    adapters = [
        None,
        trained(engine, "a", LoraSpec(rank=4, seed=1)),
        trained(engine, "b", LoraSpec(rank=8, seed=2, alpha=16.0)),
        trained(engine, "c", LoraSpec(rank=2, seed=3, train_unembed=False)),
    ]
    settings: list[dict[str, Any]] = [
        {"temperature": 0.7, "num_samples": 3},
        {"temperature": 0.0},
        {"top_k": 5, "topk_sample_logprobs": 3},
        {"top_p": 0.8, "num_samples": 2},
        {"topk_prompt_logprobs": 4, "prompt_logprobs": True},
    ]
    return [
        request(
            text(i, 3 + 7 * i % 40),
            seed=100 + i,
            max_tokens=4 + 5 * i % 13,
            adapter=adapters[i % 4],
            **settings[i % 5],
        )
        for i in range(14)
    ]


@pytest.mark.parametrize("slots", [3, 7, 48])
def test_a_mixed_batch_equals_each_alone(make_engine: MakeEngine, slots: int) -> None:
    """Slots fewer than sequences: samples wait, sequences move between slots, prefixes are kept."""
    engine = make_engine(sample_slots=slots, prefill_tokens=32)
    wanted = mixture(engine)
    together = sample_all(engine, wanted)
    for one, result in zip(wanted, together, strict=True):
        close(result, sample_all(engine, [one])[0])


def test_deterministic_mode_does_not_know_its_neighbours(make_engine: MakeEngine) -> None:
    engine = make_engine(sample_slots=5, deterministic=True)
    try:
        wanted = mixture(engine)
        together = sample_all(engine, wanted)
        assert together == [sample_all(engine, [one])[0] for one in wanted]
    finally:
        torch.use_deterministic_algorithms(False)


def test_samples_differ_by_index_and_repeat_by_seed(engine: HfEngine) -> None:
    wanted = request(text(1, 6), num_samples=4, max_tokens=10)
    first, second = (sample_all(engine, [wanted])[0] for _ in range(2))
    close(first, second)
    assert len({sequence.tokens.data for sequence in first.sequences}) == 4
    other = sample_all(engine, [request(text(1, 6), num_samples=4, max_tokens=10, seed=6)])[0]
    assert other.sequences[0].tokens != first.sequences[0].tokens
    alone = sample_all(engine, [request(text(1, 6), max_tokens=10)])[0]
    assert alone.sequences[0].tokens == first.sequences[0].tokens


def test_a_version_stays_what_it_was(engine: HfEngine) -> None:
    """Training on, and another version of the same run, do not reach a version that is being sampled."""
    adapter = trained(engine, "run", LoraSpec(rank=4, seed=1))
    wanted = request(text(2, 9), max_tokens=20, adapter=adapter)
    before = sample_all(engine, [wanted])[0]
    engine.start_sample(0, wanted)
    events = [engine.advance() for _ in range(3)]
    train(engine, supervised([20, 15], seed=9), steps=3)
    later = saved(engine, "run", "adapters/later")
    while engine.sampling:
        events.append(engine.advance())
    ends = [event.result for step in events for event in step if isinstance(event, SampleEnd)]
    assert isinstance(ends[0], SampleResult)
    close(ends[0], before)
    after = sample_all(engine, [request(text(2, 9), max_tokens=20, adapter=later)])[0]
    assert after.sequences[0].logprobs != before.sequences[0].logprobs


def test_a_version_read_from_its_folder_equals_the_one_in_memory(make_engine: MakeEngine) -> None:
    spec = LoraSpec(rank=4, seed=1, train_attn=False)
    largest = make_engine().run_bytes(LoraSpec(rank=4, seed=2)) // VECTORS
    engine = make_engine(adapter_memory_bytes=largest)
    wanted = request(text(2, 9), max_tokens=20, adapter=trained(engine, "a", spec))
    before = sample_all(engine, [wanted])[0]
    trained(engine, "b", LoraSpec(rank=4, seed=2))
    assert (engine.stats()["resident_adapters"], engine.stats()["adapter_bytes"]) == (1, largest)
    assert sample_all(engine, [wanted])[0] == before


def test_tops_are_the_best_of_the_full_distribution(engine: HfEngine, model_folders: dict[str, str]) -> None:
    prompt = text(4, 11)
    wanted = request(prompt, max_tokens=5, temperature=0.5, topk_sample_logprobs=3, topk_prompt_logprobs=2)
    result = sample_all(engine, [wanted])[0]
    sequence = result.sequences[0]
    whole = np.concatenate([prompt, numbers(sequence.tokens)]).astype(np.int64)
    with torch.no_grad():
        logits = plain_model(model_folders["tied"])(input_ids=torch.tensor(whole)[None]).logits[0]
    sampled = (logits[10:-1] / 0.5).log_softmax(-1).topk(3)
    assert sequence.top_logprobs is not None and result.topk_prompt_logprobs is not None
    assert numbers(sequence.top_logprobs.tokens).tolist() == sampled.indices.tolist()
    np.testing.assert_allclose(numbers(sequence.top_logprobs.logprobs), sampled.values, rtol=0, atol=1e-4)
    prompts = logits[:10].log_softmax(-1).topk(2)
    assert numbers(result.topk_prompt_logprobs.tokens)[1:].tolist() == prompts.indices.tolist()
    np.testing.assert_allclose(
        numbers(result.topk_prompt_logprobs.logprobs)[1:], prompts.values, rtol=0, atol=1e-4
    )
    assert np.isnan(numbers(result.topk_prompt_logprobs.logprobs)[0]).all()


def test_a_stop_token_ends_and_stays(engine: HfEngine) -> None:
    wanted = request(text(5, 6), max_tokens=30)
    free = sample_all(engine, [wanted])[0].sequences[0].tokens.array().tolist()
    token = free[7]
    place = free.index(token)
    stopped = sample_all(engine, [request(text(5, 6), max_tokens=30, stop_tokens=(token,))])[0].sequences[0]
    assert numbers(stopped.tokens).tolist() == free[: place + 1]
    assert stopped.stop_reason == "stop"


def test_a_stop_string_ends_and_stays(engine: HfEngine) -> None:
    """The tokens of the test models are bytes, so that the string's place is known."""
    prompt = engine.tokenizer.encode("abcdefghij").ids
    assert len(prompt) == 10
    free = numbers(sample_all(engine, [request(prompt, max_tokens=60)])[0].sequences[0].tokens).tolist()
    letters = [engine.tokenizer.decode([token]) for token in free]
    word = next(letter for letter in letters[5:] if letter.isascii() and letter.isalnum())
    stopped = sample_all(engine, [request(prompt, max_tokens=60, stop_strings=("zebra", word))])[0].sequences[
        0
    ]
    assert numbers(stopped.tokens).tolist() == free[: letters.index(word) + 1]
    assert stopped.stop_reason == "stop"


def test_the_context_is_the_limit(make_engine: MakeEngine) -> None:
    engine = make_engine(max_context=32)
    result = sample_all(engine, [request(text(1, 20), max_tokens=None)])[0]
    assert result.sequences[0].tokens.shape == (12,)
    with pytest.raises(UserError, match=r"20 tokens.*13.*at most 32"):
        engine.start_sample(0, request(text(1, 20), max_tokens=13))
    with pytest.raises(UserError, match="at most 32"):
        engine.start_sample(0, request(text(1, 32), max_tokens=None))
    assert not engine.sampling


def test_cancel_frees_slots_and_leaves_the_others_alone(make_engine: MakeEngine) -> None:
    engine = make_engine(sample_slots=4)
    wanted = [request(text(i, 5 + i), num_samples=2, max_tokens=12, seed=i) for i in range(4)]
    expected = [sample_all(engine, [one])[0] for one in wanted]
    for call_id, one in enumerate(wanted):
        engine.start_sample(call_id, one)
    seen: list[SampleStep | SampleEnd] = [event for _ in range(3) for event in engine.advance()]
    for call_id in (0, 3, 99):
        engine.cancel_sample(call_id)
    cancelled = len(seen)
    while engine.sampling:
        seen += engine.advance()
    assert {event.call_id for event in seen[cancelled:]} == {1, 2}
    for event in seen:
        if isinstance(event, SampleEnd):
            assert isinstance(event.result, SampleResult)
            close(event.result, expected[event.call_id])
    assert engine.stats()["active_samples"] == 0
    assert engine.advance() == []


def test_a_diverged_adapter_fails_alone_and_leaves_no_trace(make_engine: MakeEngine) -> None:
    engine = make_engine(sample_slots=2)
    adapter = trained(engine, "run", LoraSpec(rank=4, seed=1))
    diverge(engine, adapter)
    good = [request(text(seed, 30), max_tokens=6, seed=seed) for seed in range(3)]
    expected = [sample_all(engine, [one])[0] for one in good]
    bad = request(text(9, 40), max_tokens=6, adapter=adapter)
    for call_id, one in enumerate([good[0], bad, good[1], good[2]]):
        engine.start_sample(call_id, one)
    ends: dict[int, SampleResult | Exception] = {}
    while engine.sampling:
        ends |= {event.call_id: event.result for event in engine.advance() if isinstance(event, SampleEnd)}
    assert isinstance(ends[1], UserError) and "diverged" in str(ends[1])
    for call_id, result in zip((0, 2, 3), expected, strict=True):
        found = ends[call_id]
        assert isinstance(found, SampleResult)
        close(found, result)


def test_a_diverged_adapter_leaves_no_trace_when_its_row_would_move(make_engine: MakeEngine) -> None:
    engine = make_engine(sample_slots=3)
    adapter = trained(engine, "run", LoraSpec(rank=4, seed=1))
    later = [request(text(2, 30), max_tokens=6), request(text(3, 4), max_tokens=6)]
    expected = [sample_all(engine, [one])[0] for one in later]
    diverge(engine, adapter)
    # One sample keeps the cache alive; one ends in the very step in which the third breaks, whose row stands last.
    engine.start_sample(10, request(text(4, 30), max_tokens=40))
    engine.start_sample(11, request(text(1, 30), max_tokens=1))
    engine.start_sample(12, request(text(9, 40), max_tokens=6, adapter=adapter))
    engine.advance()
    for call_id, one in enumerate(later):
        engine.start_sample(call_id, one)
    ends: dict[int, SampleResult | Exception] = {}
    while engine.sampling:
        ends |= {event.call_id: event.result for event in engine.advance() if isinstance(event, SampleEnd)}
    for call_id, known in enumerate(expected):
        found = ends[call_id]
        assert isinstance(found, SampleResult), found
        close(found, known)


def test_diverged_adapters_that_break_in_one_step_leave_no_trace(make_engine: MakeEngine) -> None:
    """The first one's gap is filled with a row of the second, whose own slot must be clean as well."""
    engine = make_engine(sample_slots=3)
    adapter = trained(engine, "run", LoraSpec(rank=4, seed=1))
    later = [request(text(2, 4), max_tokens=6), request(text(3, 4), max_tokens=6)]
    expected = [sample_all(engine, [one])[0] for one in later]
    diverge(engine, adapter)
    engine.start_sample(10, request(text(4, 60), max_tokens=40))
    for call_id in (11, 12):
        engine.start_sample(call_id, request(text(call_id, 50), max_tokens=6, adapter=adapter))
    engine.advance()
    for call_id, one in enumerate(later):
        engine.start_sample(call_id, one)
    ends: dict[int, SampleResult | Exception] = {}
    while engine.sampling:
        ends |= {event.call_id: event.result for event in engine.advance() if isinstance(event, SampleEnd)}
    for call_id, known in enumerate(expected):
        found = ends[call_id]
        assert isinstance(found, SampleResult), found
        close(found, known)
