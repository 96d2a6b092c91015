"""Calls of a sampling client, judged by numbers."""

from __future__ import annotations

import pickle
from typing import Any

from tinker import types

from tests.compat.registry import check
from tests.compat.world import TOKENS, Call, prompt, require_close, resolved, sampled_logprobs

_PARAMS: dict[str, Any] = {"max_tokens": 5, "seed": 3, "temperature": 1.0}


def _tokens(response: Any) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


@check("SamplingClient.sample")
def sample(call: Call) -> None:
    params = types.SamplingParams(**_PARAMS)
    response = call(prompt=prompt(), num_samples=2, sampling_params=params, include_prompt_logprobs=True)
    assert len(response.sequences) == 2
    for sequence in response.sequences:
        assert 1 <= len(sequence.tokens) <= 5 and sequence.stop_reason in ("stop", "length"), sequence
        whole = sampled_logprobs(call.world.sampler, [*TOKENS, *sequence.tokens])
        require_close(list(sequence.logprobs), whole[len(TOKENS) - 1 :])
    assert response.prompt_logprobs[0] is None
    require_close(list(response.prompt_logprobs[1:]), sampled_logprobs(call.world.sampler, TOKENS))
    again = call(prompt=prompt(), num_samples=2, sampling_params=params)
    assert _tokens(again) == _tokens(response)  # the same seed
    _limits(call)
    _alternatives(call)


def _limits(call: Call) -> None:
    """max_tokens and stop hold."""
    greedy = types.SamplingParams(max_tokens=6, temperature=0.0)
    first = call(prompt=prompt(), num_samples=1, sampling_params=greedy).sequences[0]
    stopping = types.SamplingParams(max_tokens=6, temperature=0.0, stop=[first.tokens[0]])
    stopped = call(prompt=prompt(), num_samples=1, sampling_params=stopping).sequences[0]
    assert list(stopped.tokens) == [first.tokens[0]] and stopped.stop_reason == "stop", stopped


def _alternatives(call: Call) -> None:
    """The options that later versions have, each against the plain numbers."""
    params = types.SamplingParams(max_tokens=3, temperature=0.0)
    expected = sampled_logprobs(call.world.sampler, TOKENS)
    if call.accepts("topk_prompt_logprobs"):
        response = call(prompt=prompt(), num_samples=1, sampling_params=params, topk_prompt_logprobs=3)
        rows = response.topk_prompt_logprobs
        assert rows[0] is None and all(len(row) == 3 for row in rows[1:]), rows
        for row, token, value in zip(rows[1:], TOKENS[1:], expected, strict=True):
            assert row[0][1] >= row[1][1] >= row[2][1]
            assert token not in dict(row) or abs(dict(row)[token] - value) < 1e-4
    if call.accepts("topk_sample_logprobs"):
        response = call(prompt=prompt(), num_samples=1, sampling_params=params, topk_sample_logprobs=2)
        (sequence,) = response.sequences
        best = [row[0][0] for row in sequence.topk_logprobs]
        assert best == list(sequence.tokens), sequence
    if call.accepts("target_prompt_logprobs"):
        targets = types.TensorData(data=TOKENS[1:], dtype="int64", shape=[len(TOKENS) - 1, 1])
        response = call(
            prompt=prompt(), num_samples=1, sampling_params=params, target_prompt_logprobs=targets
        )
        require_close(list(response.target_prompt_logprobs.data), expected)
    if call.accepts("prompt_alt_tokens_k"):
        response = call(prompt=prompt(), num_samples=1, sampling_params=params, prompt_alt_tokens_k=2)
        assert response.prompt_alt_tokens is not None
    if call.accepts("prompt_logprobs_last_n"):
        response = call(
            prompt=prompt(),
            num_samples=1,
            sampling_params=params,
            include_prompt_logprobs=True,
            prompt_logprobs_last_n=4,
        )
        require_close(list(response.prompt_logprobs[-4:]), expected[-4:])


@check("SamplingClient.compute_logprobs")
def compute_logprobs(call: Call) -> None:
    values = call(prompt())
    assert values[0] is None and len(values) == len(TOKENS)
    fresh = call.world.new_run()
    from tests.compat.world import logprobs

    require_close([float(value) for value in values[1:]], logprobs(fresh, TOKENS))
    if call.accepts("prompt_logprobs_last_n"):
        last = call(prompt(), prompt_logprobs_last_n=3)
        require_close(list(last[-3:]), list(values[-3:]))


@check("SamplingClient.get_base_model")
def get_base_model(call: Call) -> None:
    assert call() == call.world.base_model


@check("SamplingClient.create")
def create(call: Call) -> None:
    holder = call.world.sampler.holder
    made = call(holder, model_path=call.world.sampler_path)
    require_close(sampled_logprobs(made, TOKENS), call.world.trained_logprobs)


@check("SamplingClient.get_sampler_handle", "SamplingClient.from_sampler_handle")
def sampler_handle(call: Call) -> None:
    handle = call.target.get_sampler_handle()
    assert isinstance(handle, str)
    _same_samples(call, call.target.from_sampler_handle(handle, api_key=call.world.key))


@check("pickle SamplingClient")
def pickled(call: Call) -> None:
    _same_samples(call, pickle.loads(pickle.dumps(call.target)))  # noqa: S301 - pickled here


def _same_samples(call: Call, other: Any) -> None:
    params = types.SamplingParams(**_PARAMS)
    one, two = (resolved(sampler.sample(prompt(), 1, params)) for sampler in (call.target, other))
    assert _tokens(one) == _tokens(two)
