"""forward_backward as the official SDK encodes it, and as it was recorded."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import tinker
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker.proto import tinker_public_pb2 as sdk_wire
from tinker.types.provenance_spans import PromptProvenanceSpan, ProvenanceSpans, SampledProvenanceSpan

from engines.interface import UserError
from engines.operations import Forward, ForwardBackward, decode_operation, encode
from gateway.errors import BadRequest
from gateway.tinker import wire_pb2 as wire
from gateway.tinker.requests import envelope_of, parse_forward_backward, pass_of, peek_envelope
from tests.tinker.material import array, captured, expand, inputs, parsed, sdk_body

DATUM = tinker.Datum(
    model_input=tinker.ModelInput.from_ints([5, 6, 7]),
    loss_fn_inputs={
        "target_tokens": tinker.TensorData(data=[6, 7, 8], dtype="int64"),
        "weights": tinker.TensorData(data=[0.0, 1.0, -0.5], dtype="float32"),
    },
)


# ---------------------------------------------------------------------------- recorded


def test_the_recorded_training_pass() -> None:
    message = parse_forward_backward(captured("fwdbwd_request_1"))
    envelope = envelope_of(message)
    assert (envelope.model_id, envelope.seq_id) == ("af610213-4aa9-4730-a57b-0943ef34dbdb:train:0", 1)
    assert not envelope.forward_only
    operation = pass_of(message)
    assert isinstance(operation, ForwardBackward)
    assert (operation.loss, operation.loss_config) == ("cross_entropy", {})
    assert len(operation.data) == 2
    for datum in operation.data:
        assert array(datum.tokens).tolist() == [1, 2, 3]
        assert inputs(datum) == {"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]}
        assert datum.loss_inputs["target_tokens"].dtype == "int64"
        assert datum.loss_inputs["weights"].dtype == "float32"


def test_the_recorded_forward_pass_has_its_configuration() -> None:
    operation = parsed(captured("fwdbwd_request_2"))
    assert isinstance(operation, Forward)
    message = sdk_wire.ForwardBackwardRequest.FromString(captured("fwdbwd_request_2"))
    assert operation.loss_config == dict(message.loss_fn_config) != {}


def test_the_recorded_sparse_tensors_are_written_out() -> None:
    operation = parsed(captured("fwdbwd_request_3"))
    message = sdk_wire.ForwardBackwardRequest.FromString(captured("fwdbwd_request_3"))
    assert any(isinstance(value, str) for value in operation.loss_config.values())
    for name, tensor in message.data[0].loss_fn_inputs.items():
        assert tensor.HasField("sparse_csr")
        csr = tensor.sparse_csr
        dtype = {sdk_wire.DTYPE_INT64: "int64", sdk_wire.DTYPE_FLOAT32: "float32"}[tensor.dtype]
        crow, col = (np.frombuffer(part, np.int64).tolist() for part in (csr.crow_indices, csr.col_indices))
        expected = expand(np.frombuffer(csr.values, dtype).tolist(), crow, col, tensor.shape[1])
        found = operation.data[0].loss_inputs[name]
        assert (found.dtype, found.shape) == (dtype, tuple(tensor.shape))
        assert array(found).tolist() == expected


def test_a_recorded_image_is_refused_where_it_stands() -> None:
    with pytest.raises(
        UserError, match=r"data\[0\]\.model_input\[1\] is image; only encoded_text.* takes images"
    ):
        parsed(captured("fwdbwd_request_4"))


@pytest.mark.parametrize(("name", "kind"), [("5", Forward), ("6", ForwardBackward)])
def test_the_recorded_passes_of_a_client_side_loss(name: str, kind: type) -> None:
    operation = parsed(captured(f"fwdbwd_request_{name}"))
    assert type(operation) is kind
    assert set(operation.data[0].loss_inputs) == {"target_tokens", "weights"}


# ---------------------------------------------------------------------------- the SDK's own encoder


def test_chunks_of_text_are_joined() -> None:
    model_input = tinker.ModelInput(
        chunks=[tinker.EncodedTextChunk(tokens=tokens) for tokens in ([1, 2], [3], [], [2**31 - 1, 0])]
    )
    datum = tinker.Datum(model_input=model_input, loss_fn_inputs=DATUM.loss_fn_inputs)
    (found,) = parsed(sdk_body([datum])).data
    assert found.tokens.dtype == "int32"
    assert array(found.tokens).tolist() == [1, 2, 3, 2**31 - 1, 0]


def test_provenance_changes_nothing() -> None:
    spans: ProvenanceSpans = [
        PromptProvenanceSpan(sequence_id="a", length=1),
        SampledProvenanceSpan(sequence_id="b", offset=3, length=2),
    ]
    with_provenance = DATUM.with_provenance(model_input=spans, loss_fn_inputs=spans)
    body = sdk_body([with_provenance])
    assert body != sdk_body([DATUM])
    assert parsed(body) == parsed(sdk_body([DATUM]))


def test_a_configuration_of_numbers_and_texts() -> None:
    config: dict[str, float | str] = {"beta": 0.05, "clip": 1, "name": "abc", "empty": ""}
    assert parsed(sdk_body([DATUM], config=config)).loss_config == config


def test_the_second_form_of_the_configuration_wins() -> None:
    message = parse_forward_backward(sdk_body([DATUM], config={"beta": 0.25, "only_v2": "x"}))
    message.loss_fn_config["beta"] = 99.0
    message.loss_fn_config["only_v1"] = 3.0
    assert pass_of(message).loss_config == {"beta": 0.25, "only_v2": "x", "only_v1": 3.0}


def test_a_configuration_without_a_value_is_refused() -> None:
    message = parse_forward_backward(sdk_body([DATUM]))
    message.loss_fn_config_v2["beta"].SetInParent()
    with pytest.raises(UserError, match=r"loss_fn_config\['beta'\] has no value"):
        pass_of(message)


TENSORS = st.tuples(st.lists(st.integers(0, 5), max_size=3), st.randoms(use_true_random=False))


@given(st.lists(TENSORS, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_what_the_sdk_encodes_arrives_bit_by_bit(shapes: list[Any], forward_only: bool) -> None:
    data: list[tinker.Datum] = []
    expected: list[dict[str, np.ndarray[Any, Any]]] = []
    for shape, random in shapes:
        whole = np.array([random.randint(-(2**63), 2**63 - 1) for _ in range(int(np.prod(shape)))], np.int64)
        bits = np.array([random.getrandbits(32) for _ in range(int(np.prod(shape)))], np.uint32)
        pair = {"target_tokens": whole.reshape(shape), "weights": bits.view(np.float32).reshape(shape)}
        expected.append(pair)
        tensors = {name: tinker.TensorData.from_numpy(values) for name, values in pair.items()}
        data.append(tinker.Datum(model_input=tinker.ModelInput.from_ints([1]), loss_fn_inputs=tensors))
    operation = parsed(sdk_body(data, forward_only=forward_only))
    assert type(operation) is (Forward if forward_only else ForwardBackward)
    assert decode_operation(encode(operation)) == operation
    for datum, pair in zip(operation.data, expected, strict=True):
        for name, values in pair.items():
            found = datum.loss_inputs[name]
            assert (found.dtype, found.data) == (values.dtype.name, values.tobytes())
            assert found.shape == (values.shape or (1,))


def test_small_requests_take_little_time() -> None:
    body = captured("fwdbwd_request_1")
    parsed(body)
    start = time.process_time()
    for _ in range(100):
        parsed(body)
    assert (time.process_time() - start) / 100 < 0.3e-3


# ---------------------------------------------------------------------------- envelopes


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05ab", b"{}", b"\x0a\x02\xff\xfe", b"\x1b" * 100])
def test_broken_bytes_are_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest, match="not a ForwardBackwardRequest"):
        parse_forward_backward(body)


@pytest.mark.parametrize(
    ("model_id", "seq_id", "named"), [("", 1, "model_id"), ("m", 0, "seq_id"), ("m", -1, "seq_id")]
)
def test_an_operation_without_its_place_is_a_bad_request(model_id: str, seq_id: int, named: str) -> None:
    message = wire.ForwardBackwardRequest(model_id=model_id, seq_id=seq_id)
    with pytest.raises(BadRequest) as raised:
        envelope_of(message)
    assert raised.value.param == named


@pytest.mark.parametrize("encoding", [None, "identity", "zstd", " ZSTD "])
def test_the_place_is_read_from_a_beginning(encoding: str | None) -> None:
    body = sdk_body([DATUM] * 500)
    if encoding is not None and encoding.strip().lower() == "zstd":
        noise = np.random.default_rng(0).bytes(1 << 20)
        message = parse_forward_backward(body)
        message.data[0].model_input[0].encoded_text.tokens = noise
        body = zstandard.compress(message.SerializeToString())
    envelope = peek_envelope(body[:1024], encoding)
    assert envelope is not None
    assert (envelope.model_id, envelope.seq_id) == ("s:train:0", 7)


@given(st.binary(max_size=1024), st.sampled_from([None, "zstd"]))
@settings(max_examples=200, deadline=1000)
def test_any_beginning_has_a_place_or_none(beginning: bytes, encoding: str | None) -> None:
    envelope = peek_envelope(beginning, encoding)
    assert envelope is None or (envelope.model_id and envelope.seq_id >= 1)
