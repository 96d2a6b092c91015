"""Replies, read with the official SDK's own decoders."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tinker import types
from tinker.lib._pydantic_conv import deserialize_json_response
from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response
from tinker.types.request_failed_response import RequestFailedResponse
from tinker.types.try_again_response import TryAgainResponse

from engines.operations import (
    CreateRunResult,
    ForwardResult,
    LoadWeightsResult,
    OptimStepResult,
    PromptAlternatives,
    Result,
    SampledSequence,
    SampleResult,
    SaveWeightsResult,
    TopLogprobs,
    encode,
)
from engines.tensors import Matrix, Tensor
from gateway.store.records import Future, FutureStatus
from gateway.tinker import results
from gateway.tinker import wire_pb2 as wire
from tests.tinker.material import captured

RUN = "s:train:0"


def future(**fields: Any) -> Future:
    defaults: dict[str, Any] = {"kind": "x", "seq_id": 1, "created_at": 0.0, "run_id": RUN}
    return Future(request_id="r", owner="o", engine="e", **{**defaults, **fields})


def protobuf(result: Result) -> bytes:
    content, media_type = results.render(future(), encode(result), protobuf=True)
    assert media_type == "application/x-protobuf"
    return content


def as_json(result: Result, *, accepts: bool = False, **fields: Any) -> dict[str, Any]:
    """The JSON reply, read with the strict parser that the SDK reads it with."""
    content, media_type = results.render(future(**fields), encode(result), protobuf=accepts)
    assert media_type == "application/json"
    found: dict[str, Any] = orjson.loads(content)
    assert "error" not in found
    assert None not in (found.get("type", ""), found.get("path", ""), found.get("model_id", ""))
    return found


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)


# ---------------------------------------------------------------------------- passes


@st.composite
def outputs(draw: st.DrawFn) -> list[dict[str, NDArray[Any]]]:
    """Log-probs of data with one target for each token, or K of them; K differs from datum to datum."""
    found = []
    for _ in range(draw(st.integers(0, 8))):
        shape = (draw(st.integers(0, 4)), *draw(st.sampled_from([(), (), (1,), (3,)])))
        bits = draw(st.lists(st.integers(0, 2**32 - 1), min_size=math.prod(shape), max_size=math.prod(shape)))
        found.append({"logprobs": np.array(bits, np.uint32).view(np.float32).reshape(shape)})
    return found


@given(outputs(), st.dictionaries(st.sampled_from(["loss:sum", "a:mean", "b:max"]), st.floats()))
@settings(max_examples=150, deadline=None)
def test_a_pass_arrives_bit_by_bit(data: list[dict[str, NDArray[Any]]], metrics: dict[str, float]) -> None:
    tensors = [{name: Tensor.of(values) for name, values in datum.items()} for datum in data]
    body = protobuf(ForwardResult(tensors, metrics))
    found = deserialize_forward_backward_output(body)
    assert found.loss_fn_output_type == "ArrayRecord"
    assert len(found.loss_fn_outputs) == len(data)
    for datum, arrays in zip(found.loss_fn_outputs, data, strict=True):
        assert set(datum) == {"logprobs"}
        assert datum["logprobs"].dtype == "float32"
        assert datum["logprobs"].shape == list(arrays["logprobs"].shape)
        assert datum["logprobs"].to_numpy().tobytes() == arrays["logprobs"].tobytes()
    assert set(found.metrics) == set(metrics)
    for name, value in metrics.items():
        assert found.metrics[name] == value or (math.isnan(value) and math.isnan(found.metrics[name]))


def test_data_of_one_form_share_a_record() -> None:
    shapes: list[tuple[int, ...]] = [(2,), (5,), (3, 4), (1, 4), (6,)]
    tensors = [{"logprobs": Tensor.of(np.zeros(shape, np.float32))} for shape in shapes]
    message = wire.ForwardBackwardOutput.FromString(protobuf(ForwardResult(tensors, {"loss:sum": 1.0})))
    assert [record.num_datums for record in message.loss_fn_outputs] == [2, 2, 1]
    field = message.loss_fn_outputs[1].fields["logprobs"]
    assert list(field.trailing_shape) == [4]
    assert np.frombuffer(field.offsets, "<i8").tolist() == [0, 48, 64]


def test_several_fields_and_integers() -> None:
    datum = {"logprobs": Tensor.of(floats(1, 2)), "ids": Tensor.of(np.array([[3, 4]], np.int64))}
    (found,) = deserialize_forward_backward_output(
        protobuf(ForwardResult([datum, datum], {}))
    ).loss_fn_outputs[1:]
    assert found["logprobs"].tolist() == [1, 2]
    assert (found["ids"].dtype, found["ids"].tolist()) == ("int64", [[3, 4]])


def test_the_recorded_reply_of_a_pass_can_be_made() -> None:
    theirs = deserialize_forward_backward_output(captured("retrieve_future_ForwardBackward_1_1"))
    tensors = [
        {name: Tensor.of(data.to_numpy()) for name, data in datum.items()} for datum in theirs.loss_fn_outputs
    ]
    ours = deserialize_forward_backward_output(protobuf(ForwardResult(tensors, theirs.metrics)))
    assert ours.metrics == theirs.metrics
    assert [[(n, t.shape, t.tolist()) for n, t in datum.items()] for datum in ours.loss_fn_outputs] == [
        [(n, t.shape, t.tolist()) for n, t in datum.items()] for datum in theirs.loss_fn_outputs
    ]


def test_a_pass_as_json() -> None:
    data = [{"logprobs": Tensor.of(floats(-1.5, -0.25))}, {"logprobs": Tensor.of(floats(1, 2).reshape(1, 2))}]
    metrics = {"loss:sum": 2.5, "bad:mean": math.nan, "worse:max": -math.inf}
    assert as_json(ForwardResult(data, metrics)) == {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": [
            {"logprobs": {"data": [-1.5, -0.25], "dtype": "float32", "shape": [2]}},
            {"logprobs": {"data": [1.0, 2.0], "dtype": "float32", "shape": [1, 2]}},
        ],
        "metrics": {"loss:sum": 2.5},
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_says_that_it_cannot_hold_what_is_not_finite(bad: float) -> None:
    sequence = SampledSequence(Tensor.of(np.array([1], np.int32)), Tensor.of(floats(bad)), "stop")
    for result in (ForwardResult([{"logprobs": Tensor.of(floats(0, bad))}], {}), SampleResult([sequence])):
        content, media_type = results.render(future(), encode(result), protobuf=False)
        failed = RequestFailedResponse.model_validate(orjson.loads(content))
        assert media_type == "application/json"
        assert "not finite" in failed.error
        assert failed.category == "user"


def test_many_data_take_little_time() -> None:
    tensors = [{"logprobs": Tensor.of(np.zeros(128, np.float32))} for _ in range(1024)]
    body = encode(ForwardResult(tensors, {"loss:sum": 1.0}))
    start = time.process_time()
    for _ in range(5):
        results.render(future(), body, protobuf=True)
    assert (time.process_time() - start) / 5 < 0.05


# ---------------------------------------------------------------------------- samples


def top(rows: list[list[tuple[int, float]]], k: int) -> TopLogprobs:
    tokens = np.array([[token for token, _ in row] for row in rows], np.int32).reshape(len(rows), k)
    logprobs = np.array([[value for _, value in row] for row in rows], np.float32).reshape(len(rows), k)
    return TopLogprobs(Tensor.of(tokens), Tensor.of(logprobs))


NOTHING = [(0, math.nan), (0, math.nan)]
PROMPT_TOP = [NOTHING, [(7, -0.5), (9, -1.5)], [(0, -0.25), (3, -2.0)]]
SAMPLE = SampleResult(
    sequences=[
        SampledSequence(
            Tensor.of(np.array([5, 2**31 - 1], np.int32)),
            Tensor.of(floats(-0.5, -1.25)),
            "stop",
            top([[(5, -0.5), (6, -1.0)], [(0, -0.125), (1, -3.0)]], 2),
        ),
        SampledSequence(Tensor.of(np.array([8], np.int32)), Tensor.of(floats(-4.0)), "length"),
    ],
    prompt_logprobs=Tensor.of(floats(math.nan, -2.0, -0.75)),
    topk_prompt_logprobs=top(PROMPT_TOP, 2),
    prompt_cache_hit_tokens=2,
)


def test_a_sample_arrives() -> None:
    found = deserialize_sample_response(protobuf(SAMPLE))
    first, second = found.sequences
    assert (first.tokens, first.logprobs, first.stop_reason) == ([5, 2**31 - 1], [-0.5, -1.25], "stop")
    assert first.topk_logprobs == [[(5, -0.5), (6, -1.0)], [(0, -0.125), (1, -3.0)]]
    assert (second.tokens, second.logprobs, second.stop_reason) == ([8], [-4.0], "length")
    assert second.topk_logprobs is None
    assert found.prompt_logprobs == [None, -2.0, -0.75]
    assert found.topk_prompt_logprobs == [None, *PROMPT_TOP[1:]]
    assert found.prompt_cache_hit_tokens == 2
    assert found.target_prompt_logprobs is None
    assert found.prompt_alt_tokens is None


SPARSE = Matrix(
    (3, 9),
    Tensor.of(floats(-0.5, 0.0, -2.5)),
    Tensor.of(np.array([0, 1, 1, 3], np.int64)),
    Tensor.of(np.array([8, 0, 4], np.int64)),
)
SCORED = SampleResult(
    SAMPLE.sequences[1:],
    target_prompt_logprobs=Matrix((2, 2), Tensor.of(floats(-0.5, 0.0, -1.5, -2.0).reshape(2, 2))),
    prompt_alternatives=PromptAlternatives(
        Tensor.of(np.array([[4, 4, 2], [1, 0, 3]], np.int64)), Tensor.of(floats(*range(-6, 0)).reshape(2, 3))
    ),
)


def test_scores_of_the_prompt_arrive() -> None:
    found = deserialize_sample_response(protobuf(SCORED))
    assert found.target_prompt_logprobs is not None and found.prompt_alt_tokens is not None
    assert found.target_prompt_logprobs.tolist() == [[-0.5, 0.0], [-1.5, -2.0]]
    assert found.target_prompt_logprobs.sparse_crow_indices is None
    tokens, logprobs = found.prompt_alt_tokens.tokens, found.prompt_alt_tokens.logprobs
    assert (tokens.dtype, tokens.tolist()) == ("int64", [[4, 4, 2], [1, 0, 3]])
    assert (logprobs.dtype, logprobs.tolist()) == ("float32", [[-6, -5, -4], [-3, -2, -1]])


def test_a_sparse_matrix_arrives_as_one() -> None:
    sent = SampleResult(SAMPLE.sequences[1:], target_prompt_logprobs=SPARSE)
    found = deserialize_sample_response(protobuf(sent)).target_prompt_logprobs
    assert found is not None and (found.dtype, found.shape) == ("float32", [3, 9])
    assert (list(found.data), found.sparse_crow_indices, found.sparse_col_indices) == (
        [-0.5, 0.0, -2.5],
        [0, 1, 1, 3],
        [8, 0, 4],
    )
    dense = found.to_torch()
    assert (float(dense[0, 8]), float(dense[2, 4]), int(dense.count_nonzero())) == (-0.5, -2.5, 2)


def test_an_empty_matrix_of_alternatives_arrives() -> None:
    """Of a prompt of one token; the SDK raises when there is none at all."""
    nothing = PromptAlternatives(
        Tensor.of(np.zeros((0, 3), np.int64)), Tensor.of(np.zeros((0, 3), np.float32))
    )
    found = deserialize_sample_response(
        protobuf(SampleResult([], prompt_alternatives=nothing))
    ).prompt_alt_tokens
    assert found is not None and found.tokens.shape == [0, 3]


def test_scores_of_the_prompt_as_json() -> None:
    assert as_json(SCORED)["target_prompt_logprobs"] == {
        "data": [-0.5, 0.0, -1.5, -2.0],
        "dtype": "float32",
        "shape": [2, 2],
    }
    assert as_json(SCORED)["prompt_alt_tokens"]["tokens"] == {
        "data": [4, 4, 2, 1, 0, 3],
        "dtype": "int64",
        "shape": [2, 3],
    }
    sparse = as_json(SampleResult([], target_prompt_logprobs=SPARSE))["target_prompt_logprobs"]
    assert sparse == {
        "data": [-0.5, 0.0, -2.5],
        "dtype": "float32",
        "shape": [3, 9],
        "sparse_crow_indices": [0, 1, 1, 3],
        "sparse_col_indices": [8, 0, 4],
    }


def test_a_sample_without_extras_arrives() -> None:
    found = deserialize_sample_response(protobuf(SampleResult(SAMPLE.sequences[1:])))
    assert found.prompt_logprobs is None
    assert found.topk_prompt_logprobs is None
    assert found.prompt_cache_hit_tokens == 0


@given(
    st.lists(
        st.tuples(
            st.lists(
                st.tuples(st.integers(0, 2**31 - 1), st.floats(-100, 0, width=32)), min_size=1, max_size=6
            ),
            st.sampled_from(["stop", "length"]),
        ),
        max_size=5,
    )
)
@settings(max_examples=100, deadline=None)
def test_every_sequence_arrives(sequences: list[tuple[list[tuple[int, float]], Any]]) -> None:
    made = [
        SampledSequence(
            Tensor.of(np.array([token for token, _ in pairs], np.int32)),
            Tensor.of(floats(*(value for _, value in pairs))),
            reason,
        )
        for pairs, reason in sequences
    ]
    found = deserialize_sample_response(protobuf(SampleResult(made))).sequences
    assert [
        (list(zip(one.tokens, one.logprobs or [], strict=True)), one.stop_reason) for one in found
    ] == sequences


def test_the_recorded_reply_of_a_sample_can_be_made() -> None:
    theirs = deserialize_sample_response(captured("retrieve_future_Sample_1_6"))
    made = [
        SampledSequence(
            Tensor.of(np.array(one.tokens, np.int32)),
            Tensor.of(floats(*(one.logprobs or []))),
            one.stop_reason,
        )
        for one in theirs.sequences
    ]
    assert theirs.prompt_logprobs_np is not None
    ours = deserialize_sample_response(
        protobuf(SampleResult(made, prompt_logprobs=Tensor.of(theirs.prompt_logprobs_np)))
    )
    assert ours.prompt_logprobs == theirs.prompt_logprobs
    for one, other in zip(ours.sequences, theirs.sequences, strict=True):
        assert (one.tokens, one.logprobs, one.stop_reason) == (
            other.tokens,
            other.logprobs,
            other.stop_reason,
        )


def test_a_sample_as_json() -> None:
    assert as_json(SAMPLE) == {
        "type": "sample",
        "sequences": [
            {
                "tokens": [5, 2**31 - 1],
                "logprobs": [-0.5, -1.25],
                "stop_reason": "stop",
                "topk_logprobs": [[[5, -0.5], [6, -1.0]], [[0, -0.125], [1, -3.0]]],
            },
            {"tokens": [8], "logprobs": [-4.0], "stop_reason": "length"},
        ],
        "prompt_logprobs": [None, -2.0, -0.75],
        "topk_prompt_logprobs": [None, [[7, -0.5], [9, -1.5]], [[0, -0.25], [3, -2.0]]],
        "prompt_cache_hit_tokens": 2,
    }
    assert set(as_json(SampleResult(SAMPLE.sequences[1:]))) == {"type", "sequences"}


# ---------------------------------------------------------------------------- everything else is JSON, always


@pytest.mark.parametrize("accepts", [True, False])
def test_a_step_has_only_finite_metrics(accepts: bool) -> None:
    metrics = {"unclipped_grad_l2:mean": 3.5, "a:mean": math.nan, "b:mean": math.inf}
    found = as_json(OptimStepResult(metrics), accepts=accepts)
    assert deserialize_json_response(found, types.OptimStepResponse).metrics == {
        "unclipped_grad_l2:mean": 3.5
    }


@pytest.mark.parametrize("accepts", [True, False])
def test_a_new_run_says_its_id(accepts: bool) -> None:
    found = deserialize_json_response(
        as_json(CreateRunResult(10), accepts=accepts), types.CreateModelResponse
    )
    assert found.model_id == RUN


def test_a_run_that_begins_at_a_checkpoint_was_loaded() -> None:
    found = as_json(CreateRunResult(10), context={"path": "tinker://a/weights/b"})
    response = deserialize_json_response(found, types.LoadWeightsResponse)
    assert (response.path, response.model_id) == ("tinker://a/weights/b", RUN)


def test_loading_says_what_was_loaded() -> None:
    found = as_json(LoadWeightsResult(), context={"path": "tinker://a/weights/b"})
    assert deserialize_json_response(found, types.LoadWeightsResponse).path == "tinker://a/weights/b"


def test_saving_says_where() -> None:
    context = {"checkpoint": {"kind": "weights", "path": "tinker://a/weights/b"}}
    found = as_json(SaveWeightsResult(5), context=context)
    assert deserialize_json_response(found, types.SaveWeightsResponse).path == "tinker://a/weights/b"

    context = {"checkpoint": {"kind": "sampler_weights", "path": "tinker://a/sampler_weights/b"}}
    named = deserialize_json_response(
        as_json(SaveWeightsResult(5), context=context), types.SaveWeightsForSamplerResponseInternal
    )
    assert (named.path, named.sampling_session_id) == ("tinker://a/sampler_weights/b", None)

    context = {"sampler": {"sampler_id": "s:sample:3"}}
    unnamed = deserialize_json_response(
        as_json(SaveWeightsResult(5), context=context), types.SaveWeightsForSamplerResponseInternal
    )
    assert (unnamed.path, unnamed.sampling_session_id) == (None, "s:sample:3")


def test_a_failure_says_what_and_whose_fault() -> None:
    failed = future(status=FutureStatus.FAILED, error="data[0] is empty", error_category="user")
    found = RequestFailedResponse.model_validate(results.failure(failed))
    assert (found.error, found.category) == ("data[0] is empty", "user")


def test_a_failure_of_the_server_has_an_id() -> None:
    failed = future(status=FutureStatus.FAILED, error="broken", error_category="server", error_id="abc123")
    found = RequestFailedResponse.model_validate(results.failure(failed))
    assert found.error == "broken (error id abc123)"
    assert found.category == "server"


def test_a_failure_without_a_sentence_is_still_one() -> None:
    found = RequestFailedResponse.model_validate(results.failure(future(status=FutureStatus.FAILED)))
    assert found.error
    assert found.category == "unknown"


@pytest.mark.parametrize("reason", [None, "the engine is starting"])
def test_an_open_future_is_to_be_asked_for_again(reason: str | None) -> None:
    body = results.pending("r", "paused_capacity", reason)
    found = TryAgainResponse.model_validate(body)
    assert (found.request_id, found.queue_state) == ("r", "paused_capacity")
    assert body.get("queue_state_reason") == reason
    assert None not in body.values()
