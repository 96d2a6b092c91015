"""A sample that an engine must never see is refused, in words that name the field, what came and what is allowed."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from engines.interface import UserError
from engines.operations import AdapterRef, SampleRequest
from engines.sample_checks import MAX_PROMPT_CELLS, MAX_SAMPLES, MAX_STOP_LENGTH, MAX_STOPS, check_sample
from engines.tensors import Matrix, Tensor
from tests.engines.test_checks import INFO, floats, ints, targets


def named(*rows: list[int]) -> Matrix:
    """A dense matrix of tokens to score."""
    return Matrix((len(rows), len(rows[0])), targets(*rows))


def listed(crow: list[int], col: list[int], values: list[int], shape: tuple[int, int] = (2, 9)) -> Matrix:
    """A sparse one."""
    return Matrix(shape, targets(*values), targets(*crow), targets(*col))


def request(*prompt: int, **settings: Any) -> SampleRequest:
    return SampleRequest(ints(*(prompt or (1, 2, 3))), **{"num_samples": 1, "seed": 1, **settings})


def last_n(last: int) -> SampleRequest:
    return request(prompt_logprobs=True, prompt_logprobs_last_n=last)


def named_in(matrix: Matrix) -> SampleRequest:
    return request(target_prompt_tokens=matrix)


@pytest.mark.parametrize(
    "sample",
    [
        request(),
        request(*[1] * 15),
        request(*[1] * 8, max_tokens=8),
        request(num_samples=MAX_SAMPLES, temperature=0.0, top_k=1, top_p=1e-9, max_tokens=1),
        request(top_k=10**9, topk_prompt_logprobs=20, topk_sample_logprobs=20),
        request(prompt_logprobs=True, prompt_logprobs_last_n=2, prompt_alternatives=20),
        request(prompt_logprobs=True, prompt_logprobs_last_n=1),
        request(1, prompt_alternatives=1),
        request(target_prompt_tokens=named([99, -1], [-1, 0])),
        request(target_prompt_tokens=listed([0, 0, 2], [3, 8], [5, -1])),
        request(min_p=1.0, repetition_penalty=0.01, presence_penalty=-2.0, frequency_penalty=2.0),
        request(repetition_penalty=100.0, logit_bias={0: -100.0, 99: 100.0}),
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
        (request(min_p=-0.1), "min_p is -0.1; it must be a finite number, at least 0 and at most 1"),
        (request(min_p=1.1), "min_p is 1.1"),
        (request(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (request(repetition_penalty=101.0), "repetition_penalty is 101.0"),
        (
            request(presence_penalty=2.1),
            "presence_penalty is 2.1; it must be a finite number, at least -2 and",
        ),
        (request(frequency_penalty=float("nan")), "frequency_penalty is nan"),
        (
            request(logit_bias={100: 1.0}),
            "logit_bias holds the token 100; the tokens of test/model are 0 to 99",
        ),
        (request(logit_bias={-1: 1.0}), "logit_bias holds the token -1"),
        (request(logit_bias={5: 101.0}), "logit_bias[5] is 101.0"),
        (request(logit_bias=dict.fromkeys(range(1025), 1.0)), "logit_bias has 1025 entries; at most 1024"),
        (request(prompt_alternatives=21), "prompt_alt_tokens_k is 21; it must be from 0 to 20"),
        (request(prompt_alternatives=-1), "prompt_alt_tokens_k is -1"),
        (request(prompt_logprobs_last_n=1), "prompt_logprobs_last_n is 1 without prompt_logprobs"),
        (last_n(0), "prompt_logprobs_last_n is 0; the prompt has 3 tokens, so it must be from 1 to 2"),
        (last_n(3), "prompt_logprobs_last_n is 3"),
        (request(1, prompt_logprobs=True, prompt_logprobs_last_n=1), "the first token follows nothing"),
        (named_in(named([5])), "target_prompt_logprobs has shape [1, 1]; the prompt has 3 tokens"),
        (named_in(named([5], [6], [7])), "it must be [2, K] with K at least 1"),
        (named_in(named([], [])), "target_prompt_logprobs has shape [2, 0]"),
        (
            named_in(named([5], [100])),
            "target_prompt_logprobs[1, 0] is 100; the tokens of test/model are 0 to 99",
        ),
        (named_in(named([5], [-2])), "target_prompt_logprobs[1, 0] is -2"),
        (named_in(named([5], [2**63 - 1])), f"is {2**63 - 1}; "),
        (named_in(named([-1], [-1])), "target_prompt_logprobs names 0 tokens"),
        (named_in(Matrix((2, 1), floats([1], [2]))), "target_prompt_logprobs has dtype float32"),
        (named_in(Matrix((2, 2), targets([1], [2]))), "holds 2 values, but its shape is [2, 2]"),
        (named_in(Matrix((2, 1), targets([1], [2]), crow=targets(0, 1, 2))), "holds 2 values"),
        (named_in(listed([0, 1], [3], [5])), "sparse_crow_indices must have 3 entries"),
        (named_in(listed([0, 2, 1], [3], [5])), "that rise from 0 to the number of values, 1"),
        (named_in(listed([0, -1, 1], [3], [5])), "sparse_crow_indices"),
        (named_in(listed([0, 2**62, 1], [3], [5])), "sparse_crow_indices"),
        (named_in(listed([0, 0, 1], [9], [5])), "sparse_col_indices must name a column from 0 to 8"),
        (named_in(listed([0, 0, 1], [-1], [5])), "sparse_col_indices"),
        (named_in(listed([0, 0, 2], [4, 4], [5, 6])), "rising within each row"),
        (named_in(listed([0, 0, 1], [1, 2], [5])), "for each of the 1 values"),
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


def test_what_is_told_of_one_prompt_is_bounded() -> None:
    info = msgspec.structs.replace(INFO, max_context=10**6, max_top_logprobs=256)
    prompt = Tensor.of(np.ones(2**15 + 1, dtype=np.int32))
    for name in ("topk_prompt_logprobs", "prompt_alternatives"):
        wanted = SampleRequest(prompt, 1, 1)
        check_sample(msgspec.structs.replace(wanted, **{name: 127}), info)
        with pytest.raises(
            UserError, match=f"32769 tokens, 4194432 numbers in all; at most {MAX_PROMPT_CELLS}"
        ):
            check_sample(msgspec.structs.replace(wanted, **{name: 128}), info)
    check_sample(SampleRequest(prompt, 1, 1, topk_sample_logprobs=256), info)
    for columns in (128, 129):
        cells = Tensor.of(np.ones((2**15, columns), dtype=np.int64))
        wanted = SampleRequest(prompt, 1, 1, target_prompt_tokens=Matrix((2**15, columns), cells))
        if columns == 128:
            check_sample(wanted, info)
        else:
            with pytest.raises(
                UserError, match=f"names 4227072 tokens; it must name 1 to {MAX_PROMPT_CELLS}"
            ):
                check_sample(wanted, info)
