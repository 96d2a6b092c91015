"""A prompt's beginning is computed once in a session, and its numbers are those of computing it again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engines.hf import HfEngine
from engines.hf.kv_cache import Prefix
from engines.hf.model import BaseModel
from engines.hf.prompt_cache import MOST_PROMPTS, PromptCache
from engines.operations import LoraSpec, SampleResult
from engines.tuning.collating import Pack
from tests.hf.conftest import MakeEngine
from tests.hf.material import Array, numbers, plain_model, request, sample_all, text
from tests.hf.test_sampling import close, trained

KEY = ("s", "")


def prefix(length: int, value: float = 0.0) -> Prefix:
    """Of two layers, 64 bytes a token."""
    part = torch.full((1, 2, length, 2), value)
    return {0: (part, part + 1), 1: (part + 2, part + 3)}


def kept(cache: PromptCache, tokens: Array, key: tuple[str, str] = KEY) -> int:
    return cache.find(key, tokens.tolist(), len(tokens))[0]


# ---------------------------------------------------------------------------- what is remembered


def test_the_longest_common_beginning_is_found() -> None:
    cache = PromptCache(1 << 20)
    first, second = text(1, 40), text(2, 50)
    second[:20] = first[:20]
    cache.keep(KEY, first.tolist(), prefix(40, 5.0))
    cache.keep(KEY, second.tolist(), prefix(50, 9.0))
    length, found = cache.find(KEY, [*second.tolist(), 1, 2], 100)
    assert length == 50 and found is not None
    assert found[1][0].shape == (1, 2, 50, 2) and float(found[1][0][0, 0, 0, 0]) == 11.0
    assert kept(cache, np.append(first[:33], [-1, -1])) == 33
    assert cache.find(KEY, first.tolist(), 39)[0] == 39
    assert kept(cache, first[:15]) == 0  # too short to be worth it
    assert kept(cache, text(3, 40)) == 0
    assert kept(cache, first, ("other", "")) == kept(cache, first, ("s", "adapters/a")) == 0


def test_what_is_remembered_is_a_copy() -> None:
    cache = PromptCache(1 << 20)
    tokens, numbers_ = text(1, 20), prefix(20, 5.0)
    cache.keep(KEY, tokens.tolist(), numbers_)
    for parts in numbers_.values():
        for part in parts:
            part.fill_(float("nan"))
    _, found = cache.find(KEY, tokens.tolist(), 20)
    assert found is not None and float(found[0][0].max()) == 5.0


def test_a_prompt_takes_the_place_of_its_beginnings() -> None:
    cache = PromptCache(1 << 20)
    whole = text(1, 60)
    for length in (20, 40, 60, 30):
        cache.keep(KEY, whole[:length].tolist(), prefix(length))
    assert cache.tokens == 60
    assert kept(cache, whole) == 60


def test_memory_is_bounded_and_the_last_used_stay() -> None:
    cache = PromptCache(100 * 64)
    prompts = [text(seed, 30) for seed in range(4)]
    for tokens in prompts[:3]:
        cache.keep(KEY, tokens.tolist(), prefix(30))
    assert kept(cache, prompts[0]) == 30  # used again, so the second one is the oldest
    cache.keep(KEY, prompts[3].tolist(), prefix(30))
    assert [kept(cache, tokens) for tokens in prompts] == [30, 0, 30, 30]
    cache.keep(KEY, text(9, 101).tolist(), prefix(101))  # larger than everything: not remembered
    assert cache.tokens == 90
    many = PromptCache(1 << 30)
    for seed in range(MOST_PROMPTS + 5):
        many.keep(KEY, text(seed, 20).tolist(), prefix(20))
    assert many.tokens == 20 * MOST_PROMPTS


# ---------------------------------------------------------------------------- in an engine


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of tokens of every pass that is no decoding step."""
    passes: list[int] = []
    hidden = BaseModel.hidden

    def counted(self: BaseModel, pack: Pack, *rest: Any) -> torch.Tensor:
        if pack.tokens.shape[0] == 1 and pack.tokens.shape[1] > 1:
            passes.append(pack.tokens.shape[1])
        return hidden(self, pack, *rest)

    monkeypatch.setattr(BaseModel, "hidden", counted)
    yield passes


def ask(engine: HfEngine, prompt: Array, session: str = "s", **settings: Any) -> SampleResult:
    return sample_all(engine, [request(prompt, session=session, max_tokens=4, **settings)])[0]


def test_all_samples_of_a_request_share_one_pass(engine: HfEngine, prefilled: list[int]) -> None:
    result = ask(engine, text(1, 60), session="", num_samples=20)
    assert prefilled == [60]
    assert len(result.sequences) == 20 and result.prompt_cache_hit_tokens == 0


def test_the_next_turn_computes_only_what_is_new(make_engine: MakeEngine, prefilled: list[int]) -> None:
    engine, fresh = make_engine(), make_engine()
    turn = text(1, 40)
    assert ask(engine, turn).prompt_cache_hit_tokens == 0
    for number in range(3):
        longer = np.append(turn, text(10 + number, 11)).astype(np.int32)
        prefilled.clear()
        result = ask(engine, longer, num_samples=2, topk_sample_logprobs=2)
        assert result.prompt_cache_hit_tokens == len(turn)
        assert prefilled == [11]
        close(result, ask(fresh, longer, session="", num_samples=2, topk_sample_logprobs=2))
        turn = longer
    assert ask(engine, turn).prompt_cache_hit_tokens == len(turn) - 1  # something has to be drawn from


def test_scores_of_the_last_tokens_need_the_last_tokens(
    engine: HfEngine, model_folders: dict[str, str], prefilled: list[int]
) -> None:
    """As `compute_logprobs` is meant to be used: one long context, several ends."""
    context = text(1, 100)
    ask(engine, context)
    model = plain_model(model_folders["tied"])
    for seed in (2, 3):
        whole = np.append(context, text(seed, 5)).astype(np.int32)
        prefilled.clear()
        result = ask(engine, whole, prompt_logprobs=True, prompt_logprobs_last_n=5, topk_prompt_logprobs=2)
        assert (result.prompt_cache_hit_tokens, prefilled) == (99, [6])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(whole.astype(np.int64))[None]).logits[0]
        expected = logits.log_softmax(-1).numpy()[np.arange(99, 104), whole[100:]]
        assert result.prompt_logprobs is not None
        found = numbers(result.prompt_logprobs)
        np.testing.assert_allclose(found[100:], expected, rtol=0, atol=1e-4)
        assert np.isnan(found[:100]).all()


def test_whole_prompts_are_scored_from_whole_passes(engine: HfEngine) -> None:
    prompt = text(1, 40)
    first = ask(engine, prompt, prompt_logprobs=True)
    again = ask(engine, prompt, prompt_logprobs=True, prompt_alternatives=2)
    assert first.prompt_cache_hit_tokens == again.prompt_cache_hit_tokens == 0
    assert first.prompt_logprobs is not None and again.prompt_logprobs is not None
    np.testing.assert_allclose(
        numbers(first.prompt_logprobs)[1:], numbers(again.prompt_logprobs)[1:], rtol=0, atol=1e-5
    )


def test_nothing_is_reused_across_sessions_and_weights(engine: HfEngine) -> None:
    prompt = text(1, 40)
    adapters = [trained(engine, run, LoraSpec(rank=4, seed=seed)) for seed, run in enumerate("ab", 1)]
    ask(engine, prompt)
    ask(engine, prompt, adapter=adapters[0])
    for session, adapter in (("t", None), ("", None), ("s", adapters[1])):
        assert ask(engine, prompt, session=session, adapter=adapter).prompt_cache_hit_tokens == 0
    for adapter in (None, *adapters):
        fresh = ask(engine, prompt, session="", adapter=adapter)
        found = ask(engine, prompt, adapter=adapter)
        assert found.prompt_cache_hit_tokens == 39
        close(found, fresh)


@pytest.mark.parametrize("model", ["tied", "llama"])
def test_prompts_with_and_without_a_past_in_one_pass(make_engine: MakeEngine, model: str) -> None:
    engine, fresh = make_engine(model), make_engine(model)
    known = [text(seed, 20 + seed) for seed in range(3)]
    for prompt in known:
        ask(engine, prompt)
    prompts = [
        text(7, 9),
        np.append(known[0], text(8, 5)),
        text(9, 9),
        text(11, 9),
        np.append(known[1], text(12, 1)),
        known[2],
        np.append(known[0], text(13, 30)),
    ]
    wanted = [
        request(prompt.astype(np.int32), session="s", max_tokens=6, seed=seed)
        for seed, prompt in enumerate(prompts)
    ]
    together = sample_all(engine, wanted)
    assert [result.prompt_cache_hit_tokens for result in together] == [0, 20, 0, 0, 21, 21, 20]
    for one, result in zip(wanted, together, strict=True):
        close(result, sample_all(fresh, [one])[0])


def test_deterministic_mode_computes_everything_again(make_engine: MakeEngine) -> None:
    engine = make_engine(deterministic=True)
    try:
        first, again = (ask(engine, text(1, 40)) for _ in range(2))
        assert again == first
        assert again.prompt_cache_hit_tokens == 0
    finally:
        torch.use_deterministic_algorithms(False)
