"""From the neutral form to the wire: JSON for all, protobuf for passes and samples when the client accepts it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from engines.operations import (
    CreateRunResult,
    ForwardResult,
    LoadWeightsResult,
    OptimStepResult,
    Result,
    SampledSequence,
    SampleResult,
    SaveWeightsResult,
    TopLogprobs,
    decode_result,
)
from engines.tensors import Matrix, Tensor
from gateway.store.records import CheckpointKind, Future
from gateway.tinker import wire_pb2 as wire

PROTOBUF = "application/x-protobuf"
JSON = "application/json"

_OUTPUT_TYPE = "ArrayRecord"
_WIRE_DTYPE = {"float32": wire.DTYPE_FLOAT32, "int64": wire.DTYPE_INT64, "int32": wire.DTYPE_INT32}
_NOT_FINITE = {
    "error": "the result holds numbers that are not finite, and JSON has none; an SDK that accepts protobuf gets them. "
    "Numbers that are not finite most often mean that training diverged: try a smaller learning rate",
    "category": "user",
}
_NOTHING = -99999.0
"""The wire's logprob for a position without alternatives."""


def pending(request_id: str, state: str, reason: str | None) -> dict[str, Any]:
    """The answer for a future that is still open."""
    body = {"type": "try_again", "request_id": request_id, "queue_state": state}
    return body if reason is None else {**body, "queue_state_reason": reason}


def failure(future: Future) -> dict[str, Any]:
    """The answer for a future that failed: a sentence, whose fault it is, and the id that the log has too."""
    message = future.error or "the operation failed"
    if future.error_id is not None:
        message = f"{message} (error id {future.error_id})"
    return {"error": message, "category": future.error_category or "unknown"}


def render(future: Future, body: bytes, *, protobuf: bool) -> tuple[bytes, str]:
    """Bytes and media type of a finished future's result."""
    result = decode_result(body)
    if protobuf and isinstance(result, ForwardResult):
        return _forward_proto(result).SerializeToString(), PROTOBUF
    if protobuf and isinstance(result, SampleResult):
        return _sample_proto(result).SerializeToString(), PROTOBUF
    try:
        return json.dumps(_as_json(future, result), allow_nan=False).encode(), JSON
    except ValueError:
        return json.dumps(_NOT_FINITE).encode(), JSON


def _as_json(future: Future, result: Result) -> dict[str, Any]:
    match result:
        case CreateRunResult():
            # a run that begins at a checkpoint is made by the call that other runs load weights with
            if future.context.get("path") is not None:
                return {"path": future.context["path"], "model_id": future.run_id, "type": "load_weights"}
            return {"model_id": future.run_id, "type": "create_model"}
        case ForwardResult():
            return _forward_json(result)
        case OptimStepResult():
            return {"metrics": _finite(result.metrics), "type": "optim_step"}
        case SaveWeightsResult():
            return _saved_json(future, result)
        case LoadWeightsResult():
            return {"path": future.context["path"], "model_id": future.run_id, "type": "load_weights"}
        case SampleResult():
            return _sample_json(result)


_SAVED_BY = {
    CheckpointKind.TRAINING: "save_weights",
    CheckpointKind.SAMPLER: "save_weights_for_sampler",
    CheckpointKind.EXTERNAL: "save_weights_external",
}


def _saved_json(future: Future, result: SaveWeightsResult) -> dict[str, Any]:
    checkpoint, sampler = future.context.get("checkpoint"), future.context.get("sampler")
    if sampler is not None:
        return {"sampling_session_id": sampler["sampler_id"], "type": "save_weights_for_sampler"}
    assert checkpoint is not None
    kind = CheckpointKind(checkpoint["kind"])
    body = {"path": checkpoint["path"], "type": _SAVED_BY[kind]}
    return {**body, "size_bytes": result.size_bytes} if kind is CheckpointKind.EXTERNAL else body


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """JSON has no NaN, and the SDK's parser refuses it."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


# ---------------------------------------------------------------------------- passes


def _forward_proto(result: ForwardResult) -> wire.ForwardBackwardOutput:
    message = wire.ForwardBackwardOutput(loss_fn_output_type=_OUTPUT_TYPE, metrics=result.metrics)
    message.loss_fn_outputs.extend(_array_records(result.outputs))
    return message


def _array_records(outputs: list[dict[str, Tensor]]) -> Iterator[wire.ArrayRecord]:
    """One record for each run of data whose tensors have the same names, types and trailing shapes."""

    def layout(output: dict[str, Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
        return [(name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(output.items())]

    for fields, group in groupby(outputs, key=layout):
        alike = list(group)
        record = wire.ArrayRecord(type_tag=_OUTPUT_TYPE, num_datums=len(alike))
        for name, dtype, trailing in fields:
            parts = [output[name].data for output in alike]
            offsets = np.zeros(len(parts) + 1, dtype="<i8")
            np.cumsum([len(part) for part in parts], out=offsets[1:])
            field = record.fields[name]
            field.data = b"".join(parts)
            field.offsets = offsets.tobytes()
            field.dtype = _WIRE_DTYPE[dtype]
            field.trailing_shape.extend(trailing)
        yield record


def _forward_json(result: ForwardResult) -> dict[str, Any]:
    outputs = [{name: _tensor_json(tensor) for name, tensor in output.items()} for output in result.outputs]
    return {
        "loss_fn_output_type": _OUTPUT_TYPE,
        "loss_fn_outputs": outputs,
        "metrics": _finite(result.metrics),
    }


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    return {"data": tensor.array().ravel().tolist(), "dtype": tensor.dtype, "shape": list(tensor.shape)}


# ---------------------------------------------------------------------------- samples


def _sample_proto(result: SampleResult) -> wire.SampleResponse:
    message = wire.SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        message.sequences.append(_sequence_proto(sequence))
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = result.prompt_logprobs.data
    if result.topk_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk_proto(result.topk_prompt_logprobs))
    if result.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(_matrix_proto(result.target_prompt_logprobs))
    if result.prompt_alternatives is not None:
        message.prompt_alt_tokens.tokens.CopyFrom(_tensor_proto(result.prompt_alternatives.tokens))
        message.prompt_alt_tokens.logprobs.CopyFrom(_tensor_proto(result.prompt_alternatives.logprobs))
    return message


def _tensor_proto(tensor: Tensor) -> wire.Tensor:
    return wire.Tensor(dense=tensor.data, dtype=_WIRE_DTYPE[tensor.dtype], shape=tensor.shape)


def _matrix_proto(matrix: Matrix) -> wire.Tensor:
    """In the layout in which its request came."""
    if matrix.crow is None or matrix.col is None:
        return _tensor_proto(matrix.values)
    csr = wire.SparseCsr(
        values=matrix.values.data, crow_indices=matrix.crow.data, col_indices=matrix.col.data
    )
    return wire.Tensor(sparse_csr=csr, dtype=_WIRE_DTYPE[matrix.values.dtype], shape=matrix.shape)


def _sequence_proto(sequence: SampledSequence) -> wire.SampledSequence:
    reason = wire.STOP if sequence.stop_reason == "stop" else wire.LENGTH
    message = wire.SampledSequence(
        stop_reason=reason, tokens=sequence.tokens.data, logprobs=sequence.logprobs.data
    )
    if sequence.top_logprobs is not None:
        message.topk_sampled_logprobs.CopyFrom(_topk_proto(sequence.top_logprobs))
    return message


def _topk_proto(top: TopLogprobs) -> wire.TopkLogprobs:
    length, k = top.tokens.shape
    logprobs = np.nan_to_num(top.logprobs.array().astype("<f4"), nan=_NOTHING, neginf=_NOTHING)
    return wire.TopkLogprobs(token_ids=top.tokens.data, logprobs=logprobs.tobytes(), k=k, length=length)


def _sample_json(result: SampleResult) -> dict[str, Any]:
    """What was not asked for is left out; SDKs that read JSON ask for the log-probs of tokens and the best ones."""
    body: dict[str, Any] = {"type": "sample", "sequences": list(map(_sequence_json, result.sequences))}
    if result.prompt_cache_hit_tokens:
        body["prompt_cache_hit_tokens"] = result.prompt_cache_hit_tokens
    if result.prompt_logprobs is not None:
        values = result.prompt_logprobs.array().tolist()
        body["prompt_logprobs"] = [None if math.isnan(value) else value for value in values]
    if result.topk_prompt_logprobs is not None:
        body["topk_prompt_logprobs"] = _topk_json(result.topk_prompt_logprobs)
    if result.target_prompt_logprobs is not None:
        body["target_prompt_logprobs"] = _matrix_json(result.target_prompt_logprobs)
    if (drawn := result.prompt_alternatives) is not None:
        body["prompt_alt_tokens"] = {
            "tokens": _tensor_json(drawn.tokens),
            "logprobs": _tensor_json(drawn.logprobs),
        }
    return body


def _sequence_json(sequence: SampledSequence) -> dict[str, Any]:
    body: dict[str, Any] = {
        "tokens": sequence.tokens.array().tolist(),
        "logprobs": sequence.logprobs.array().tolist(),
        "stop_reason": sequence.stop_reason,
    }
    if sequence.top_logprobs is not None:
        body["topk_logprobs"] = _topk_json(sequence.top_logprobs)
    return body


def _matrix_json(matrix: Matrix) -> dict[str, Any]:
    body = {**_tensor_json(matrix.values), "shape": list(matrix.shape)}
    if matrix.crow is not None and matrix.col is not None:
        body["sparse_crow_indices"] = matrix.crow.array().tolist()
        body["sparse_col_indices"] = matrix.col.array().tolist()
    return body


def _topk_json(top: TopLogprobs) -> list[list[tuple[int, float]] | None]:
    rows = zip(top.tokens.array().tolist(), top.logprobs.array().tolist(), strict=True)
    return [
        None if math.isnan(logprobs[0]) else list(zip(tokens, logprobs, strict=True))
        for tokens, logprobs in rows
    ]
