"""Adapters, optimizer steps and samples, from their JSON bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tinker
import torch
from hypothesis import given
from hypothesis import strategies as st
from tinker import types
from tinker.lib.public_interfaces.sampling_client import _tensor_data_to_model

from engines.interface import UserError
from engines.operations import LoraSpec, OptimStep, SampleRequest, decode_sample, encode
from engines.tensors import Tensor
from gateway.errors import BadRequest
from gateway.tinker import schemas
from gateway.tinker.decoding import parse_json
from gateway.tinker.requests import lora_of, optim_step_of, require_adamw, sample_of
from tests.tinker.material import array, captured_requests

DRAWN = 424242


def draw() -> int:
    return DRAWN


def never() -> int:
    raise AssertionError("a seed was drawn although one was given")


def sample(fields: dict[str, Any] | None = None, **params: Any) -> SampleRequest:
    """The request of a JSON body with these sampling parameters."""
    body = {
        "sampling_session_id": "s",
        "seq_id": 1,
        "prompt": {"chunks": [{"tokens": [1, 2]}, {"tokens": [3], "type": "encoded_text"}]},
        "sampling_params": params,
        **(fields or {}),
    }
    return sample_of(parse_json(json.dumps(body).encode(), schemas.SampleBody), draw)


# ---------------------------------------------------------------------------- samples


def test_what_is_left_out_has_the_sdks_default() -> None:
    sdk = tinker.SamplingParams()
    found = sample({"sampling_params": None})
    assert (
        found
        == sample()
        == sample({"num_samples": None, "prompt_logprobs": None, "topk_prompt_logprobs": None})
    )
    assert array(found.prompt).tolist() == [1, 2, 3]
    assert found.prompt.dtype == "int32"
    assert (found.temperature, found.top_k, found.top_p) == (sdk.temperature, sdk.top_k, sdk.top_p)
    assert found.max_tokens is sdk.max_tokens is None
    assert found.num_samples == types.SampleRequest.model_fields["num_samples"].default == 1
    assert found.seed == DRAWN
    assert found.stop_at_eos
    assert (found.stop_strings, found.stop_tokens) == ((), ())
    assert (found.prompt_logprobs, found.topk_prompt_logprobs, found.topk_sample_logprobs) == (False, 0, 0)
    assert found.adapter is None


def test_null_is_as_good_as_left_out() -> None:
    nulls = dict.fromkeys(["max_tokens", "seed", "stop", "temperature", "top_k", "top_p"])
    assert sample(**nulls) == sample()


@pytest.mark.parametrize(
    ("stop", "strings", "tokens", "at_eos"),
    [
        (None, (), (), True),
        ([], (), (), False),
        ("\n\n", ("\n\n",), (), True),
        (["a", "b"], ("a", "b"), (), True),
        ([5, 6], (), (5, 6), True),
        (["a", 7], ("a",), (7,), True),
    ],
)
def test_the_forms_of_stop(stop: Any, strings: Any, tokens: Any, at_eos: bool) -> None:
    found = sample(stop=stop)
    assert (found.stop_strings, found.stop_tokens, found.stop_at_eos) == (strings, tokens, at_eos)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_tokens": st.integers(1, 4096),
            "temperature": st.floats(0, 10),
            "top_k": st.integers(-1, 100),
            "top_p": st.floats(0, 1),
            "seed": st.integers(-(2**63), 2**64 - 1),
        },
    )
)
def test_what_is_given_arrives(params: dict[str, Any]) -> None:
    found = sample(**params)
    for name, value in params.items():
        assert getattr(found, name) == value
    assert decode_sample(encode(found)) == found


def test_log_probabilities_that_are_asked_for() -> None:
    found = sample(
        {"prompt_logprobs": True, "topk_prompt_logprobs": 3, "topk_sample_logprobs": 2, "num_samples": 4}
    )
    assert (found.prompt_logprobs, found.topk_prompt_logprobs, found.topk_sample_logprobs) == (True, 3, 2)
    assert found.num_samples == 4


def test_stability_information_is_refused_with_what_there_is_instead() -> None:
    assert sample({"record_stability_info": False}) == sample({"record_stability_info": None}) == sample()
    with pytest.raises(
        UserError, match=r"record_stability_info is true; .* importance_sampling, ppo or cispo"
    ):
        sample({"record_stability_info": True})


def sent_targets(cells: torch.Tensor, *, sparse: bool = False) -> Any:
    """What the official SDK sends for a matrix of tokens."""
    data = (
        types.TensorData.from_torch_sparse(cells, pad_value=-1)
        if sparse
        else types.TensorData.from_torch(cells)
    )
    return _tensor_data_to_model(data).model_dump(mode="json", exclude_none=True)


def test_prompt_scores_that_are_asked_for() -> None:
    cells = torch.tensor([[5, -1], [-1, -1], [7, 9]])
    asked = {"target_prompt_logprobs": sent_targets(cells), "prompt_alt_tokens_k": 3}
    found = sample({**asked, "prompt_logprobs_last_n": 2})
    assert (found.prompt_alternatives, found.prompt_logprobs_last_n) == (3, 2)
    matrix = found.target_prompt_tokens
    assert matrix is not None and (matrix.shape, matrix.crow, matrix.col) == ((3, 2), None, None)
    assert array(matrix.values).tolist() == cells.tolist()
    assert decode_sample(encode(found)) == found
    plain = sample()
    assert (plain.target_prompt_tokens, plain.prompt_alternatives, plain.prompt_logprobs_last_n) == (
        None,
        0,
        None,
    )


def test_a_sparse_matrix_stays_sparse() -> None:
    cells = torch.full((40, 30), -1)
    cells[3, 29], cells[3, 4], cells[39, 0] = 0, 6, 8
    body = sent_targets(cells, sparse=True)
    matrix = sample({"target_prompt_logprobs": body}).target_prompt_tokens
    assert matrix is not None and matrix.crow is not None and matrix.col is not None
    assert matrix.shape == (40, 30)
    assert array(matrix.values).tolist() == [6, 0, 8]
    assert array(matrix.col).tolist() == [4, 29, 0]
    assert array(matrix.crow).tolist() == body["sparse_crow_indices"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"data": [1, 2], "dtype": "int64"}, r"has shape \[\]; it has two dimensions"),
        ({"data": [1, 2], "dtype": "int64", "shape": [2]}, r"has shape \[2\]; it has two dimensions"),
        (
            {"data": [1, 2], "dtype": "int64", "shape": [2, 2]},
            r"has 2 values, but its shape \[2, 2\] takes 4",
        ),
        ({"data": [1], "dtype": "int64", "shape": [1, -1]}, "sizes are not negative"),
        ({"data": [1.5], "dtype": "int64", "shape": [1, 1]}, "has dtype int64 and holds 1.5"),
        ({"data": [2**70], "dtype": "int64", "shape": [1, 1]}, "does not fit into int64"),
        (
            {"data": [1], "dtype": "int64", "shape": [1, 1], "sparse_crow_indices": [0, 1]},
            "they belong together",
        ),
    ],
)
def test_tokens_to_score_that_are_no_matrix(body: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"target_prompt_logprobs.*{message}"):
        sample({"target_prompt_logprobs": body})


@pytest.mark.parametrize(
    "chunk",
    [
        {"type": "image", "data": "aGk=", "format": "png", "expected_tokens": 2},
        {"type": "image_asset_pointer", "location": "http://x/y.png", "format": "png"},
        {"type": "dmel", "dmel": "aGk="},
        {"data": "aGk=", "format": "png"},
        {"location": "http://x/y.png"},
        {"type": "image", "tokens": [1]},
        {"type": "x" * 10_000},
        {},
    ],
)
def test_a_prompt_is_text(chunk: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"prompt.chunks\[1\] is .*; only encoded_text is served here"
    ) as raised:
        sample({"prompt": {"chunks": [{"tokens": [1]}, chunk]}})
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("chunk", "kind", "why"),
    [
        ({"data": "aGk=", "format": "png", "expected_tokens": 2}, "image", "images, so expected_tokens is not"),
        ({"location": "http://x/y.png", "format": "png"}, "image_asset_pointer", "images, so expected_tokens is not"),
        ({"dmel": "aGk="}, "dmel", "audio"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("named", [True, False])
def test_what_is_no_text_is_refused_by_its_name(
    chunk: dict[str, Any], kind: str, why: str, named: bool
) -> None:
    """SDKs before 0.18 leave the type out."""
    chunk = {**chunk, "type": kind} if named else chunk
    with pytest.raises(
        UserError, match=rf"prompt.chunks\[0\] is {kind};.*no model of this server takes {why}"
    ):
        sample({"prompt": {"chunks": [chunk]}})


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 2**70])
def test_a_token_has_32_bits(token: int) -> None:
    with pytest.raises(UserError, match="prompt holds a token id that is no 32-bit integer"):
        sample({"prompt": {"chunks": [{"tokens": [token]}]}})


def test_an_empty_prompt_is_for_the_engine_to_refuse() -> None:
    assert sample({"prompt": {"chunks": []}}).prompt == Tensor("int32", (0,), b"")


def test_every_recorded_sample_is_understood_or_refused_by_name() -> None:
    refused = set()
    for request in captured_requests():
        if request.route != "asample" or request.version == "0.1.0":
            continue
        body = parse_json(json.dumps(request.body).encode(), schemas.SampleBody)
        try:
            found = sample_of(body, draw)
        except UserError as error:
            refused.add(str(error).split()[0])
            continue
        given = request.body["sampling_params"]
        assert array(found.prompt).tolist() == [1, 2, 3, 4]
        assert found.max_tokens == given["max_tokens"]
        assert found.temperature == given.get("temperature", 1)
        assert found.num_samples == request.body["num_samples"]
        assert found.prompt_logprobs == request.body["prompt_logprobs"]
    assert refused == {"prompt.chunks[1]"}


# ---------------------------------------------------------------------------- runs


def lora(**fields: Any) -> schemas.LoraConfig:
    return parse_json(json.dumps(fields).encode(), schemas.LoraConfig)


def test_an_adapter_has_the_sdks_defaults() -> None:
    sdk = types.LoraConfig(rank=8)
    found = lora_of(lora(rank=8, seed=None, train_mlp=None), draw)
    assert found == LoraSpec(rank=8, seed=DRAWN)
    assert (found.train_unembed, found.train_mlp, found.train_attn) == (
        sdk.train_unembed,
        sdk.train_mlp,
        sdk.train_attn,
    )
    assert lora_of(None, draw) == LoraSpec(rank=32, seed=DRAWN)


@pytest.mark.parametrize("name", ["train_attn", "train_mlp", "train_unembed"])
def test_each_part_can_be_left_untrained(name: str) -> None:
    found = lora_of(lora(rank=4, seed=1, **{name: False}), never)
    parts = {part: getattr(found, part) for part in ("train_attn", "train_mlp", "train_unembed")}
    assert [part for part, trained in parts.items() if not trained] == [name]


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**64 - 1])
def test_a_seed_of_64_bits_is_kept(seed: int) -> None:
    spec = lora_of(lora(rank=4, seed=seed), never)
    assert spec.seed == seed
    assert sample(seed=seed).seed == seed


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**100])
def test_a_larger_seed_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=r"seed is .*; it must fit into 64 bits"):
        lora_of(lora(rank=4, seed=seed), never)
    with pytest.raises(UserError, match="seed"):
        sample(seed=seed)


@pytest.mark.parametrize(
    "config", [None, {}, {"type": "adamw"}, {"type": None}, {"type": "adamw", "later": None}]
)
def test_adamw_is_trained(config: dict[str, Any] | None) -> None:
    require_adamw(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"type": "dimuon", "version": 1},
            "optimizer_config.type is 'dimuon'; allowed is adamw .how dimuon makes its steps",
        ),
        ({"type": ["adamw"]}, "allowed is adamw"),
        ({"type": "adamw", "betas": [0.5, 0.5]}, "optimizer_config has 'betas'"),
    ],
)
def test_other_optimizers_are_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message) as raised:
        require_adamw(config)
    assert raised.value.param == "optimizer_config"


# ---------------------------------------------------------------------------- steps


def step(**fields: Any) -> OptimStep:
    body = {"model_id": "m", "seq_id": 2, **fields}
    return optim_step_of(parse_json(json.dumps(body).encode(), schemas.OptimStepBody))


ADAM = ["learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"]


@pytest.mark.parametrize("fields", [{}, {"adam_params": {}}, {"adam_params": None, "optimizer_params": None}])
def test_a_step_has_the_sdks_defaults(fields: dict[str, Any]) -> None:
    sdk = tinker.AdamParams()
    found = step(**fields)
    assert {name: getattr(found, name) for name in ADAM} == {name: getattr(sdk, name) for name in ADAM}


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(ADAM, st.floats(allow_nan=False, allow_infinity=False)))
)
def test_parameters_of_a_step_arrive_exactly(params: dict[str, float]) -> None:
    found = step(adam_params=params)
    assert {name: getattr(found, name) for name in params} == params


@pytest.mark.parametrize("params", [{"type": "dimuon", "learning_rate": 0.1}, {}, {"type": None}])
def test_a_step_of_another_optimizer_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"optimizer_params.type is .* adamw: send adam_params"):
        step(optimizer_params=params)
