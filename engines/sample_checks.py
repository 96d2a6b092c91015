"""What a sample request must satisfy, whatever the engine: checked before an engine sees it."""

from __future__ import annotations

import math

import numpy as np

from engines.fields import (
    LARGEST,
    check_number,
    check_range,
    check_tokens,
    first_true,
    values_of,
    vocabulary_of,
)
from engines.interface import EngineInfo, UserError
from engines.operations import SampleRequest
from engines.tensors import Matrix

MAX_SAMPLES = 1024
"""Largest `num_samples` of one request."""
MAX_STOPS = 64
"""Most stop strings of one request; as many token ids."""
MAX_STOP_LENGTH = 1024
"""Longest stop string, in characters."""

MAX_BIASES = 1024
"""Most tokens that `logit_bias` may name."""
MAX_PROMPT_CELLS = 2**22
"""Most numbers of one kind that are told about one prompt: tokens times alternatives, or targets."""

_SHAPING_LIMITS = (
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
_LEAST_TEMPERATURE = 1e-6
"""Below it, dividing by the temperature leaves float32's range."""


def check_sample(request: SampleRequest, info: EngineInfo) -> None:
    """Raises UserError if the request cannot be honoured by an engine that is described by `info`."""
    if not 1 <= request.num_samples <= MAX_SAMPLES:
        raise UserError(f"num_samples is {request.num_samples}; it must be from 1 to {MAX_SAMPLES}")
    length = check_tokens("prompt", request.prompt, info)
    _check_room(request, length, info)
    _check_drawing(request)
    _check_shaping(request, info)
    _check_stops(request, info)
    _check_alternatives(request, length, info)
    _check_prompt_rows(request, info)
    _check_last_n(request, length)
    if request.target_prompt_tokens is not None:
        _check_targets(request.target_prompt_tokens, length, info)


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


def _check_shaping(request: SampleRequest, info: EngineInfo) -> None:
    for name, least, most in _SHAPING_LIMITS:
        check_range(name, getattr(request, name), least, most)
    if len(request.logit_bias) > MAX_BIASES:
        raise UserError(f"logit_bias has {len(request.logit_bias)} entries; at most {MAX_BIASES} are taken")
    for token, bias in request.logit_bias.items():
        if not 0 <= token < info.vocab_size:
            raise UserError(f"logit_bias holds the token {token}; {vocabulary_of(info)}")
        check_range(f"logit_bias[{token}]", bias, -100.0, 100.0)


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


# ---------------------------------------------------------------------------- scores of the prompt


def _check_alternatives(request: SampleRequest, length: int, info: EngineInfo) -> None:
    wanted = {
        "topk_prompt_logprobs": request.topk_prompt_logprobs,
        "topk_sample_logprobs": request.topk_sample_logprobs,
        "prompt_alt_tokens_k": request.prompt_alternatives,
    }
    for name, count in wanted.items():
        if not 0 <= count <= info.max_top_logprobs:
            raise UserError(f"{name} is {count}; it must be from 0 to {info.max_top_logprobs}")
        if "prompt" in name and length * count > MAX_PROMPT_CELLS:
            raise UserError(
                f"{name} is {count} and the prompt has {length} tokens, {length * count} numbers in all; at most "
                f"{MAX_PROMPT_CELLS} are told of one prompt"
            )


def _check_prompt_rows(request: SampleRequest, info: EngineInfo) -> None:
    wanted = [
        name
        for name, asked in (
            ("target_prompt_logprobs", request.target_prompt_tokens is not None),
            ("prompt_alt_tokens_k", request.prompt_alternatives > 0),
        )
        if asked
    ]
    if wanted and not info.any_prompt_token:
        raise UserError(
            f"{wanted[0]} is not told by the engine that samples {info.base_model}: of a prompt it tells "
            "prompt_logprobs and topk_prompt_logprobs"
        )


def _check_last_n(request: SampleRequest, length: int) -> None:
    last = request.prompt_logprobs_last_n
    if last is None:
        return
    if not request.prompt_logprobs:
        raise UserError(f"prompt_logprobs_last_n is {last} without prompt_logprobs; they belong together")
    if not 1 <= last <= length - 1:
        raise UserError(
            f"prompt_logprobs_last_n is {last}; the prompt has {length} tokens, so it must be from 1 to {length - 1}: "
            "the first token follows nothing"
        )


def _check_targets(targets: Matrix, length: int, info: EngineInfo) -> None:
    field = "target_prompt_logprobs"
    rows, columns = targets.shape
    if rows != length - 1 or not 1 <= columns < 2**31:
        raise UserError(
            f"{field} has shape {list(targets.shape)}; the prompt has {length} tokens, so it must be [{length - 1}, K] "
            "with K at least 1: row i names the tokens to score at token i + 1"
        )
    tokens = values_of(field, targets.values, "int64")
    _check_layout(field, targets)
    named = tokens >= 0
    wrong = (tokens < -1) | (tokens >= info.vocab_size)
    if wrong.any():
        place = first_true(wrong)
        raise UserError(
            f"{field}{list(place)} is {int(tokens[place])}; {vocabulary_of(info)}, and -1 names none"
        )
    if not 1 <= int(named.sum()) <= MAX_PROMPT_CELLS:
        raise UserError(f"{field} names {int(named.sum())} tokens; it must name 1 to {MAX_PROMPT_CELLS}")


def _check_layout(field: str, matrix: Matrix) -> None:
    """The parts of a matrix fit together; what is listed lies inside it, row after row, no cell twice."""
    (rows, columns), count = matrix.shape, math.prod(matrix.values.shape)
    if matrix.crow is None or matrix.col is None:
        if matrix.values.shape != matrix.shape or matrix.crow is not matrix.col:
            raise UserError(f"{field} holds {count} values, but its shape is {list(matrix.shape)}")
        return
    crow = values_of(f"{field}.sparse_crow_indices", matrix.crow, "int64")
    col = values_of(f"{field}.sparse_col_indices", matrix.col, "int64")
    ends = crow.shape == (rows + 1,) and crow[0] == 0 and crow[-1] == count and (crow <= count).all()
    if not ends or (np.diff(crow) < 0).any():
        raise UserError(
            f"{field}.sparse_crow_indices must have {rows + 1} entries that rise from 0 to the number of values, "
            f"{count}"
        )
    inside = col.shape == matrix.values.shape and ((col >= 0) & (col < columns)).all()
    lists = np.repeat(np.arange(rows), np.diff(crow))
    if not inside or ((np.diff(lists) == 0) & (np.diff(col) <= 0)).any():
        raise UserError(
            f"{field}.sparse_col_indices must name a column from 0 to {columns - 1} for each of the {count} values, "
            "rising within each row"
        )
