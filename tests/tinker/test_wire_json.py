"""JSON bodies: what each SDK version sends, what may be left out, and what is refused by name."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import msgspec
import pytest

from engines.interface import UserError
from engines.operations import Forward, ForwardBackward
from gateway.errors import BadRequest, Unprocessable
from gateway.tinker import requests, schemas
from gateway.tinker.decoding import parse_json
from tests.tinker.material import CapturedRequest, array, captured_requests, inputs

SCHEMAS: dict[str, type[Any]] = {
    "asample": schemas.SampleBody,
    "client/config": schemas.ClientConfig,
    "client/dynamic_config": schemas.ClientConfig,
    "create_model": schemas.CreateModel,
    "create_sampling_session": schemas.CreateSamplingSession,
    "create_session": schemas.CreateSession,
    "finish": schemas.FinishSession,
    "forward": schemas.ForwardBackwardBody,
    "forward_backward": schemas.ForwardBackwardBody,
    "get_info": schemas.GetInfo,
    "load_weights": schemas.LoadWeights,
    "optim_step": schemas.OptimStepBody,
    "retrieve_future": schemas.RetrieveFuture,
    "save_weights": schemas.SaveWeights,
    "save_weights_for_sampler": schemas.SaveWeightsForSampler,
    "session_heartbeat": schemas.SessionHeartbeat,
    "telemetry": schemas.Telemetry,
    "ttl": schemas.SetTtl,
    "unload_model": schemas.UnloadModel,
    "weights_info": schemas.WeightsInfo,
}
CAPTURED = captured_requests()
"""The first SDK had no sessions and no seq_ids."""


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


def name_of(request: CapturedRequest) -> str:
    return f"{request.version} {request.route}"


# ---------------------------------------------------------------------------- recorded


@pytest.mark.parametrize("request_", CAPTURED, ids=name_of)
def test_what_the_sdk_sends_fits(request_: CapturedRequest) -> None:
    found = parse_json(encoded(request_.body), SCHEMAS[request_.route])
    for name, value in request_.body.items():
        if name in ("type", "platform", "process_uuid") or request_.route == "telemetry":
            continue
        kept = msgspec.to_builtins(getattr(found, name))
        images = name == "prompt" and any("tokens" not in chunk for chunk in value["chunks"])
        assert images or kept == value or set(_leaves(value)) <= set(_leaves(kept))


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in _leaves(entry)]
    if isinstance(value, list):
        return [leaf for entry in value for leaf in _leaves(entry)]
    return [value]


@pytest.mark.parametrize("route", ["forward", "forward_backward"])
def test_the_json_passes_of_older_sdks_say_the_same(route: str) -> None:
    bodies = [one for one in CAPTURED if one.route == route]
    assert len(bodies) >= 3
    for request in bodies:
        body = parse_json(encoded(request.body), schemas.ForwardBackwardBody)
        kind = ForwardBackward if route == "forward_backward" else Forward
        operation = requests.pass_of_json(body, kind)
        assert type(operation) is kind
        assert (operation.loss, operation.loss_config) == ("cross_entropy", {})
        assert len(operation.data) == 2
        for datum in operation.data:
            assert array(datum.tokens).tolist() == [1, 2, 3]
            assert inputs(datum) == {"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 1.0]}


NOTHING_TO_COMPUTE = {"data": [], "loss_fn": "cross_entropy"}
INPUT_OF: dict[type[requests.Pass], str] = {
    Forward: "forward_input",
    ForwardBackward: "forward_backward_input",
}


@pytest.mark.parametrize("kind", INPUT_OF)
@pytest.mark.parametrize("given", [[], ["other"], ["its own", "other"]])
def test_a_route_takes_its_own_input_only(kind: type[requests.Pass], given: list[str]) -> None:
    """Asked for a forward pass, the server must not train."""
    names = {
        "its own": INPUT_OF[kind],
        "other": next(INPUT_OF[each] for each in INPUT_OF if each is not kind),
    }
    fields = {names[each]: NOTHING_TO_COMPUTE for each in given}
    body = parse_json(encoded({"model_id": "m", "seq_id": 1, **fields}), schemas.ForwardBackwardBody)
    with pytest.raises(BadRequest, match=f"give {INPUT_OF[kind]}, and not"):
        requests.pass_of_json(body, kind)


# ---------------------------------------------------------------------------- what is left out, and what is unknown

STEP = {"model_id": "m", "seq_id": 1}
SAMPLE = {"sampling_session_id": "s", "seq_id": 0, "prompt": {"chunks": [{"tokens": [1]}]}}
MODEL = {"session_id": "s", "model_seq_id": 0, "base_model": "b"}
PASS = {
    **STEP,
    "forward_backward_input": {
        "data": [
            {
                "model_input": {"chunks": [{"tokens": [1]}]},
                "loss_fn_inputs": {"weights": {"data": [1.0], "dtype": "float32"}},
            }
        ],
        "loss_fn": "cross_entropy",
    },
}
STRICT: dict[str, tuple[type[Any], dict[str, Any], list[Any]]] = {
    "optim_step": (schemas.OptimStepBody, STEP, []),
    "adam_params": (schemas.OptimStepBody, {**STEP, "adam_params": {}}, ["adam_params"]),
    "asample": (schemas.SampleBody, SAMPLE, []),
    "prompt": (schemas.SampleBody, SAMPLE, ["prompt"]),
    "chunk": (schemas.SampleBody, SAMPLE, ["prompt", "chunks", 0]),
    "ttl": (schemas.SetTtl, {"ttl_seconds": None}, []),
    "sampling_params": (schemas.SampleBody, {**SAMPLE, "sampling_params": {}}, ["sampling_params"]),
    "create_model": (schemas.CreateModel, MODEL, []),
    "lora_config": (schemas.CreateModel, {**MODEL, "lora_config": {}}, ["lora_config"]),
    "pass": (schemas.ForwardBackwardBody, PASS, ["forward_backward_input"]),
    "datum": (schemas.ForwardBackwardBody, PASS, ["forward_backward_input", "data", 0]),
    "tensor": (
        schemas.ForwardBackwardBody,
        PASS,
        ["forward_backward_input", "data", 0, "loss_fn_inputs", "weights"],
    ),
    "save_weights": (schemas.SaveWeights, {**STEP, "path": "a"}, []),
    "sampler": (schemas.SaveWeightsForSampler, {**STEP, "path": "a"}, []),
    "load_weights": (schemas.LoadWeights, {**STEP, "path": "a"}, []),
}


def with_field(body: dict[str, Any], path: list[Any], value: object) -> bytes:
    """The body with a field `from_the_future` at the path."""
    copy = json.loads(json.dumps(body))
    place = copy
    for step in path:
        place = place[step]
    place["from_the_future"] = value
    return encoded(copy)


@pytest.mark.parametrize("value", [True, 1, 0.5, "x", [0], {"a": None}])
@pytest.mark.parametrize("name", STRICT)
def test_an_unknown_field_that_asks_for_something_is_refused_by_name(name: str, value: object) -> None:
    schema, body, path = STRICT[name]
    with pytest.raises(Unprocessable, match="unknown field `from_the_future`"):
        parse_json(with_field(body, path, value), schema)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
@pytest.mark.parametrize("name", STRICT)
def test_an_unknown_field_that_asks_for_nothing_means_nothing(name: str, value: object) -> None:
    schema, body, path = STRICT[name]
    assert parse_json(with_field(body, path, value), schema) == parse_json(encoded(body), schema)


def test_names_that_the_client_chooses_are_no_unknown_fields() -> None:
    body = {**MODEL, "user_metadata": {"nothing": None, "zero": 0}, "idle": None}
    assert parse_json(encoded(body), schemas.CreateModel).user_metadata == {"nothing": None, "zero": 0}


@pytest.mark.parametrize(
    "schema", [schemas.CreateSession, schemas.ClientConfig, schemas.Telemetry, schemas.FinishSession]
)
def test_bodies_that_only_connect_ignore_what_they_do_not_know(schema: type[Any]) -> None:
    assert parse_json(encoded({"from_the_future": {"a": [1]}}), schema) == parse_json(b"{}", schema)


@pytest.mark.parametrize("name", STRICT)
def test_every_optional_field_may_be_null_and_type_may_be_missing(name: str) -> None:
    schema, body, _ = STRICT[name]
    optional = {
        field.encode_name: None
        for field in msgspec.structs.fields(schema)
        if not field.required and field.default is None
    }
    assert "type" in optional
    assert parse_json(encoded({**optional, **body}), schema) == parse_json(encoded(body), schema)


# ---------------------------------------------------------------------------- values that do not fit


@pytest.mark.parametrize(
    ("schema", "body", "message"),
    [
        (schemas.OptimStepBody, {"model_id": "m", "seq_id": 0}, ">= 1"),
        (schemas.OptimStepBody, {"model_id": "m", "seq_id": 2**31}, "<= 2147483647"),
        (schemas.OptimStepBody, {"model_id": "m", "seq_id": True}, "got `bool`"),
        (schemas.OptimStepBody, {"model_id": "m", "seq_id": "1"}, "got `str`"),
        (schemas.OptimStepBody, {"model_id": "", "seq_id": 1}, "length >= 1"),
        (schemas.OptimStepBody, {"model_id": "m" * 301, "seq_id": 1}, "length <= 300"),
        (
            schemas.OptimStepBody,
            {**STEP, "adam_params": {"beta1": "0.9"}},
            "fit: adam_params.beta1: Expected",
        ),
        (
            schemas.OptimStepBody,
            {**STEP, "adam_params": {"beta1": None}},
            "fit: adam_params.beta1: Expected `float`, got `null`",
        ),
        (schemas.SampleBody, {**SAMPLE, "seq_id": 2**63}, "<= 9223372036854775807"),
        (schemas.SampleBody, {**SAMPLE, "num_samples": 10**30}, "fit: num_samples: Expected"),
        (
            schemas.SampleBody,
            {**SAMPLE, "sampling_params": {"max_tokens": 2**31}},
            "fit: sampling_params.max_tokens: Expected",
        ),
        (
            schemas.SampleBody,
            {**SAMPLE, "sampling_params": {"max_tokens": 1.5}},
            "fit: sampling_params.max_tokens: Expected",
        ),
        (
            schemas.SampleBody,
            {**SAMPLE, "sampling_params": {"stop": [1.5]}},
            r"fit: sampling_params.stop\[0\]: Expected",
        ),
        (
            schemas.SampleBody,
            {**SAMPLE, "sampling_params": {"stop": 5}},
            "fit: sampling_params.stop: Expected",
        ),
        (schemas.CreateModel, {**MODEL, "lora_config": {"rank": 2**40}}, "fit: lora_config.rank: Expected"),
        (schemas.SetTtl, {"ttl_seconds": 3599}, ">= 3600"),
        (schemas.SetTtl, {}, "missing required field `ttl_seconds`"),
        (schemas.CreateModel, {"session_id": "s", "base_model": "b"}, "model_seq_id belong together"),
        (schemas.CreateModel, {"model_seq_id": 1, "base_model": "b"}, "model_seq_id belong together"),
        (schemas.SampleBody, {**SAMPLE, "sampling_session_id": None}, "seq_id belongs to sampling_session"),
        (schemas.LoadWeights, {"session_id": "s", "model_seq_id": 1, "seq_id": 1, "path": "a"}, "seq_id"),
        (schemas.SetTtl, {"ttl_seconds": 10**9}, "<= "),
        (
            schemas.SaveWeights,
            {**STEP, "path": "a", "user_metadata": {"a": 1}},
            r"fit: user_metadata\['a'\]: Expected",
        ),
    ],
)
def test_values_that_do_not_fit_are_named(schema: type[Any], body: dict[str, Any], message: str) -> None:
    with pytest.raises(Unprocessable, match=message):
        parse_json(encoded(body), schema)


FIT: dict[str, Any] = {
    "model_input": {"chunks": []},
    "loss_fn_inputs": {"weights": {"data": [0.5], "dtype": "float32"}},
}


def a_pass(*data: dict[str, Any], config: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
    return {
        **STEP,
        "forward_backward_input": {"data": data, "loss_fn": "ppo", "loss_fn_config": config, **other},
    }


def with_inputs(**tensors: Any) -> dict[str, Any]:
    return {"model_input": {"chunks": []}, "loss_fn_inputs": {**FIT["loss_fn_inputs"], **tensors}}


@pytest.mark.parametrize(
    ("body", "field", "what"),
    [
        (
            a_pass(FIT, with_inputs(target_tokens={"data": [1, 2, "x"], "dtype": "int64"}, later=5)),
            "forward_backward_input.data[1].loss_fn_inputs['target_tokens'].data[2]",
            "Expected `int | float`, got `str`",
        ),
        (
            a_pass(with_inputs(target_tokens={"data": [1]}), loss_fn=5),
            "forward_backward_input.data[0].loss_fn_inputs['target_tokens'].dtype",
            "missing required field `dtype`",
        ),
        (
            a_pass(FIT, with_inputs(**{"a.b[0]": {"data": [1], "dtype": "int64", "new": 7}})),
            "forward_backward_input.data[1].loss_fn_inputs['a.b[0]'].new",
            "unknown field `new`",
        ),
        (
            a_pass(FIT, config={"fits": 1, "clip": [1]}),
            "forward_backward_input.loss_fn_config['clip']",
            "Expected `float | str`, got `array`",
        ),
        ({**STEP, "a[...].b": 5}, "a[...].b", "unknown field"),
        (
            a_pass({**FIT, "x[...]": 1}),
            "forward_backward_input.data[0].x[...]",
            "unknown field",
        ),
    ],
)
def test_the_field_is_named_as_its_sender_has_written_it(body: dict[str, Any], field: str, what: str) -> None:
    with pytest.raises(Unprocessable) as caught:
        parse_json(encoded(body), schemas.ForwardBackwardBody)
    assert caught.value.param == field
    assert f"{field}: " in caught.value.message and what in caught.value.message


def test_samples_have_numbers_of_63_bits() -> None:
    assert parse_json(encoded({**SAMPLE, "seq_id": 2**63 - 1}), schemas.SampleBody).seq_id == 2**63 - 1


@pytest.mark.parametrize("name", ["000003", "final", "step=10", "a.b-c_d+e@f", ".hidden", "x" * 200, "..."])
def test_names_of_checkpoints(name: str) -> None:
    assert parse_json(encoded({**STEP, "path": name}), schemas.SaveWeights).path == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "a b",
        "a\n",
        "final\n",
        "\u00e9",
        "a\0",
        "a%2fb",
        "a?b",
        "a#b",
        "x" * 201,
        "a\\b",
    ],
)
@pytest.mark.parametrize("schema", [schemas.SaveWeights, schemas.SaveWeightsForSampler])
def test_names_that_are_no_names(schema: type[Any], name: str) -> None:
    with pytest.raises(Unprocessable, match="path"):
        parse_json(encoded({**STEP, "path": name}), schema)


# ---------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a":"\xff"}', b"NaN", b'{"seq_id":NaN}', b"nul"])
def test_what_is_no_json_is_a_bad_request(body: bytes) -> None:
    with pytest.raises(BadRequest, match="not JSON"):
        parse_json(body, schemas.OptimStepBody)


@pytest.mark.parametrize("schema", [schemas.SessionHeartbeat, schemas.CreateSession, schemas.SampleBody])
@pytest.mark.parametrize("field", ["x", "user_metadata", "target_prompt_logprobs"])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_deep_json_is_refused_at_once(schema: type[Any], field: str, opening: bytes, closing: bytes) -> None:
    depth = 500_000
    body = b'{"%s":' % field.encode() + opening * depth + b"1" + closing * depth + b"}"
    start = time.process_time()
    with pytest.raises((BadRequest, Unprocessable)) as raised:
        parse_json(body, schema)
    assert time.process_time() - start < 1
    assert len(str(raised.value)) < 500


def test_digits_without_end_are_refused_at_once() -> None:
    digits = b"9" * 1_000_000
    start = time.process_time()
    for field in (b"seq_id", b"from_the_future"):
        with pytest.raises((BadRequest, Unprocessable)):
            parse_json(b'{"model_id":"m","seq_id":1,"%s":%s}' % (field, digits), schemas.OptimStepBody)
    assert time.process_time() - start < 1


def test_a_body_of_unknown_fields_takes_bounded_time_and_memory() -> None:
    body = encoded({**SAMPLE, **{f"unknown_{index}": None for index in range(100_000)}})
    tracemalloc.start()
    start = time.process_time()
    parse_json(body, schemas.SampleBody)
    assert time.process_time() - start < 5
    assert tracemalloc.get_traced_memory()[1] < 20 * len(body)
    tracemalloc.stop()


@pytest.mark.parametrize(
    "more", [{"data": "aGk="}, {"expected_tokens": 3}, {"location": "x"}, {"dmel": "x"}, {"height": 1}]
)
def test_text_with_something_beside_it_is_not_taken_for_text_alone(more: dict[str, Any]) -> None:
    chunks = [{"tokens": [1]}, {"type": "encoded_text", "tokens": [1], **more}]
    body = parse_json(encoded({**SAMPLE, "prompt": {"chunks": chunks}}), schemas.SampleBody)
    with pytest.raises(UserError, match=rf"prompt.chunks\[1\] is text.* no {next(iter(more))}"):
        requests.sample_of(body, lambda: 0)


def test_early_images_have_a_number_of_tokens() -> None:
    chunk = {"data": "aGk=", "format": "png", "height": 1, "width": 1, "tokens": 3}
    body = parse_json(encoded({**SAMPLE, "prompt": {"chunks": [chunk]}}), schemas.SampleBody)
    with pytest.raises(UserError, match=r"prompt.chunks\[0\] is image; only encoded_text is served"):
        requests.sample_of(body, lambda: 0)
