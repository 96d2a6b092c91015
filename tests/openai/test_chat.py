"""`/v1/chat/completions` over a scripted backend."""

from __future__ import annotations

from typing import Any

import pytest

from engines.operations import SampleRequest
from tests.openai.conftest import Connect
from tests.openai.doubles import CHAT_TEMPLATE, Script, ScriptedBackend, best, logprob

URL = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hello"}]


def says(
    text: str, reason: Any = "stop", *, end: int | None = 1, template: str | None = CHAT_TEMPLATE
) -> Any:
    """A backend that answers with this text and an end-of-sequence token."""

    def script(request: SampleRequest, index: int) -> Script:
        tokens = backend.text.encode(text, add_special_tokens=False)
        return Script([*tokens, *([] if end is None else [end])], reason)

    backend = ScriptedBackend(script, chat_template=template)
    return backend


async def ask(connect: Connect, backend: ScriptedBackend, **fields: Any) -> dict[str, Any]:
    response = await connect(backend).post(URL, json={"model": "tiny/base", "messages": MESSAGES} | fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def refused(connect: Connect, backend: ScriptedBackend, **fields: Any) -> dict[str, Any]:
    response = await connect(backend).post(URL, json={"model": "tiny/base", "messages": MESSAGES} | fields)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def prompt_text(backend: ScriptedBackend) -> str:
    tokens = backend.requests[-1].prompt.array().tolist()
    return backend.text.decode(tokens, skip_special_tokens=False)


async def test_an_answer_has_openai_s_shape(connect: Connect) -> None:
    backend = says("Hi there 🎉")
    answer = await ask(connect, backend)
    assert prompt_text(backend) == "<s><|turn|>user\nHello<|end|>\n<|turn|>assistant\n"
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi there 🎉", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt = backend.requests[0].prompt.shape[0]
    drawn = len(backend.text.encode("Hi there 🎉", add_special_tokens=False)) + 1
    assert answer["usage"]["prompt_tokens"] == prompt
    assert answer["usage"]["completion_tokens"] == drawn
    assert answer["usage"]["total_tokens"] == prompt + drawn


async def test_max_tokens_is_the_context_s_end_unless_given(connect: Connect) -> None:
    backend = says("Hi")
    await ask(connect, backend)
    await ask(connect, backend, max_tokens=5)
    await ask(connect, backend, max_completion_tokens=6)
    await ask(connect, backend, max_completion_tokens=7, max_tokens=7)
    assert [request.max_tokens for request in backend.requests] == [None, 5, 6, 7]


async def test_a_conversation_that_does_not_fit(connect: Connect) -> None:
    long = [{"role": "user", "content": "Hello world " * 200}]
    error = await refused(connect, says("Hi"), messages=long)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    error = await refused(connect, says("Hi"), max_tokens=256)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "256" in error["message"]


async def test_parts_roles_and_template_variables(connect: Connect) -> None:
    backend = says("Hi")
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    ]
    await ask(connect, backend, messages=messages, chat_template_kwargs={"enable_thinking": False})
    assert prompt_text(backend) == (
        "<s><|turn|>system\nBe brief.<|end|>\n<|turn|>user\nHello<|end|>\n<|turn|>assistant\n(no thinking)\n"
    )


async def test_what_the_template_would_drop_is_refused_by_name(connect: Connect) -> None:
    backend = says("Hi")
    await ask(connect, backend, chat_template_kwargs={"mood": None, "loud": False})  # they ask for nothing
    error = await refused(connect, backend, chat_template_kwargs={"enable_thinking": False, "mood": "glad"})
    assert (error["param"], error["code"]) == ("chat_template_kwargs", "unsupported_parameter")
    assert "'mood'" in error["message"]
    eve = [*MESSAGES, {"role": "user", "content": "Hi", "name": "eve"}]
    error = await refused(connect, backend, messages=eve)
    assert (error["param"], error["code"]) == ("messages[1].name", "unsupported_parameter")
    names = "{% for m in messages %}{{ m.name | default('somebody') }}: {{ m.content }}. {% endfor %}"
    backend = says("Hi", template=names)
    await ask(connect, backend, messages=eve)
    assert prompt_text(backend) == "somebody: Hello. eve: Hi. "


async def test_a_template_that_knows_developers_gets_them(connect: Connect) -> None:
    template = "{% for m in messages %}{{ '[' + m.role + ']' }}{% endfor %}{# developer #}"
    backend = says("Hi", template=template)
    await ask(connect, backend, messages=[{"role": "developer", "content": "x"}])
    assert prompt_text(backend) == "[developer]"


async def test_without_a_template_the_other_route_is_named(connect: Connect) -> None:
    error = await refused(connect, says("Hi", template=None))
    assert "/v1/completions" in error["message"]
    assert error["type"] == "invalid_request_error"


async def test_what_the_template_refuses(connect: Connect) -> None:
    backend = says("Hi", template="{{ raise_exception('roles must alternate') }}")
    error = await refused(connect, backend)
    assert "roles must alternate" in error["message"]
    assert error["param"] == "messages"
    error = await refused(connect, says("Hi", template="{{ '' }}"))
    assert "empty prompt" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "unsupported_parameter",
        ),
        ({"chat_template_kwargs": {"tools": [1]}}, "chat_template_kwargs", "bad_request"),
        ({"logprobs": True, "top_logprobs": 9}, "top_logprobs", "invalid_value"),
    ],
)
async def test_refusals_name_the_field(
    connect: Connect, fields: dict[str, Any], param: str, code: str
) -> None:
    error = await refused(connect, says("Hi"), **fields)
    assert (error["param"], error["code"]) == (param, code)


async def test_logprobs(connect: Connect) -> None:
    backend = says("Hi 🎉")
    answer = await ask(connect, backend, logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    tokens = [*backend.text.encode("Hi 🎉", add_special_tokens=False), 1]
    assert len(content) == len(tokens) == answer["usage"]["completion_tokens"]
    for position, (token, entry) in enumerate(zip(tokens, content, strict=True)):
        assert bytes(entry["bytes"]) == backend.text.token_bytes(token)
        assert entry["logprob"] == logprob(token, position)
        expected = [(backend.text.token_bytes(other), value) for other, value in best(token, 3)]
        assert [(bytes(top["bytes"]), top["logprob"]) for top in entry["top_logprobs"]] == expected
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]) == "Hi 🎉".encode()
    assert content[-1]["token"] == "</s>"
    plain = await ask(connect, backend, logprobs=True)
    assert all(entry["top_logprobs"] == [] for entry in plain["choices"][0]["logprobs"]["content"])
    assert [request.topk_sample_logprobs for request in backend.requests] == [3, 0]


async def test_several_answers_and_token_ids(connect: Connect) -> None:
    backend = says("Hi")
    answer = await ask(connect, backend, n=3, return_token_ids=True)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert backend.requests[0].num_samples == 3
    assert answer["prompt_token_ids"] == backend.requests[0].prompt.array().tolist()
    assert answer["choices"][2]["token_ids"] == [*backend.text.encode("Hi", add_special_tokens=False), 1]
    assert answer["usage"]["prompt_tokens"] == backend.requests[0].prompt.shape[0]
    assert answer["usage"]["completion_tokens"] == 3 * len(answer["choices"][0]["token_ids"])


async def test_a_length_that_was_reached(connect: Connect) -> None:
    answer = await ask(connect, says("Hi the", "length", end=None))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"] == "Hi the"
