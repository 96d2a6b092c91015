"""The official `openai` client, unmodified, over a real socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import openai
import pytest
import uvicorn

from engines.operations import SampleRequest
from gateway.errors import EngineLost
from tests.openai.conftest import KEY, application
from tests.openai.doubles import Script, ScriptedBackend, logprob

ANSWER = "Hello there 🎉, naïve world"


class Serving(uvicorn.Server):
    """A server in a thread of this process."""

    def __init__(self, backend: ScriptedBackend) -> None:
        self.backend = backend
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        super().__init__(uvicorn.Config(application(backend), log_level="warning", lifespan="off"))
        self.thread = threading.Thread(target=self.run, kwargs={"sockets": [self.listening]})

    def start(self) -> None:
        self.thread.start()
        deadline = time.monotonic() + 10
        while not self.started:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self.should_exit = True
        self.thread.join(10)
        self.listening.close()
        assert not self.thread.is_alive()


def _backend() -> ScriptedBackend:
    def script(request: SampleRequest, index: int) -> Script:
        return Script([*backend.text.encode(ANSWER, add_special_tokens=False), 1], "stop")

    backend = ScriptedBackend(script)
    return backend


@pytest.fixture
def serving() -> Iterator[Serving]:
    server = Serving(_backend())
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["/v1", "/oai/api/v1"])
def client(serving: Serving, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{serving.port}{request.param}"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=20) as found:
        yield found


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny/base"]
    assert client.models.retrieve("tiny/base").owned_by == "tandem"
    path = "tinker://run/sampler_weights/a"
    assert client.models.retrieve(path).id == path


def test_completions(client: openai.OpenAI, serving: Serving) -> None:
    found = client.completions.create(model="tiny/base", prompt="Say:", logprobs=1, echo=True, max_tokens=40)
    choice = found.choices[0]
    assert (choice.text, choice.finish_reason) == ("Say:" + ANSWER, "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert found.usage is not None
    tokens = serving.backend.text.encode("Say:") + serving.backend.text.encode(
        ANSWER, add_special_tokens=False
    )
    assert len(choice.logprobs.tokens) == len(tokens) + 1 == found.usage.total_tokens


def test_completions_stream(client: openai.OpenAI) -> None:
    events = list(client.completions.create(model="tiny/base", prompt="Say:", n=2, stream=True))
    for index in (0, 1):
        parts = [choice for event in events for choice in event.choices if choice.index == index]
        assert "".join(part.text for part in parts) == ANSWER
        assert parts[-1].finish_reason == "stop"


def test_chat(client: openai.OpenAI, serving: Serving) -> None:
    found = client.chat.completions.create(
        model="tinker://run/sampler_weights/a",
        messages=[{"role": "user", "content": "Hi"}],
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=50,
        extra_body={"top_k": 5, "chat_template_kwargs": {"enable_thinking": False}},
    )
    message = found.choices[0].message
    assert (message.role, message.content) == ("assistant", ANSWER)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    tokens = [*serving.backend.text.encode(ANSWER, add_special_tokens=False), 1]
    assert [entry.logprob for entry in logprobs.content] == [logprob(t, i) for i, t in enumerate(tokens)]
    assert serving.backend.requests[-1].top_k == 5
    # What the client makes of an answer can be sent back as it is.
    client.chat.completions.create(
        model="tiny/base",
        messages=[
            {"role": "user", "content": "Hi"},
            message.model_dump(),  # type: ignore[list-item]
            {"role": "user", "content": [{"type": "text", "text": "Go on"}]},
        ],
    )


def test_chat_stream(client: openai.OpenAI, serving: Serving) -> None:
    events = list(
        client.chat.completions.create(
            model="tiny/base",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == ANSWER
    assert events[0].choices[0].delta.role == "assistant"
    usage = events[-1].usage
    assert usage is not None
    assert usage.completion_tokens == len(serving.backend.text.encode(ANSWER))
    assert usage.prompt_tokens == serving.backend.requests[0].prompt.shape[0]


def test_errors_are_the_client_s_own(client: openai.OpenAI, serving: Serving) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody/nothing", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="tiny/base",
            messages=[{"role": "user", "content": "Hi"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.AuthenticationError) as stranger:
        client.with_options(api_key="other").models.list()
    assert stranger.value.code == "invalid_api_key"
    serving.backend.ready = False
    with pytest.raises(openai.InternalServerError) as loading:
        client.completions.create(model="tiny/base", prompt="x")
    assert (loading.value.status_code, loading.value.code) == (503, "engine_unavailable")


def test_a_broken_stream_raises_in_the_client(client: openai.OpenAI, serving: Serving) -> None:
    serving.backend.failure, serving.backend.fail_after = EngineLost("the engine died"), 3
    seen = []
    with pytest.raises(openai.APIError, match="the engine died") as broken:
        for event in client.completions.create(model="tiny/base", prompt="x", stream=True):
            seen.append(event.choices[0].text)
    assert broken.value.code == "engine_lost"
    assert "".join(seen)
    assert ANSWER.startswith("".join(seen))


def test_closing_a_stream_cancels_the_sample(client: openai.OpenAI, serving: Serving) -> None:
    serving.backend.hang_after = 2
    with client.completions.create(model="tiny/base", prompt="x", stream=True) as events:
        next(iter(events))
        assert serving.backend.cancelled == 0
    deadline = time.monotonic() + 5
    while serving.backend.cancelled == 0:
        assert time.monotonic() < deadline, "the sample goes on although its client has gone"
        time.sleep(0.01)
