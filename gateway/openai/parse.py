"""From the bytes of a body to a request that can be honoured as it stands, or an error that says why not."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from engines.misfit import misfit_of, with_entries
from gateway.errors import BadRequest
from gateway.openai.errors import InvalidValue, UnsupportedParameter
from gateway.openai.requests import (
    HARMLESS,
    MAX_CHOICES,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    NEUTRAL,
    AnyRequest,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    R,
)

_SHOWN = 80
"""Characters of a value that an error repeats."""


def parse(body: bytes, kind: type[R]) -> R:
    """The request that a body holds.

    Raises BadRequest when it is not a JSON object, UnsupportedParameter for a field that is unknown or cannot be
    honoured, InvalidValue for a wrong value. null is the same as not sent.
    """
    sent = _object(body)
    fields = {field.name for field in msgspec.structs.fields(kind)}
    for name in sent.keys() - fields:
        _refuse_unless_harmless(name, sent[name])
    known = {name: sent[name] for name in sent.keys() & fields}
    try:
        request = msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        raise _explained(error, known, kind) from error
    _check_stops(request)
    if request.stream_options is not None and not request.stream:
        raise InvalidValue(
            "'stream_options' is only allowed together with 'stream': true.", param="stream_options"
        )
    if isinstance(request, CompletionRequest):
        _check_completion(request)
    else:
        _check_chat(request)
    return request


def parse_messages(messages: list[dict[str, Any]]) -> list[ChatMessage]:
    """The messages of a conversation; raises UnsupportedParameter for tools, images and audio among them."""
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def text_of(message: ChatMessage) -> str:
    """The text of a message: its content, or its parts put together with nothing between them."""
    if isinstance(message.content, str):
        return message.content
    return "".join(part["text"] for part in message.content)


def _object(body: bytes) -> dict[str, Any]:
    try:
        sent = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The body is not valid JSON: {error}.") from error
    if not isinstance(sent, dict):
        raise BadRequest(f"The body must be a JSON object; it is {_shown(sent)}.")
    return {name: value for name, value in sent.items() if value is not None}


def _refuse_unless_harmless(name: str, value: Any) -> None:
    if name in HARMLESS:
        return
    if name not in NEUTRAL:
        raise UnsupportedParameter(f"Unknown parameter: {name!r}. Leave it out.", param=name)
    if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
        allowed = " or ".join(msgspec.json.encode(neutral).decode() for neutral in NEUTRAL[name])
        raise UnsupportedParameter(
            f"{name!r} is not supported by this server and came as {_shown(value)}. Leave it out, or send {allowed}.",
            param=name,
        )


def _same(value: Any, neutral: Any) -> bool:
    # In Python True == 1 and False == 0; in JSON they are different values.
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _explained(
    error: msgspec.ValidationError, sent: dict[str, Any], kind: type[Any], prefix: str = ""
) -> InvalidValue:
    """The error of a conversion in terms of the field: what is allowed, and what came. What was sent is used up."""
    misfit = misfit_of(error)
    top = re.split(r"[.\[]", misfit.where)[0]
    came = f" It came as {_shown(sent[top])}." if top in sent else ""
    misfit = with_entries(misfit, sent, kind)
    param = ".".join(part for part in (prefix, misfit.where) if part) or None
    at = f"Invalid {param!r}: " if param else ""
    return InvalidValue(f"{at}{misfit.what}.{came}", param=param)


def _shown(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _check_stops(request: AnyRequest) -> None:
    stops = request.stops
    if len(stops) > MAX_STOPS:
        raise InvalidValue(
            f"'stop' holds {len(stops)} strings; at most {MAX_STOPS} are allowed.", param="stop"
        )
    if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidValue(
            f"Each string in 'stop' must have 1 to {MAX_STOP_CHARACTERS} characters; they are {_shown(request.stop)}.",
            param="stop",
        )


def _check_completion(request: CompletionRequest) -> None:
    if request.best_of is not None and request.best_of != request.n:
        raise UnsupportedParameter(
            f"'best_of' is not supported and came as {request.best_of} with 'n' {request.n}. Leave it out.",
            param="best_of",
        )
    if request.max_tokens == 0 and not request.echo:
        raise InvalidValue(
            "'max_tokens' must be at least 1, or 0 together with 'echo': true.", param="max_tokens"
        )


def _check_chat(request: ChatRequest) -> None:
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidValue(
            "'top_logprobs' is only allowed together with 'logprobs': true.", param="top_logprobs"
        )
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise InvalidValue(
            f"'max_tokens' is {both[0]} and 'max_completion_tokens' is {both[1]}; send one of them.",
            param="max_completion_tokens",
        )


def check_choices(prompts: int, n: int) -> None:
    """Raises InvalidValue when a request asks for more than MAX_CHOICES choices in all."""
    if prompts * n > MAX_CHOICES:
        raise InvalidValue(
            f"{prompts} prompts with 'n' {n} make {prompts * n} choices; at most {MAX_CHOICES} are allowed.",
            param="n",
        )


def _message(sent: dict[str, Any], where: str) -> ChatMessage:
    given = {key: value for key, value in sent.items() if value is not None}
    role = given.get("role")
    if role in ("tool", "function") or given.get("tool_calls") or given.get("function_call"):
        raise UnsupportedParameter(f"'{where}' belongs to a tool call; tools are not supported.", param=where)
    known = {field.name for field in msgspec.structs.fields(ChatMessage)}
    given = {key: value for key, value in given.items() if key in known or value not in ([], {}, "")}
    if unknown := sorted(given.keys() - known):
        raise UnsupportedParameter(
            f"'{where}.{unknown[0]}' is not supported. Leave it out.", param=f"{where}.{unknown[0]}"
        )
    try:
        message = msgspec.convert(given, ChatMessage)
    except msgspec.ValidationError as error:
        raise _explained(error, given, ChatMessage, where) from error
    if isinstance(message.content, list):
        for index, part in enumerate(message.content):
            _check_part(part, f"{where}.content[{index}]")
    return message


def _check_part(part: dict[str, Any], where: str) -> None:
    kind = part.get("type")
    if kind != "text":
        raise UnsupportedParameter(
            f"'{where}' is a part of type {_shown(kind)}; only \"text\" is supported.", param=where
        )
    if not isinstance(part.get("text"), str):
        raise InvalidValue(
            f"'{where}.text' must be a string; it came as {_shown(part.get('text'))}.", param=where
        )
    if unknown := sorted(part.keys() - {"type", "text"}):
        raise UnsupportedParameter(f"'{where}.{unknown[0]}' is not supported. Leave it out.", param=where)
