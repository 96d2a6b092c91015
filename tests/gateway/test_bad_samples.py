"""Samples that cannot be drawn: each fails alone, with a sentence that names the field."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.gateway.conftest import clean, outcome

PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
LONGEST = 8192
PARAMS = {"max_tokens": 4, "seed": 7}


@pytest.fixture
def sampler(http: httpx.Client) -> str:
    """A sampler of the base model."""
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "fake/model"}
    created = http.post("/api/v1/create_sampling_session", json=body).json()
    return str(created["sampling_session_id"])


def draw(http: httpx.Client, sampler: str, seq_id: int = 0, **changes: Any) -> dict[str, Any]:
    """What becomes of a sample."""
    body = {
        "sampling_session_id": sampler,
        "seq_id": seq_id,
        "prompt": PROMPT,
        "sampling_params": PARAMS,
        "num_samples": 1,
    }
    answer = clean(http.post("/api/v1/asample", json=body | changes))
    return outcome(http, answer["request_id"]) if "request_id" in answer else answer


def prompt(*tokens: int) -> dict[str, Any]:
    return {"prompt": {"chunks": [{"tokens": list(tokens)}]}}


def targets(data: list[int], shape: list[int], dtype: str = "int64") -> dict[str, Any]:
    return {"target_prompt_logprobs": {"data": data, "dtype": dtype, "shape": shape}}


def params(**changes: Any) -> dict[str, Any]:
    return {"sampling_params": PARAMS | changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_samples": 0}, ["num_samples", "0", "1 to 1024"]),
        ({"num_samples": -1}, ["num_samples", "-1"]),
        ({"num_samples": 10**6}, ["num_samples", "1000000", "1024"]),
        ({"num_samples": 10**12}, ["num_samples"]),
        ({"num_samples": 1.5}, ["num_samples"]),
        (params(temperature=-1), ["temperature", "-1", "0 for the most likely token"]),
        (params(temperature="hot"), ["temperature", "float"]),
        (params(top_p=0), ["top_p", "0"]),
        (params(top_p=1.1), ["top_p", "1.1"]),
        (params(top_k=0), ["top_k", "0"]),
        (params(top_k=-2), ["top_k", "-2"]),
        (params(max_tokens=0), ["max_tokens", "0"]),
        (params(max_tokens=-5), ["max_tokens", "-5"]),
        (params(max_tokens=LONGEST), ["max_tokens", str(LONGEST), str(LONGEST + 3)]),
        (prompt(*[1] * LONGEST), ["prompt", str(LONGEST)]),
        (prompt(*[1] * (LONGEST + 1)), ["prompt", str(LONGEST + 1)]),
        (prompt(), ["prompt", "empty"]),
        (prompt(1, 259), ["prompt", "[1]", "259", "258"]),
        (prompt(1, -1), ["prompt", "-1"]),
        (prompt(2**40), ["prompt", "32-bit"]),
        ({"prompt": {"chunks": [{"type": "image", "data": "aGk="}]}}, ["prompt", "image", "encoded_text"]),
        ({"prompt": "Hello"}, ["prompt", "object"]),
        (params(seed=2**64), ["seed", "64 bits"]),
        (params(seed=-(2**63) - 1), ["seed", "64 bits"]),
        (params(seed="lucky"), ["seed"]),
        (params(stop=["x"] * 65), ["stop", "65", "64"]),
        (params(stop=["x" * 1025]), ["stop", "1025"]),
        (params(stop=[""]), ["stop", "0 characters"]),
        (params(stop=[259]), ["stop", "259"]),
        (params(stop=[-1]), ["stop", "-1"]),
        (params(stop=[[1]]), ["stop"]),
        (params(stop=True), ["stop"]),
        (params(presence_penalty=1.0), ["presence_penalty"]),
        ({"topk_prompt_logprobs": 10**6}, ["topk_prompt_logprobs", "1000000"]),
        ({"topk_sample_logprobs": -1}, ["topk_sample_logprobs", "-1"]),
        ({"target_prompt_logprobs": [1]}, ["target_prompt_logprobs", "object"]),
        (targets([5, 6], [1, 2]), ["target_prompt_logprobs", "[1, 2]", "[2, K]"]),
        (targets([5, 300], [2, 1]), ["target_prompt_logprobs", "[1, 0]", "300", "0 to 258"]),
        (targets([5, 6], [2, 1], dtype="float32"), ["target_prompt_logprobs", "int64"]),
        ({"prompt_alt_tokens_k": -1}, ["prompt_alt_tokens_k", "-1", "0 to 259"]),
        ({"prompt_logprobs_last_n": 2}, ["prompt_logprobs_last_n", "without prompt_logprobs"]),
        ({"prompt_logprobs_last_n": 3, "prompt_logprobs": True}, ["prompt_logprobs_last_n", "from 1 to 2"]),
        ({"record_stability_info": True}, ["record_stability_info", "importance_sampling"]),
        ({"tools": [{}]}, ["tools"]),
        ({"a\0b": 1}, ["unknown field"]),
        ({"seq_id": -1}, ["seq_id"]),
        ({"seq_id": 2**63}, ["seq_id"]),
        ({"sampling_session_id": "nobody's"}, ["there is no sampling session"]),
        ({"sampling_session_id": "a\0"}, ["there is no sampling session"]),
        ({"sampling_session_id": ""}, ["sampling_session_id"]),
    ],
)
def test_a_bad_sample_fails_alone(
    http: httpx.Client, sampler: str, changes: dict[str, Any], words: list[str]
) -> None:
    before = draw(http, sampler, 0)["sequences"]
    failed = draw(http, sampler, **{"seq_id": 1, **changes})
    sentence = failed.get("error") or failed["detail"]
    assert failed.get("category", "user") == "user"
    for word in words:
        assert word in sentence
    assert draw(http, sampler, 2)["sequences"] == before


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(http: httpx.Client, sampler: str, constant: str) -> None:
    body = (
        f'{{"sampling_session_id": "{sampler}", "seq_id": 5, "prompt": {{"chunks": [{{"tokens": [1]}}]}}, '
        f'"sampling_params": {{"temperature": {constant}}}}}'
    )
    answer = clean(http.post("/api/v1/asample", content=body))
    sentence = answer.get("detail") or outcome(http, answer["request_id"])["error"]
    assert "not JSON" in sentence or "temperature" in sentence


def test_every_form_of_stop_is_taken(http: httpx.Client, sampler: str) -> None:
    """Token 66 is the text `B` of the fake model's tokenizer."""
    free = draw(http, sampler, 0, **params(max_tokens=64, stop=[]))["sequences"][0]["tokens"]
    assert len(free) == 64
    third = free[2]
    length = free.index(third) + 1
    for seq_id, stop in enumerate(
        [[third], third.to_bytes().decode("latin-1") if third < 128 else [third]], 1
    ):
        drawn = draw(http, sampler, seq_id, **params(max_tokens=64, stop=stop))["sequences"][0]
        assert (drawn["tokens"], drawn["stop_reason"]) == (free[:length], "stop")


def test_numbers_at_their_limits_are_taken(http: httpx.Client, sampler: str) -> None:
    largest = draw(http, sampler, 2**63 - 1, **params(seed=2**64 - 1, top_k=2**31 - 1, top_p=1e-9))
    assert len(largest["sequences"][0]["tokens"]) == 4
    assert draw(http, sampler, 1, **params(seed=-(2**63)))["sequences"]
    assert draw(http, sampler, 2, **prompt(*[1] * (LONGEST - 4)))["sequences"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model": "no/such"}, ["no/such", "fake/model"]),
        ({"base_model": None}, ["base_model", "model_path"]),
        ({"model_path": "/etc/passwd"}, ["model_path", "tinker://"]),
        ({"model_path": "tinker://a/weights/../b"}, ["model_path", "tinker://RUN"]),
        ({"model_path": "tinker://a/weights/b\0"}, ["model_path"]),
        ({"model_path": "tinker://nobody/sampler_weights/x"}, ["there is no checkpoint"]),
        ({"session_id": "nobody's"}, ["there is no session"]),
        ({"sampling_session_seq_id": -1}, ["sampling_session_seq_id"]),
        ({"sampling_session_seq_id": 2**63}, ["sampling_session_seq_id"]),
        ({"dtype": "int4"}, ["dtype"]),
    ],
)
def test_a_sampler_that_cannot_be_made(http: httpx.Client, changes: dict[str, Any], words: list[str]) -> None:
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "fake/model"}
    answer = clean(http.post("/api/v1/create_sampling_session", json=body | changes))
    for word in words:
        assert word in answer["detail"]
