"""Whatever is wrong with an operation: a sentence that names the field, and nothing else is disturbed by it.

Two runs from one seed advance side by side. Between two steps one of them is sent something bad; after that both must
have exactly the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import KEY, begin_run, clean, json_datum, outcome, send_pass, send_step
from tests.served import ServedGateway

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
Send = Callable[[httpx.Client, str, int], httpx.Response]


def advance(http: httpx.Client, run_id: str, seq_id: int) -> float:
    """A pass and a step, numbered from seq_id; the loss of the pass."""
    promise = send_pass(http, run_id, seq_id, TOKENS).json()
    step = send_step(http, run_id, seq_id + 1).json()
    loss = float(outcome(http, promise["request_id"])["metrics"]["loss:sum"])
    assert outcome(http, step["request_id"])["type"] == "optim_step"
    return loss


class Twins:
    """Two runs from one seed. One of them is mistreated; they must stay alike."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.start()

    def start(self) -> None:
        self.hurt, self.calm = begin_run(self.http), begin_run(self.http)
        self.next_hurt = self.next_calm = 1

    def undisturbed(self, send: Send, *, consumes: bool) -> httpx.Response:
        """Send something bad to one of them, then let both take a step. The answer to the bad one."""
        answer = send(self.http, self.hurt, self.next_hurt)
        self.next_hurt += consumes
        losses = [
            advance(self.http, self.hurt, self.next_hurt),
            advance(self.http, self.calm, self.next_calm),
        ]
        self.next_hurt, self.next_calm = self.next_hurt + 2, self.next_calm + 2
        if losses[0] != losses[1]:
            self.start()  # what follows is not to blame
            pytest.fail(f"{losses} after {answer.text}")
        return answer


@pytest.fixture(scope="module")
def twins(served: ServedGateway) -> Iterator[Twins]:
    with httpx.Client(base_url=served.url, headers={"X-API-Key": KEY}, timeout=60) as client:
        yield Twins(client)


def tensor(data: list[float], dtype: str = "float32", **more: Any) -> dict[str, Any]:
    return {"data": data, "dtype": dtype, **more}


def with_inputs(**inputs: Any) -> Send:
    """A pass of one datum, some of whose loss inputs are others, or missing (None)."""
    datum = json_datum(TOKENS)
    datum["loss_fn_inputs"] |= inputs
    datum["loss_fn_inputs"] = {name: value for name, value in datum["loss_fn_inputs"].items() if value}
    return lambda http, run_id, seq_id: send_pass(http, run_id, seq_id, [], data=[datum])


def with_prompt(*chunks: dict[str, Any], **more: Any) -> Send:
    """A pass of one datum whose input is made of these chunks."""
    datum = json_datum(TOKENS)
    datum["model_input"] = {"chunks": list(chunks), **more}
    return lambda http, run_id, seq_id: send_pass(http, run_id, seq_id, [], data=[datum])


def passing(tokens: list[int] = TOKENS, **changes: Any) -> Send:
    return lambda http, run_id, seq_id: send_pass(http, run_id, seq_id, tokens, **changes)


def stepping(**params: Any) -> Send:
    return lambda http, run_id, seq_id: send_step(http, run_id, seq_id, **params)


def calling(route: str, **body: Any) -> Send:
    return lambda http, run_id, seq_id: http.post(
        f"/api/v1/{route}", json={"model_id": run_id, "seq_id": seq_id, **body}
    )


def text(*tokens: int) -> dict[str, Any]:
    return {"type": "encoded_text", "tokens": list(tokens)}


IMAGE = {"type": "image", "data": "aGk=", "format": "png"}

RECORDED: dict[str, tuple[Send, list[str]]] = {
    "weights of dtype int64": (
        with_inputs(weights=tensor([1] * 7, "int64")),
        ["weights", "int64", "float32"],
    ),
    "targets of dtype float32": (
        with_inputs(target_tokens=tensor([1.0] * 7)),
        ["target_tokens", "float32", "int64"],
    ),
    "unknown dtype": (with_inputs(weights=tensor([1.0] * 7, "float16")), ["loss_fn_inputs", "float16"]),
    "weights too short": (with_inputs(weights=tensor([1.0] * 6)), ["weights", "[6]", "[7]"]),
    "targets too long": (with_inputs(target_tokens=tensor([1] * 8, "int64")), ["target_tokens", "[8]", "7"]),
    "shape and data differ": (with_inputs(weights=tensor([1.0] * 7, shape=[8])), ["weights", "7", "[8]"]),
    "negative shape": (with_inputs(weights=tensor([1.0] * 7, shape=[-7])), ["weights", "[-7]"]),
    "enormous shape": (
        with_inputs(weights=tensor([1.0], shape=[2**40, 2**40])),
        ["weights", "shape", "at most"],
    ),
    "enormous sparse shape": (
        with_inputs(
            weights=tensor(
                [1.0], shape=[1, 2**31], sparse_crow_indices=[0, 1], sparse_col_indices=[2**31 - 1]
            )
        ),
        ["weights", "sparse"],
    ),
    "half of a sparse tensor": (
        with_inputs(weights=tensor([1.0], shape=[7, 1], sparse_crow_indices=[0, 1])),
        ["weights", "sparse_crow_indices", "sparse_col_indices"],
    ),
    "target outside the vocabulary": (
        with_inputs(target_tokens=tensor([1, 2, 3, 9999, 5, 6, 7], "int64")),
        ["data[0]", "target_tokens", "[3]", "9999", "258"],
    ),
    "target -100": (
        with_inputs(target_tokens=tensor([1, 2, 3, -100, 5, 6, 7], "int64")),
        ["target_tokens", "-100", "weight 0"],
    ),
    "fractional target": (
        with_inputs(target_tokens=tensor([1, 2, 3.5, 4, 5, 6, 7], "int64")),
        ["target_tokens", "3.5"],
    ),
    "target beyond 64 bits": (
        with_inputs(target_tokens=tensor([2**64] * 7, "int64")),
        ["target_tokens", "int64"],
    ),
    "weight beyond float32": (
        with_inputs(weights=tensor([1e39] * 7)),
        ["weights", "float32"],
    ),
    "no weights and an unknown input": (
        with_inputs(mask=tensor([1.0] * 7)),
        ["mask", "cross_entropy", "target_tokens"],
    ),
    "no targets": (with_inputs(target_tokens=None), ["target_tokens", "cross_entropy"]),
    "token outside the vocabulary": (passing([1, 2, 259, 4]), ["model_input", "259", "258"]),
    "negative token": (passing([1, -2, 3, 4]), ["model_input", "-2"]),
    "token beyond 32 bits": (with_prompt(text(2**31)), ["data[0].model_input", "32-bit"]),
    "no tokens": (with_prompt(text()), ["model_input", "empty"]),
    "no chunks": (with_prompt(), ["model_input", "empty"]),
    "an image": (with_prompt(text(3, 1), IMAGE), ["data[0].model_input.chunks[1]", "image", "encoded_text"]),
    "an image by address": (
        with_prompt({"type": "image_asset_pointer", "location": "http://x/y.png", "format": "png"}),
        ["chunks[0]", "image_asset_pointer"],
    ),
    "unknown field of the input": (with_prompt(text(1), position_ids=[7]), ["position_ids"]),
    "empty data": (passing(data=[]), ["data is empty"]),
    "data of the wrong type": (passing(data="all"), ["data", "array", "str"]),
    "unknown loss": (passing(loss_fn="no_such"), ["loss_fn", "no_such", "cross_entropy"]),
    "enormous name of a loss": (passing(loss_fn="x" * 100_000), ["loss_fn"]),
    "unknown loss setting": (passing(loss_fn_config={"margin": 1.0}), ["margin", "cross_entropy"]),
    "loss setting of the wrong type": (
        passing(loss_fn_config={"clip_low_threshold": [1]}),
        ["loss_fn_config"],
    ),
    "unknown field with a NUL": (passing(TOKENS, **{"a\0b": 1}), ["unknown field", "a\\0b"]),
    "unknown field with an enormous name": (passing(TOKENS, **{"x" * 100_000: 1}), ["unknown field"]),
    "unknown field that changes the result": (passing(reduction="mean"), ["reduction"]),
    "too long": (passing([1] * 8194), ["model_input", "8193", "8192"]),
    "negative learning rate": (stepping(learning_rate=-1e-4), ["learning_rate", "-0.0001", "at least 0"]),
    "learning rate as text": (stepping(learning_rate="1e-4"), ["learning_rate", "float", "str"]),
    "learning rate null": (stepping(learning_rate=None), ["learning_rate", "null"]),
    "beta of one": (stepping(beta1=1.0), ["beta1", "below 1"]),
    "eps of zero": (stepping(eps=0.0), ["eps"]),
    "negative clip": (stepping(grad_clip_norm=-1.0), ["grad_clip_norm"]),
    "negative decay": (stepping(weight_decay=-0.1), ["weight_decay"]),
    "unknown optimizer setting": (stepping(amsgrad=True), ["amsgrad"]),
    "another optimizer": (
        calling("optim_step", optimizer_params={"type": "muon"}),
        ["optimizer_params", "muon"],
    ),
    "name with a slash": (calling("save_weights", path="a/b"), ["path", "a/b", "letters"]),
    "name that climbs": (calling("save_weights", path=".."), ["path", "'..'"]),
    "name that climbs further": (calling("save_weights", path="../../etc/passwd"), ["path"]),
    "empty name": (calling("save_weights", path=""), ["path", "1 to 200"]),
    "name of 1000 characters": (calling("save_weights", path="n" * 1000), ["path", "1 to 200"]),
    "name with a line end": (calling("save_weights", path="a\n"), ["path", "letters"]),
    "name with a NUL": (calling("save_weights", path="a\0"), ["path", "letters"]),
    "name of a sampler with a slash": (calling("save_weights_for_sampler", path="a/b"), ["path", "letters"]),
    "no name": (calling("save_weights"), ["path"]),
    "lifetime too short": (calling("save_weights", path="a", ttl_seconds=10), ["ttl_seconds", "3600"]),
    "lifetime too long": (calling("save_weights", path="a", ttl_seconds=2**40), ["ttl_seconds"]),
    "lifetime negative": (calling("save_weights", path="a", ttl_seconds=-1), ["ttl_seconds"]),
    "metadata that is no text": (
        calling("save_weights", path="a", user_metadata={"a": 1}),
        ["user_metadata"],
    ),
    "metadata with a NUL": (
        calling("save_weights", path="a", user_metadata={"a": "\0"}),
        ["user_metadata", "NUL"],
    ),
    "metadata too large": (
        calling("save_weights", path="a", user_metadata={"a": "x" * 100_000}),
        ["user_metadata", "bytes"],
    ),
    "neither name nor number": (calling("save_weights_for_sampler"), ["path", "sampling_session_seq_id"]),
    "a mutable sampler": (calling("save_weights_for_sampler", path="a", kind="live"), ["kind", "live"]),
    "load of another's": (
        calling("load_weights", path="tinker://nobody:train:0/weights/a"),
        ["there is no checkpoint", "tinker://nobody:train:0/weights/a"],
    ),
    "load of a file": (calling("load_weights", path="/etc/passwd"), ["path", "/etc/passwd", "tinker://"]),
    "load that climbs": (
        calling("load_weights", path="tinker://../weights/../../x"),
        ["path", "tinker://RUN"],
    ),
    "load with an unknown field": (
        calling("load_weights", path="tinker://a/weights/b", strict=True),
        ["strict"],
    ),
    "load of another model into a run": (
        calling("load_weights", path="tinker://a/weights/b", base_model="no/such"),
        ["base_model", "model_id"],
    ),
    "load with another optimizer": (
        calling("load_weights", path="tinker://a/weights/b", optimizer_config={"type": "dimuon"}),
        ["optimizer_config"],
    ),
    "load into a run and a new one": (
        calling("load_weights", path="tinker://a/weights/b", session_id="s", model_seq_id=4),
        ["session_id"],
    ),
    "load with metadata": (
        calling("load_weights", path="tinker://a/weights/b", user_metadata={"a": "b"}),
        ["user_metadata"],
    ),
    "training where only a forward pass is asked for": (
        calling("forward", forward_backward_input={"data": [json_datum(TOKENS)], "loss_fn": "cross_entropy"}),
        ["forward_input", "forward_backward_input"],
    ),
    "text with an unknown field": (with_prompt({**text(3, 1), "weight": 2.0}), ["weight"]),
    "text with something beside it": (with_prompt({**text(3, 1), "expected_tokens": 3}), ["expected_tokens"]),
    "load with a token": (
        calling("load_weights", path="tinker://a/weights/b", weights_access_token="t"),
        ["there is no checkpoint", "tinker://a/weights/b"],
    ),
}


@pytest.mark.parametrize("case", RECORDED)
def test_a_bad_operation_fails_alone_and_consumes_its_number(
    http: httpx.Client, twins: Twins, case: str
) -> None:
    send, words = RECORDED[case]
    answer = twins.undisturbed(send, consumes=True)
    promise = clean(answer)
    assert answer.status_code == 200, answer.text
    failed = clean(http.post("/api/v1/retrieve_future", json={"request_id": promise["request_id"]}))
    assert failed["category"] == "user", failed
    assert len(failed["error"]) < 1000
    for word in words:
        assert word in failed["error"]


def posting(route: str, content: bytes | str, **headers: str) -> Send:
    return lambda http, run_id, seq_id: http.post(f"/api/v1/{route}", content=content, headers=headers)


def numbered(seq_id: Any) -> Send:
    return lambda http, run_id, _: send_step(http, run_id, seq_id)


PROTOBUF = {"content-type": "application/x-protobuf"}
REFUSED: dict[str, tuple[Send, int, list[str]]] = {
    "number 0": (numbered(0), 422, ["seq_id", "1"]),
    "number -1": (numbered(-1), 422, ["seq_id"]),
    "number 2^63": (numbered(2**63), 422, ["seq_id"]),
    "number as text": (numbered("1"), 422, ["seq_id", "int"]),
    "unknown run": (
        lambda http, run_id, seq_id: send_step(http, run_id + "0", seq_id),
        404,
        ["there is no run"],
    ),
    "a run's name with a NUL": (
        lambda http, run_id, seq_id: send_step(http, run_id + "\0", seq_id),
        404,
        ["there is no run"],
    ),
    "no JSON": (posting("optim_step", "learn!"), 400, ["not JSON"]),
    "nothing": (posting("optim_step", ""), 400, ["not JSON"]),
    "a list": (posting("optim_step", "[]"), 422, ["object", "array"]),
    "JSON with NaN": (posting("optim_step", '{"a": NaN}'), 400, ["not JSON"]),
    "no UTF-8": (posting("optim_step", b'{"model_id": "\xff\xfe"}'), 400, ["not JSON"]),
    "deep JSON behind a field": (
        posting("create_session", '{"user_metadata": ' + '{"a":' * 200_000),
        400,
        ["not JSON"],
    ),
    "broken protobuf": (
        posting("forward_backward", b"\x0a\xff\xff", **PROTOBUF),
        400,
        ["ForwardBackwardRequest"],
    ),
    "empty protobuf": (posting("forward_backward", b"", **PROTOBUF), 400, ["model_id"]),
    "JSON called protobuf": (
        posting("forward_backward", b'{"a": 1}', **PROTOBUF),
        400,
        ["ForwardBackwardRequest"],
    ),
    "protobuf called JSON": (
        posting("forward_backward", b"\x0a\x03run\x10\x01", **{"content-type": "application/json"}),
        400,
        ["not JSON"],
    ),
    "broken zstd": (
        posting("forward_backward", b"junk", **PROTOBUF, **{"content-encoding": "zstd"}),
        400,
        ["zstd"],
    ),
    "broken gzip": (posting("optim_step", b"junk", **{"content-encoding": "gzip"}), 400, ["gzip"]),
    "unknown encoding": (posting("optim_step", b"{}", **{"content-encoding": "br"}), 415, ["br", "zstd"]),
    "unknown future": (
        lambda http, run_id, _: http.post("/api/v1/retrieve_future", json={"request_id": f"{run_id}:999999"}),
        404,
        ["there is no future"],
    ),
    "wrong method": (
        lambda http, *_: http.get("/api/v1/optim_step"),
        404,
        ["Not Found", "optim_step"],
    ),
    "unknown path": (lambda http, *_: http.post("/api/v1/train_everything"), 404, ["train_everything"]),
    "a NUL in the path": (lambda http, *_: http.get("/api/v1/training_runs/a%00b"), 400, ["NUL"]),
    "a NUL in the query": (lambda http, *_: http.get("/admin/v1/runs?base_model=%00"), 400, ["NUL"]),
    "a limit out of range": (lambda http, *_: http.get("/api/v1/training_runs?limit=0"), 422, ["limit"]),
    "a limit that is no number": (lambda http, *_: http.get("/api/v1/checkpoints?limit=all"), 422, ["limit"]),
    "a filter that there is not": (
        lambda http, *_: http.get("/api/v1/sessions?limit=3&project_id=mine"),
        422,
        ["project_id", "access_scope, limit, offset"],
    ),
    "a query where none is read": (
        lambda http, run_id, _: http.post("/api/v1/get_info?verbose=1", json={"model_id": run_id}),
        422,
        ["verbose", "it takes none"],
    ),
    "unknown run to load into": (
        lambda http, run_id, seq_id: http.post(
            "/api/v1/load_weights", json={"model_id": "x", "seq_id": 1, "path": "tinker://a/weights/b"}
        ),
        404,
        ["there is no run"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_belongs_to_no_operation_is_refused_at_once(twins: Twins, case: str) -> None:
    send, status, words = REFUSED[case]
    answer = twins.undisturbed(send, consumes=False)
    assert answer.status_code == status, answer.text
    body = clean(answer)
    assert isinstance(body["detail"], str)
    assert len(body["detail"]) < 1000
    for word in words:
        assert word in body["detail"]
