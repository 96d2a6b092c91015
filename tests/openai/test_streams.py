"""Streams say what answers in one piece say, and end in good order."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from engines.interface import UserError
from engines.operations import SampleRequest
from gateway.errors import EngineLost
from gateway.openai.continuation import StopCut
from tests.openai.conftest import KEY, Connect, application
from tests.openai.doubles import Script, ScriptedBackend

TEXT = "Hello world 🎉 naïve 漢字 STOP and go on"


def says(text: str = TEXT, reason: Any = "length", **fields: Any) -> ScriptedBackend:
    def script(request: SampleRequest, index: int) -> Script:
        return Script(backend.text.encode(text + "!" * index, add_special_tokens=False), reason)

    backend = ScriptedBackend(script, **fields)
    return backend


def events_of(body: str) -> list[Any]:
    """The events of a stream; the last must be `[DONE]`, which is left out, or an error."""
    parts = body.split("\n\n")
    assert parts[-1] == ""
    assert all(part.startswith("data: ") for part in parts[:-1])
    data = [part.removeprefix("data: ") for part in parts[:-1]]
    if data[-1] == "[DONE]":
        return [json.loads(part) for part in data[:-1]]
    events = [json.loads(part) for part in data]
    assert "error" in events[-1]
    return events


async def stream(connect: Connect, backend: ScriptedBackend, url: str, **fields: Any) -> list[Any]:
    response = await connect(backend).post(url, json={"model": "tiny/base", "stream": True} | fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return events_of(response.text)


def assembled(events: Sequence[Any]) -> list[dict[str, Any]]:
    """The choices of a completion's stream, put together."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        assert event["object"] == "text_completion"
        for part in event["choices"]:
            whole = choices.setdefault(part["index"], {**part, "text": "", "logprobs": None})
            assert whole["finish_reason"] is None or not whole["text"], "nothing comes behind the end"
            whole["text"] += part["text"]
            whole["finish_reason"] = part["finish_reason"]
            if part["logprobs"] is not None:
                whole["logprobs"] = whole["logprobs"] or {name: [] for name in part["logprobs"]}
                for name, values in part["logprobs"].items():
                    whole["logprobs"][name] += values
    return [choices[index] for index in sorted(choices)]


VARIANTS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"logprobs": 2, "n": 2},
    {"stop": ["STOP"]},
    {"stop": ["nope", "o on!"], "n": 3, "logprobs": 0},
    {"prompt": ["Hello", "world 🎉"], "n": 2},
    {"echo": True},
    {"echo": True, "logprobs": 1, "n": 2},
    {"echo": True, "logprobs": 1, "max_tokens": 0},
    {"echo": True, "max_tokens": 0, "prompt": [5, 6, 7]},
]


@pytest.mark.parametrize("fields", VARIANTS)
@pytest.mark.parametrize("burst", [1, 2, 7, 1000])
async def test_a_completion_s_stream_is_its_answer(
    connect: Connect, fields: dict[str, Any], burst: int
) -> None:
    backend = says(burst=burst)
    asked = {"model": "tiny/base", "prompt": "Hello"} | fields
    whole = (await connect(backend).post("/v1/completions", json=asked)).json()
    events = await stream(
        connect, backend, "/v1/completions", **asked, stream_options={"include_usage": True}
    )
    *parts, last = events
    assert assembled(parts) == whole["choices"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(part["usage"] is None for part in parts)
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"stop": "STOP"}])
@pytest.mark.parametrize("burst", [1, 3])
async def test_a_chat_s_stream_is_its_answer(connect: Connect, fields: dict[str, Any], burst: int) -> None:
    backend = says(burst=burst)
    asked = {"model": "tiny/base", "messages": [{"role": "user", "content": "Hello"}]} | fields
    whole = (await connect(backend).post("/v1/chat/completions", json=asked)).json()
    events = await stream(connect, backend, "/v1/chat/completions", **asked)
    assert all("usage" not in event for event in events)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [
            choice["finish_reason"]
        ]
        logprobs = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert logprobs == (choice["logprobs"] or {"content": []})["content"]


async def test_text_comes_as_it_is_sampled(connect: Connect) -> None:
    backend = says("Hello world")
    events = await stream(connect, backend, "/v1/completions", prompt="x")
    assert backend.streamed == [True]
    assert len(events) == len(backend.text.encode("Hello world", add_special_tokens=False)) > 1


async def test_events_with_nothing_to_tell_are_left_out(connect: Connect) -> None:
    backend = says("🎉" * 5)
    events = await stream(connect, backend, "/v1/completions", prompt="x")
    assert all(part["text"] or part["finish_reason"] for event in events for part in event["choices"])


async def test_token_ids_in_a_stream(connect: Connect) -> None:
    backend = says("Hello world")
    events = await stream(connect, backend, "/v1/completions", prompt="x", return_token_ids=True)
    parts = [part for event in events for part in event["choices"]]
    ids = [token for part in parts for token in part["token_ids"]]
    assert ids == backend.text.encode("Hello world", add_special_tokens=False)
    assert parts[-1]["prompt_token_ids"] == backend.text.encode("x")
    events = await stream(
        connect,
        backend,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "x"}],
        return_token_ids=True,
    )
    assert events[0]["prompt_token_ids"] == backend.requests[-1].prompt.array().tolist()


async def test_a_stop_string_is_never_shown_in_part(connect: Connect) -> None:
    backend = says("Hello STOP")
    events = await stream(connect, backend, "/v1/completions", prompt="x", stop=["STOP"])
    assert "".join(event["choices"][0]["text"] for event in events) == "Hello "
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("failure", "code", "kind"),
    [
        (EngineLost("the engine died"), "engine_lost", "server_error"),
        (UserError("too long"), "invalid_value", "invalid_request_error"),
    ],
)
async def test_a_stream_that_breaks_ends_with_an_error(
    connect: Connect, failure: Exception, code: str, kind: str
) -> None:
    backend = says("Hello world", fail_after=2, failure=failure)
    events = await stream(connect, backend, "/v1/completions", prompt="x")
    assert events[-1] == {"error": {"message": str(failure), "type": kind, "param": None, "code": code}}
    assert len(events) == 3
    assert events[0]["choices"][0]["text"]


async def test_an_unforeseen_failure_tells_nothing_of_itself(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    backend = says("Hello world", fail_after=1, failure=RuntimeError("secret detail"))
    events = await stream(connect, backend, "/v1/completions", prompt="x")
    assert events[-1]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(events)
    assert "secret detail" in caplog.text
    error_id = events[-1]["error"]["message"].removesuffix(".").rsplit(" ", 1)[-1]
    assert f"error id {error_id}" in caplog.text


async def test_one_prompt_s_failure_cancels_the_others(connect: Connect) -> None:
    def script(request: SampleRequest, index: int) -> Script:
        if request.prompt.array().tolist() == [9]:
            raise UserError("not this one")
        return Script([7] * 50, "length")

    backend = ScriptedBackend(script, hang_after=0)
    asked = {"model": "tiny/base", "prompt": [[5], [9], [6]]}
    response = await connect(backend).post("/v1/completions", json=asked)
    assert (response.status_code, response.json()["error"]["message"]) == (400, "not this one")
    assert backend.cancelled == 3


async def test_a_sample_that_ends_without_a_result_is_an_error(connect: Connect) -> None:
    backend = says("x")

    async def nothing(*_: Any, **__: Any) -> Any:
        return
        yield

    backend.sample = nothing  # type: ignore[method-assign]
    response = await connect(backend).post("/v1/completions", json={"model": "tiny/base", "prompt": "x"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_lost")


# ---------------------------------------------------------------------------- a client that hangs up


class HangingUp:
    """An ASGI client that sends one request and hangs up when it is told to."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self._path = path
        self._body = json.dumps(body).encode()
        self._asked = False
        self.hang_up = asyncio.Event()
        self.takes = 1000
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if len(self.sent) >= self.takes:
            await asyncio.Event().wait()

    async def call(self, backend: ScriptedBackend) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "headers": [(b"authorization", f"Bearer {KEY}".encode())],
            "server": ("gateway", 80),
            "client": ("127.0.0.1", 1),
        }
        await application(backend)(scope, self.receive, self.send)


@pytest.mark.parametrize(("streamed", "hang_after"), [(True, 0), (True, 2), (False, 0)])
async def test_hanging_up_cancels_the_samples(streamed: bool, hang_after: int) -> None:
    backend = says("Hello world, hello", hang_after=hang_after)
    body = {"model": "tiny/base", "prompt": ["a", "b"], "n": 2, "stream": streamed}
    client = HangingUp("/v1/completions", body)
    async with asyncio.timeout(5):
        call = asyncio.create_task(client.call(backend))
        await backend.hanging.wait()
        await asyncio.sleep(0.01)
        assert backend.cancelled == 0
        assert not call.done()
        client.hang_up.set()
        await call
    assert backend.cancelled == 2
    assert bool(client.sent and client.sent[0]["status"] == 200) == (streamed and hang_after > 0)


@pytest.mark.parametrize("taken", [1, 2])
async def test_hanging_up_cancels_although_the_client_has_stopped_reading(taken: int) -> None:
    backend = says("Hello world, hello", hang_after=4)
    client = HangingUp("/v1/completions", {"model": "tiny/base", "prompt": "a", "stream": True})
    client.takes = taken
    async with asyncio.timeout(5):
        call = asyncio.create_task(client.call(backend))
        await backend.hanging.wait()
        client.hang_up.set()
        await call
    assert (backend.cancelled, len(client.sent)) == (1, taken)


# ---------------------------------------------------------------------------- stop strings


def test_stop_strings_whatever_the_parts() -> None:
    draw = random.Random(1)
    for _ in range(3000):
        text = "".join(draw.choice("abc") for _ in range(draw.randrange(30)))
        stops = [
            "".join(draw.choice("abc") for _ in range(draw.randrange(1, 5))) for _ in range(draw.randrange(4))
        ]
        places = [text.find(stop) for stop in stops if stop in text]
        cut, shown, rest = StopCut(stops), "", text
        while rest:
            size = draw.randrange(1, 6)
            shown += cut.feed(rest[:size])
            assert not any(stop in shown for stop in stops)
            rest = rest[size:]
        shown += cut.finish()
        assert cut.found == bool(places)
        if not places:
            assert shown == text
        else:
            # The stop that is complete first counts; of those complete at once, the one that begins first.
            assert text.startswith(shown)
            assert any(text.startswith(stop, len(shown)) for stop in stops)


def test_text_is_held_back_only_while_it_may_be_a_stop() -> None:
    cut = StopCut(["STOP", "TOM"])
    assert [cut.feed(part) for part in ("a", "S", "T", "x", "STO", "P", "more")] == [
        "a",
        "",
        "",
        "STx",
        "",
        "",
        "",
    ]
    assert cut.found
    cut = StopCut(["STOP", "TOM"])
    assert [cut.feed("aSTOM"), cut.finish(), cut.found] == ["aS", "", True]
    cut = StopCut(["STOP"])
    assert [cut.feed("ST"), cut.finish(), cut.found] == ["", "ST", False]
