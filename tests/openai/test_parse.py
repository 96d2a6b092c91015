"""What requests may say, what is refused by name, and how a refusal reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.errors import BadRequest
from gateway.openai.errors import InvalidValue, UnsupportedParameter
from gateway.openai.parse import parse, parse_messages, text_of
from gateway.openai.requests import HARMLESS, NEUTRAL, ChatRequest, CompletionRequest
from gateway.openapi import schema_of

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse(json.dumps(CHAT | fields).encode(), ChatRequest)


def completion(**fields: Any) -> CompletionRequest:
    return parse(json.dumps(TEXT | fields).encode(), CompletionRequest)


MEANINGFUL: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "modalities": ["text", "audio"],
    "length_penalty": 0.5,
    "min_tokens": 3,
    "suffix": "tail",
    "store": True,
    "service_tier": "flex",
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "use_beam_search": True,
    "stop_token_ids": [1],
    "add_generation_prompt": False,
    "continue_final_message": True,
    "include_stop_str_in_output": True,
    "audio": {"voice": "x"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "verbosity": "low",
    "no_such_field": 0,
}


def test_every_neutral_value_has_a_meaningful_one_here() -> None:
    assert NEUTRAL.keys() <= MEANINGFUL.keys()


@pytest.mark.parametrize("name", MEANINGFUL)
@pytest.mark.parametrize("ask", [chat, completion])
def test_what_cannot_be_honoured_is_refused_by_name(ask: Any, name: str) -> None:
    with pytest.raises(UnsupportedParameter, match=name) as caught:
        ask(**{name: MEANINGFUL[name]})
    assert (caught.value.param, caught.value.status) == (name, 400)
    assert caught.value.code == "unsupported_parameter"


@pytest.mark.parametrize("ask", [chat, completion])
def test_neutral_harmless_and_null_values_are_accepted(ask: Any) -> None:
    plain = ask()
    for name, values in NEUTRAL.items():
        for value in values:
            assert ask(**{name: value}) == plain
    assert ask(**dict.fromkeys(HARMLESS, "anything")) == plain
    assert ask(**dict.fromkeys([*MEANINGFUL, "temperature", "n", "stop", "stream_options"])) == plain


@pytest.mark.parametrize(("name", "value"), [("min_tokens", False), ("length_penalty", True), ("store", 0)])
def test_true_is_not_one(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedParameter):
        completion(**{name: value})


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"temperature": 2.5}, "temperature", "2.0.*2.5"),
        ({"temperature": "hot"}, "temperature", "float.*str.*hot"),
        ({"top_p": 0}, "top_p", "> 0"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"min_p": 1.5}, "min_p", "<= 1"),
        ({"presence_penalty": 2.1}, "presence_penalty", "<= 2"),
        ({"presence_penalty": False}, "presence_penalty", "bool"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", ">= -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", ">= 0.01"),
        ({"logit_bias": {"5": 101}}, "logit_bias['5']", "<= 100"),
        ({"logit_bias": [5]}, "logit_bias", "object"),
        ({"n": 0}, "n", "1"),
        ({"n": 129}, "n", "128"),
        ({"n": True}, "n", "bool"),
        ({"seed": 2**63}, "seed", "Invalid"),
        ({"stop": ["a"] * 5}, "stop", "5 strings; at most 4"),
        ({"stop": [""]}, "stop", "1 to 512"),
        ({"stop": "x" * 513}, "stop", "1 to 512"),
        ({"stop": [1]}, r"stop[0]", "str"),
        ({"stream": "yes"}, "stream", "bool"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "together with 'stream'"),
        (
            {"stream": True, "stream_options": {"include_usages": True}},
            "stream_options.include_usages",
            "unknown",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "true",
        ),
        ({"model": ""}, "model", "length"),
        ({"model": 3}, "model", "str"),
    ],
)
@pytest.mark.parametrize("ask", [chat, completion])
def test_wrong_values_are_explained(ask: Any, fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidValue, match=says) as caught:
        ask(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"max_tokens": 0}, "max_tokens", "at least 1, or 0 together with 'echo'"),
        ({"max_tokens": -1}, "max_tokens", ">= 0"),
        ({"logprobs": 6}, "logprobs", "<= 5"),
        ({"logprobs": True}, "logprobs", "bool"),
        ({"best_of": 2}, "best_of", "'n' 1"),
        ({"prompt": 5}, "prompt", "int"),
    ],
)
def test_completion_values(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        completion(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "5.*6"),
        ({"logprobs": 1}, "logprobs", "bool"),
        ({"top_logprobs": 2}, "top_logprobs", "together with 'logprobs'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
        ({"messages": []}, "messages", "length"),
        ({"messages": "hi"}, "messages", "array"),
    ],
)
def test_chat_values(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b'{"model": NaN}', b"\xff\xfe"])
def test_bodies_that_are_no_object(body: bytes) -> None:
    with pytest.raises(BadRequest, match="body"):
        parse(body, CompletionRequest)


def test_missing_fields_are_named() -> None:
    with pytest.raises(InvalidValue, match="prompt") as caught:
        parse(b'{"model": "m"}', CompletionRequest)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("message", "error", "param"),
    [
        ({"role": "tool", "content": "4", "tool_call_id": "x"}, UnsupportedParameter, "messages[0]"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, UnsupportedParameter, "messages[0]"),
        ({"role": "assistant", "function_call": {"name": "f"}}, UnsupportedParameter, "messages[0]"),
        ({"role": "user", "content": "x", "mood": "glad"}, UnsupportedParameter, "messages[0].mood"),
        ({"role": "king", "content": "x"}, InvalidValue, "messages[0].role"),
        ({"role": "user"}, InvalidValue, "messages[0].content"),
        ({"role": "user", "content": 7}, InvalidValue, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
            UnsupportedParameter,
            "messages[0].content[0]",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]},
            UnsupportedParameter,
            "messages[0].content[1]",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, InvalidValue, "messages[0].content[0]"),
        (
            {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]},
            UnsupportedParameter,
            "messages[0].content[0]",
        ),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], error: type[BadRequest], param: str) -> None:
    with pytest.raises(error) as caught:
        parse_messages([message])
    assert caught.value.param == param


def test_messages_with_empty_tool_fields_and_parts() -> None:
    sent = {
        "role": "assistant",
        "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}],
        "tool_calls": [],
        "annotations": [],
        "refusal": None,
        "name": "eve",
    }
    (message,) = parse_messages([sent])
    assert (message.role, text_of(message), message.name) == ("assistant", "a b", "eve")


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_the_schema_names_every_field_and_refers_to_nothing(
    kind: type[ChatRequest | CompletionRequest],
) -> None:
    found = schema_of(kind)
    assert found["properties"].keys() == set(kind.__struct_fields__)
    assert "$ref" not in json.dumps(found)
    assert "$defs" not in json.dumps(found)
