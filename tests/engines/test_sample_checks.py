"""A sample that an engine must never see is refused, in words that name the field, what came and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest

from engines.interface import UserError
from engines.operations import AdapterRef, SampleRequest
from engines.sample_checks import MAX_SAMPLES, MAX_STOP_LENGTH, MAX_STOPS, check_sample
from engines.tensors import Tensor
from tests.engines.test_checks import INFO, ints, targets


def request(*prompt: int, **settings: Any) -> SampleRequest:
    return SampleRequest(ints(*(prompt or (1, 2, 3))), **{"num_samples": 1, "seed": 1, **settings})


@pytest.mark.parametrize(
    "sample",
    [
        request(),
        request(*[1] * 15),
        request(*[1] * 8, max_tokens=8),
        request(num_samples=MAX_SAMPLES, temperature=0.0, top_k=1, top_p=1e-9, max_tokens=1),
        request(top_k=10**9, topk_prompt_logprobs=20, topk_sample_logprobs=20),
        request(stop_tokens=(0, 99), stop_strings=("a", "b" * MAX_STOP_LENGTH)),
        request(stop_strings=("a",) * MAX_STOPS, adapter=AdapterRef("a", "checkpoints/a")),
    ],
)
def test_a_sample_that_is_allowed_passes(sample: SampleRequest) -> None:
    check_sample(sample, INFO)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (SampleRequest(ints(), 1, 1), "prompt is empty"),
        (SampleRequest(targets(1, 2), 1, 1), "prompt has dtype int64"),
        (SampleRequest(Tensor("int32", (2,), bytes(7)), 1, 1), "prompt holds 7 bytes"),
        (SampleRequest(Tensor("int32", (2, 1), bytes(8)), 1, 1), "prompt has shape [2, 1]"),
        (request(1, 100), "prompt[1] is 100; the tokens of test/model are 0 to 99"),
        (request(-1), "prompt[0] is -1"),
        (request(*[1] * 17), "prompt has 17 tokens; test/model takes at most 16"),
        (request(*[1] * 16), "the prompt has 16 tokens; test/model takes at most 16"),
        (request(max_tokens=14), "the prompt has 3 tokens and sampling_params.max_tokens is 14, together 17"),
        (request(max_tokens=0), "sampling_params.max_tokens is 0"),
        (request(max_tokens=-5), "sampling_params.max_tokens is -5"),
        (request(num_samples=0), f"num_samples is 0; it must be from 1 to {MAX_SAMPLES}"),
        (request(num_samples=MAX_SAMPLES + 1), f"num_samples is {MAX_SAMPLES + 1}"),
        (request(temperature=-0.5), "sampling_params.temperature is -0.5"),
        (request(temperature=float("nan")), "sampling_params.temperature is nan"),
        (request(temperature=float("inf")), "sampling_params.temperature is inf"),
        (request(top_k=0), "sampling_params.top_k is 0; it must be at least 1, or -1"),
        (request(top_k=-2), "sampling_params.top_k is -2"),
        (request(top_p=0.0), "sampling_params.top_p is 0.0"),
        (request(top_p=1.01), "sampling_params.top_p is 1.01"),
        (request(top_p=float("nan")), "sampling_params.top_p is nan"),
        (request(stop_tokens=(5, 100)), "sampling_params.stop holds the token 100"),
        (request(stop_tokens=(-1,)), "sampling_params.stop holds the token -1"),
        (request(stop_strings=("",)), "sampling_params.stop holds a text of 0 characters"),
        (request(stop_strings=("a" * (MAX_STOP_LENGTH + 1),)), f"a text of {MAX_STOP_LENGTH + 1} characters"),
        (request(stop_strings=("a",) * (MAX_STOPS + 1)), f"sampling_params.stop has {MAX_STOPS + 1} entries"),
        (request(topk_prompt_logprobs=21), "topk_prompt_logprobs is 21; it must be from 0 to 20"),
        (request(topk_sample_logprobs=-1), "topk_sample_logprobs is -1"),
    ],
)
def test_a_wrong_sample_is_refused(sample: SampleRequest, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_sample(sample, INFO)
    assert words in str(caught.value)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 9.9e-7])
def test_temperatures_between_greedy_and_what_float32_can_divide_by_are_refused(temperature: float) -> None:
    prompt = ints(1, 2)
    for fine in (0.0, 1e-6):
        check_sample(SampleRequest(prompt, 1, 1, max_tokens=1, temperature=fine), INFO)
    with pytest.raises(UserError, match=r"sampling_params\.temperature is .* 0 for the most likely token"):
        check_sample(SampleRequest(prompt, 1, 1, max_tokens=1, temperature=temperature), INFO)
