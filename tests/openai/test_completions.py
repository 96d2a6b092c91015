"""`/v1/completions` over a scripted backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engines.interface import UserError
from engines.operations import SampleRequest
from gateway.errors import EngineLost
from tests.openai.conftest import Connect
from tests.openai.doubles import Script, ScriptedBackend, best, logprob, prompt_logprob

URL = "/v1/completions"


def says(text: str, reason: Any = "length", eos: bool = False) -> ScriptedBackend:
    """A backend whose every continuation is this text, choice i with i exclamation marks behind it."""

    def script(request: SampleRequest, index: int) -> Script:
        tokens = backend.text.encode(text + "!" * index, add_special_tokens=False)
        return Script([*tokens, 1] if eos else tokens, reason)

    backend = ScriptedBackend(script)
    return backend


async def ask(connect: Connect, backend: ScriptedBackend, **fields: Any) -> dict[str, Any]:
    response = await connect(backend).post(URL, json={"model": "tiny/base", "prompt": "Hello"} | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def refused(connect: Connect, backend: ScriptedBackend, **fields: Any) -> tuple[int, dict[str, Any]]:
    response = await connect(backend).post(URL, json={"model": "tiny/base", "prompt": "Hello"} | fields)
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return response.status_code, error


async def test_an_answer_has_openai_s_shape(connect: Connect) -> None:
    backend = says(" there, café 🎉")
    answer = await ask(connect, backend)
    tokens = len(backend.text.encode(" there, café 🎉", add_special_tokens=False))
    prompt = len(backend.text.encode("Hello"))
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny/base"
    assert answer["id"].startswith("cmpl-")
    assert answer["created"] > 1_700_000_000
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [
        {"index": 0, "text": " there, café 🎉", "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_what_the_engine_is_asked(connect: Connect) -> None:
    backend = says("x")
    await ask(connect, backend)
    await ask(
        connect,
        backend,
        model="tinker://run/sampler_weights/a",
        max_tokens=7,
        n=3,
        seed=-5,
        temperature=0,
        top_p=0.5,
        top_k=4,
        stop=["a", "b"],
        logprobs=2,
        ignore_eos=True,
    )
    plain, full = backend.requests
    assert plain.prompt.array().tolist() == backend.text.encode("Hello")
    assert (plain.max_tokens, plain.num_samples, plain.temperature) == (16, 1, 1.0)
    assert (plain.top_k, plain.top_p, plain.stop_strings, plain.stop_at_eos) == (-1, 1.0, (), True)
    assert (plain.adapter, plain.prompt_logprobs, plain.topk_sample_logprobs) == (None, False, 0)
    assert full.adapter is not None
    assert full.adapter.adapter_id == "a-1"
    assert (full.max_tokens, full.num_samples, full.seed, full.temperature) == (7, 3, 2**63 - 5, 0.0)
    assert (full.top_k, full.top_p, full.stop_strings, full.stop_at_eos) == (4, 0.5, ("a", "b"), False)
    assert (full.prompt_logprobs, full.topk_prompt_logprobs, full.topk_sample_logprobs) == (False, 0, 2)


async def test_without_a_seed_every_request_draws_its_own(connect: Connect) -> None:
    backend = says("x")
    await ask(connect, backend)
    await ask(connect, backend, prompt=["a", "b"])
    seeds = [request.seed for request in backend.requests]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_the_default_of_max_tokens_shrinks_to_the_context(connect: Connect) -> None:
    backend = says("x")
    await ask(connect, backend, prompt=[5] * 250)
    assert backend.requests[0].max_tokens == 6


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hello", [[0, "Hello"]]),
        (["a", "b"], [[0, "a"], [0, "b"]]),
        ([7, 8, 9], [[7, 8, 9]]),
        ([[7, 8], [9]], [[7, 8], [9]]),
    ],
)
async def test_forms_of_prompts(connect: Connect, prompt: Any, expected: list[Any]) -> None:
    backend = says("x")
    answer = await ask(connect, backend, prompt=prompt, n=2)
    sent = [request.prompt.array().tolist() for request in backend.requests]
    if isinstance(expected[0][-1], str):
        expected = [backend.text.encode(text) for _, text in expected]
    assert sent == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))
    assert [choice["text"] for choice in answer["choices"]] == ["x", "x!"] * len(expected)
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 3 * len(expected)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3 * len(expected)


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"prompt": []}, "prompt", "0 prompts"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": ["a", 5]}, "prompt", "mixes"),
        ({"prompt": ["a"] * 65}, "prompt", "65 prompts"),
        ({"prompt": ["a"] * 33, "n": 4}, "n", "132 choices; at most 128"),
        ({"prompt": [3, 420]}, "prompt", "token id 420; ids of this model are 0 to 419"),
        ({"prompt": [-1]}, "prompt", "token id -1"),
        ({"prompt": [2**40]}, "prompt", "token id"),
        ({"logprobs": 9}, "logprobs", "<= 5"),
    ],
)
async def test_prompts_that_are_refused(
    connect: Connect, fields: dict[str, Any], param: str, text: str
) -> None:
    status, error = await refused(connect, says("x"), **fields)
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert text in error["message"]


async def test_more_alternatives_than_the_engine_has(connect: Connect) -> None:
    backend = says("x")
    backend.info = type(backend.info)(**{**_fields(backend.info), "max_top_logprobs": 2})
    status, error = await refused(connect, backend, logprobs=3)
    assert (status, error["param"]) == (400, "logprobs")
    assert "at most 2" in error["message"]


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


async def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(connect: Connect) -> None:
    status, error = await refused(connect, says("x"), prompt=[5] * 200, max_tokens=57)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "256" in error["message"]
    assert "200" in error["message"]
    assert "57" in error["message"]
    backend = says("x")
    await ask(connect, backend, prompt=[5] * 200, max_tokens=56)
    assert backend.requests[0].max_tokens == 56


# ---------------------------------------------------------------------------- how a text ends


async def test_an_end_of_sequence_token_is_counted_and_not_shown(connect: Connect) -> None:
    backend = says("Hi", "stop", eos=True)
    for skip in (True, False):
        answer = await ask(connect, backend, skip_special_tokens=skip)
        assert answer["choices"][0]["text"] == "Hi"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == len(backend.text.encode("Hi")) - 1 + 1


async def test_a_character_that_is_cut_off_is_shown_as_replacement(connect: Connect) -> None:
    backend = says("")
    first = next(token for token in range(420) if backend.text.token_bytes(token) == b"\xf0")
    backend.script = lambda request, index: Script([first], "length")
    assert (await ask(connect, backend))["choices"][0]["text"] == "\ufffd"


async def test_special_tokens_within_a_text(connect: Connect) -> None:
    backend = says("a<|turn|>b", "length")
    assert (await ask(connect, backend))["choices"][0]["text"] == "ab"
    shown = await ask(connect, backend, skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "a<|turn|>b"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Hello STOP and", "STOP", "Hello "),
        ("Hello STOP", ["and", "STOP", "ello"], "H"),
        ("Hello STO", "STOP", "Hello STO"),
        ("aab aaab", "aaab", "aab "),
        ("STOP", "STOP", ""),
        ("漢字🎉", "🎉", "漢字"),
        ("one<|turn|>user", "<|turn|>user", "one"),
        ("one<|turn|>two<|end|>", "<|end|>", "onetwo"),
        ("one<|turn|>two", "onetwo", "onetwo"),
    ],
)
async def test_a_stop_string_ends_the_text(connect: Connect, text: str, stop: Any, expected: str) -> None:
    backend = says(text, "stop")
    answer = await ask(connect, backend, stop=stop, logprobs=0)
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["finish_reason"] == "stop"
    tokens = backend.text.encode(text, add_special_tokens=False)
    assert (
        answer["usage"]["completion_tokens"] == len(tokens) == len(answer["choices"][0]["logprobs"]["tokens"])
    )


# ---------------------------------------------------------------------------- log-probs


async def test_logprobs_of_the_answer(connect: Connect) -> None:
    backend = says(" there")
    tokens = backend.text.encode(" there", add_special_tokens=False)
    answer = await ask(connect, backend, logprobs=2)
    found = answer["choices"][0]["logprobs"]
    assert "".join(found["tokens"]) == " there"
    assert found["token_logprobs"] == [logprob(token, i) for i, token in enumerate(tokens)]
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(len(tokens))]
    for token, position, shown in zip(tokens, range(len(tokens)), found["top_logprobs"], strict=True):
        spelled = {backend.text.token_bytes(t).decode(errors="replace"): v for t, v in best(token, 2)}
        own = backend.text.token_bytes(token).decode()
        assert shown == {own: logprob(token, position)} | spelled


async def test_logprobs_zero_gives_the_drawn_tokens_alone(connect: Connect) -> None:
    backend = says(" there")
    found = (await ask(connect, backend, logprobs=0))["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [
        {token: value} for token, value in zip(found["tokens"], found["token_logprobs"], strict=True)
    ]


async def test_parts_of_characters_are_spelled_as_bytes(connect: Connect) -> None:
    backend = says("🎉")
    answer = await ask(connect, backend, logprobs=0)
    choice = answer["choices"][0]
    assert choice["text"] == "🎉"
    spelled = choice["logprobs"]["tokens"]
    assert b"".join(_unspelled(token) for token in spelled) == "🎉".encode()
    if len(spelled) > 1:
        assert all(token.startswith("bytes:\\x") for token in spelled)
        assert choice["logprobs"]["text_offset"] == [0] * len(spelled)


def _unspelled(token: str) -> bytes:
    if not token.startswith("bytes:"):
        return token.encode()
    return bytes(int(part, 16) for part in token.removeprefix("bytes:").split("\\x")[1:])


async def test_impossible_log_probs_are_numbers_in_json(connect: Connect) -> None:
    backend = says("x")
    result = backend._result

    def impossible(scripts: list[Script], request: SampleRequest) -> Any:
        found = result(scripts, request)
        array = np.array([-np.inf], dtype=np.float32)
        sequence = found.sequences[0]
        changed = type(sequence)(sequence.tokens, type(sequence.tokens).of(array), sequence.stop_reason)
        return type(found)([changed])

    backend._result = impossible  # type: ignore[method-assign]
    answer = await ask(connect, backend, logprobs=0)
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize("prompt", ["Hello world", " naïve 🎉"])
@pytest.mark.parametrize("as_ids", [True, False])
async def test_echo_with_logprobs(connect: Connect, prompt: str, as_ids: bool) -> None:
    backend = says(" there")
    ids, tail = backend.text.encode(prompt), backend.text.encode(" there", add_special_tokens=False)
    answer = await ask(connect, backend, prompt=ids if as_ids else prompt, echo=True, logprobs=1)
    choice = answer["choices"][0]
    assert choice["text"] == prompt + " there"
    found = choice["logprobs"]
    expected = [prompt_logprob(token, i) if i else None for i, token in enumerate(ids)]
    expected += [logprob(token, i) for i, token in enumerate(tail)]
    assert found["token_logprobs"] == expected
    assert found["top_logprobs"][0] is None
    assert all(found["top_logprobs"][1:])
    assert found["tokens"][0] == "<s>"
    offsets = found["text_offset"]
    assert offsets[0] == offsets[1] == 0
    assert offsets[len(ids)] == len(prompt)
    assert len(offsets) == len(ids) + len(tail)
    assert backend.requests[0].prompt_logprobs
    assert backend.requests[0].topk_prompt_logprobs == 1
    assert answer["usage"]["completion_tokens"] == len(tail)


async def test_scoring_a_prompt_draws_one_token_and_drops_it(connect: Connect) -> None:
    backend = says("dropped")
    answer = await ask(connect, backend, echo=True, logprobs=1, max_tokens=0, n=2)
    assert backend.requests[0].max_tokens == 1
    for choice in answer["choices"]:
        assert choice["text"] == "Hello"
        assert choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == len(backend.text.encode("Hello"))
    assert answer["usage"]["completion_tokens"] == 0


async def test_token_ids_on_request(connect: Connect) -> None:
    backend = says(" there")
    answer = await ask(connect, backend, return_token_ids=True, echo=True, logprobs=0)
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == backend.text.encode("Hello")
    assert choice["token_ids"] == backend.text.encode(" there", add_special_tokens=False)


# ---------------------------------------------------------------------------- errors


async def test_errors_have_openai_s_shape(connect: Connect) -> None:
    status, error = await refused(connect, says("x"), model="nobody/nothing")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    status, error = await refused(connect, says("x"), tools=[{"type": "function"}])
    assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", "tools")
    assert error["type"] == "invalid_request_error"
    asleep = says("x")
    asleep.ready = False
    status, error = await refused(connect, asleep)
    assert (status, error["code"], error["type"]) == (503, "engine_unavailable", "server_error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status"), [(UserError("'top_k' is too large"), 400), (EngineLost("the engine died"), 503)]
)
async def test_what_the_engine_refuses_at_once_has_its_status(
    connect: Connect, failure: Exception, status: int, stream: bool
) -> None:
    backend = says("x")
    backend.failure = failure
    found, error = await refused(connect, backend, stream=stream, echo=True)
    assert (found, error["message"]) == (status, str(failure))


async def test_bodies_are_bounded(connect: Connect) -> None:
    backend = says("x")
    status, error = await refused(connect, backend, user="x" * 16 * 1024 * 1024)
    assert (status, error["code"]) == (413, "payload_too_large")
    assert "16777216 bytes" in error["message"]
    await ask(connect, backend, user="x" * 15 * 1024 * 1024)


async def test_a_key_is_needed(connect: Connect) -> None:
    client = connect(says("x"))
    for headers in ({"authorization": "Bearer wrong"}, {"authorization": ""}):
        response = await client.post(URL, json={"model": "tiny/base", "prompt": "x"}, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    response = await client.get("/v1/models", headers={"x-api-key": "tml-test", "authorization": ""})
    assert response.status_code == 200


async def test_both_prefixes_and_models(connect: Connect) -> None:
    client = connect(says("x"))
    base = {
        "id": "tiny/base",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "tandem",
        "max_model_len": 256,
        "ready": True,
    }
    for prefix in ("/v1", "/oai/api/v1"):
        assert (await client.get(f"{prefix}/models")).json() == {"object": "list", "data": [base]}
        assert (await client.get(f"{prefix}/models/tiny/base")).json() == base
        assert (await client.get(f"{prefix}/models/tiny%2Fbase")).json() == base
        path = "tinker%3A%2F%2Frun%2Fsampler_weights%2Fa"
        assert (await client.get(f"{prefix}/models/{path}")).json() == base | {
            "id": "tinker://run/sampler_weights/a"
        }
        missing = await client.get(f"{prefix}/models/other")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_openapi_has_the_schemas(connect: Connect) -> None:
    found = (await connect(says("x")).get("/openapi.json")).json()["paths"]
    body = found["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "echo", "stop", "top_k"} <= body["properties"].keys()
    body = found["/oai/api/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"][
        "schema"
    ]
    assert {"messages", "top_logprobs"} <= body["properties"].keys()
