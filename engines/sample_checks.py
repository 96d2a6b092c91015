"""What a sample request must satisfy, whatever the engine: checked before an engine sees it."""

from __future__ import annotations

from typing import cast

from engines.fields import LARGEST, check_number, check_tokens, vocabulary_of
from engines.interface import EngineInfo, UserError
from engines.operations import SampleRequest

MAX_SAMPLES = 1024
"""Largest `num_samples` of one request."""
MAX_STOPS = 64
"""Most stop strings of one request; as many token ids."""
MAX_STOP_LENGTH = 1024
"""Longest stop string, in characters."""

_LEAST_TEMPERATURE = 1e-6
"""Below it, dividing by the temperature leaves float32's range."""


def check_sample(request: SampleRequest, info: EngineInfo) -> None:
    """Raises UserError if the request cannot be honoured by an engine that is described by `info`."""
    if not 1 <= request.num_samples <= MAX_SAMPLES:
        raise UserError(f"num_samples is {request.num_samples}; it must be from 1 to {MAX_SAMPLES}")
    _check_room(request, check_tokens("prompt", request.prompt, info), info)
    _check_drawing(request)
    _check_stops(request, info)
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
        count = cast(int, getattr(request, name))
        if not 0 <= count <= info.max_top_logprobs:
            raise UserError(f"{name} is {count}; it must be from 0 to {info.max_top_logprobs}")


def _check_room(request: SampleRequest, length: int, info: EngineInfo) -> None:
    wanted = request.max_tokens
    if wanted is None:
        if length >= info.max_context:
            raise UserError(
                f"the prompt has {length} tokens; {info.base_model} takes at most {info.max_context} with what is "
                "sampled, so there is room for none"
            )
        return
    if wanted < 1:
        raise UserError(f"sampling_params.max_tokens is {wanted}; it must be at least 1")
    if length + wanted > info.max_context:
        raise UserError(
            f"the prompt has {length} tokens and sampling_params.max_tokens is {wanted}, together {length + wanted}; "
            f"{info.base_model} takes at most {info.max_context}"
        )


def _check_drawing(request: SampleRequest) -> None:
    check_number(
        "sampling_params.temperature",
        request.temperature,
        f"0 for the most likely token, or from {_LEAST_TEMPERATURE:g} to {LARGEST:g}",
        lambda value: value == 0 or _LEAST_TEMPERATURE <= value <= LARGEST,
    )
    check_number(
        "sampling_params.top_p", request.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1
    )
    if request.top_k != -1 and request.top_k < 1:
        raise UserError(
            f"sampling_params.top_k is {request.top_k}; it must be at least 1, or -1 for no limit"
        )


def _check_stops(request: SampleRequest, info: EngineInfo) -> None:
    count = max(len(request.stop_strings), len(request.stop_tokens))
    if count > MAX_STOPS:
        raise UserError(f"sampling_params.stop has {count} entries; at most {MAX_STOPS} are taken")
    for token in request.stop_tokens:
        if not 0 <= token < info.vocab_size:
            raise UserError(f"sampling_params.stop holds the token {token}; {vocabulary_of(info)}")
    for string in request.stop_strings:
        if not 1 <= len(string) <= MAX_STOP_LENGTH:
            raise UserError(
                f"sampling_params.stop holds a text of {len(string)} characters; 1 to {MAX_STOP_LENGTH} are allowed"
            )
