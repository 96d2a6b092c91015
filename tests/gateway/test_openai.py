"""The official `openai` client against a served gateway: what it samples is what the Tinker dialect samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.conftest import KEY, begin_run, outcome, send_pass, send_step
from tests.served import ServedGateway

MODEL = "fake/model"
PROMPT = "Say something:"
TOKENS = list(PROMPT.encode())


@pytest.fixture(params=["/v1", "/oai/api/v1"])
def client(served: ServedGateway, request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    url = f"{served.url}{request.param}"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=30) as found:
        yield found


@pytest.fixture
def ask(served: ServedGateway) -> Iterator[openai.OpenAI]:
    """The same under one prefix, for what does not depend on it."""
    url = f"{served.url}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=30) as found:
        yield found


@pytest.fixture(scope="module")
def path(served: ServedGateway) -> str:
    """A checkpoint that has been trained hard to say something else than the base model."""
    with httpx.Client(base_url=served.url, headers={"X-API-Key": KEY}, timeout=60) as http:
        run_id = begin_run(http)
        for step in range(30):
            send_pass(http, run_id, 2 * step + 1, [*TOKENS, *b" yes yes yes yes"])
            send_step(http, run_id, 2 * step + 2, learning_rate=0.05)
        save = {"model_id": run_id, "seq_id": 61, "path": "taught"}
        promise = http.post("/api/v1/save_weights_for_sampler", json=save).json()
        return str(outcome(http, promise["request_id"])["path"])


def sampled(http: httpx.Client, params: dict[str, Any], path: str | None = None) -> dict[str, Any]:
    """The first sequence of a sample through the Tinker dialect."""
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    source = {"model_path": path} if path else {"base_model": MODEL}
    body = {"session_id": session, "sampling_session_seq_id": 0, **source}
    sampler = http.post("/api/v1/create_sampling_session", json=body).json()["sampling_session_id"]
    prompt = {"chunks": [{"tokens": TOKENS}]}
    ask = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": params}
    promise = http.post("/api/v1/asample", json=ask).json()
    first: dict[str, Any] = outcome(http, promise["request_id"])["sequences"][0]
    return first


def test_models_are_listed_and_found(client: openai.OpenAI, path: str) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert client.models.retrieve(path).id == path
    with pytest.raises(openai.NotFoundError, match="no/such"):
        client.models.retrieve("no/such")


def test_a_completion_is_the_sample_of_the_same_seed(client: openai.OpenAI, http: httpx.Client) -> None:
    found = client.completions.create(
        model=MODEL, prompt=PROMPT, seed=11, max_tokens=12, logprobs=0, extra_body={"return_token_ids": True}
    )
    expected = sampled(http, {"max_tokens": 12, "seed": 11})
    choice = found.choices[0]
    assert choice.token_ids == expected["tokens"]  # type: ignore[attr-defined]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == pytest.approx(expected["logprobs"], abs=1e-6)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (
        len(TOKENS),
        len(expected["tokens"]),
    )
    assert found.usage.total_tokens == len(TOKENS) + len(expected["tokens"])


def test_a_checkpoint_says_something_else_than_the_base_model(ask: openai.OpenAI, path: str) -> None:
    def greedy(model: str) -> str:
        found = ask.completions.create(model=model, prompt=PROMPT, temperature=0, max_tokens=8)
        return found.choices[0].text

    assert greedy(path) == " yes yes"
    assert greedy(MODEL) != " yes yes"


def test_a_checkpoint_scores_what_it_was_taught_higher(ask: openai.OpenAI, path: str) -> None:
    def score(model: str) -> float:
        text = PROMPT + " yes yes"
        found = ask.completions.create(model=model, prompt=text, echo=True, max_tokens=0, logprobs=0)
        logprobs = found.choices[0].logprobs
        assert logprobs is not None
        first, *scores = logprobs.token_logprobs or [0.0]
        assert str(first) == "None"  # the client's types do not know that the first token has no score
        assert found.choices[0].text == text
        return sum(scores[len(TOKENS) - 1 :])

    assert score(path) > 0.2 * score(MODEL)
    assert score(MODEL) < -8 * math.log(50)


def test_a_stream_says_the_same_and_ends_with_its_usage(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "seed": 5, "max_tokens": 20, "n": 2}
    whole = client.completions.create(**asked)
    texts = {0: "", 1: ""}
    usage = None
    events = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    for event in events:
        for choice in event.choices:
            texts[choice.index] += choice.text
        usage = event.usage or usage
    assert [texts[0], texts[1]] == [choice.text for choice in whole.choices]
    assert texts[0] != texts[1]
    assert usage == whole.usage


def test_a_chat_is_a_completion_of_the_rendered_messages(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hi"}],
        "seed": 3,
        "max_tokens": 10,
    }
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    same = client.completions.create(model=MODEL, prompt=rendered, seed=3, max_tokens=10)
    choice = found.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == same.choices[0].text
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    for token in choice.logprobs.content:
        best = [alternative.logprob for alternative in token.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert len(best) == 2
        assert token.logprob <= best[0] <= 0
    streamed = "".join(
        event.choices[0].delta.content or ""
        for event in client.chat.completions.create(**asked, stream=True)
        if event.choices
    )
    assert streamed == choice.message.content


def test_stop_and_seed(ask: openai.OpenAI) -> None:
    free = ask.completions.create(model=MODEL, prompt=PROMPT, seed=8, max_tokens=60).choices[0].text
    sign = next(letter for letter in free[3:] if letter.isascii())
    stopped = ask.completions.create(model=MODEL, prompt=PROMPT, seed=8, max_tokens=60, stop=[sign])
    assert stopped.choices[0].text == free[: free.index(sign)]
    assert stopped.choices[0].finish_reason == "stop"
    texts = {
        ask.completions.create(model=MODEL, prompt=PROMPT, max_tokens=20).choices[0].text for _ in range(3)
    }
    assert len(texts) == 3  # without a seed each draw is another


def test_bias_penalties_and_min_p(ask: openai.OpenAI) -> None:
    """Each changes which tokens come, in the way that its name says; log-probs do not know of them."""

    def tokens(**more: Any) -> list[int]:
        settings = {"seed": 8, "max_tokens": 60, "temperature": 0, "extra_body": {"return_token_ids": True}}
        extra = {**settings["extra_body"], **more.pop("extra_body", {})}  # type: ignore[dict-item]
        answer = ask.completions.create(
            model=MODEL, prompt=PROMPT, **{**settings, **more, "extra_body": extra}
        )
        found: list[int] = answer.choices[0].token_ids
        return found

    plain = tokens()
    assert len(plain) - len(set(plain)) > 10
    for penalty in (
        {"frequency_penalty": 2},
        {"presence_penalty": 2},
        {"extra_body": {"repetition_penalty": 3}},
    ):
        assert len(set(tokens(**penalty))) > len(set(plain))
    never = plain[0]
    assert never not in tokens(logit_bias={str(never): -100})
    assert tokens(temperature=2, extra_body={"min_p": 1}) == plain
    assert tokens(temperature=2) != plain
    first, biased = (
        ask.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=1, logprobs=5, temperature=1, logit_bias=bias
        )
        for bias in ({}, {"65": 100})
    )
    assert biased.choices[0].text == "A"
    assert first.choices[0].logprobs is not None and biased.choices[0].logprobs is not None
    before, after = (each.choices[0].logprobs.top_logprobs for each in (first, biased))  # type: ignore[union-attr]
    assert before is not None and after is not None
    assert all(
        after[0].get(text, value) == pytest.approx(value, abs=1e-5) for text, value in before[0].items()
    )


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": "no/such"}, "model"),
        ({"model": "tinker://nobody/sampler_weights/x"}, "model"),
        ({"model": "tinker://nobody/sampler_weights/x\0"}, "model"),
        ({"model": "tinker://../../etc"}, "model"),
        ({"model": ""}, "model"),
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"max_tokens": 100_000}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"prompt": [259]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"logit_bias": {"259": 1}}, "logit_bias"),
        ({"logit_bias": {"05": 1}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"min_p": -0.1}, "min_p"),
        ({"guided_json": {}}, "guided_json"),
    ],
)
def test_errors_have_openais_shape(http: httpx.Client, changes: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 4, **changes}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"model": "\xff"}', 400),
        (b"[" * 200_000, 400),
        (b'{"a":' * 200_000, 400),
        (b'{"model": "' + b"x" * 20_000_000 + b'"}', 413),
        (b'{"model": "' + b"x" * 1_000_000 + b'", "prompt": "a"}', 404),
    ],
    ids=["nothing", "cut", "a list", "no UTF-8", "deep list", "deep object", "20 MB", "a long name"],
)
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_bodies_that_are_none(http: httpx.Client, route: str, content: bytes, status: int) -> None:
    if route == "chat/completions":
        content = content.replace(b'"prompt": "a"', b'"messages": [{"role": "user", "content": "a"}]')
    answer = http.post(f"/v1/{route}", content=content)
    assert answer.status_code == status, answer.text[:500]
    assert len(answer.text) < 2000
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "changes",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": []},
    ],
)
def test_what_a_chat_cannot_do_is_refused_by_name(ask: openai.OpenAI, changes: dict[str, Any]) -> None:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, **changes}
    with pytest.raises(openai.BadRequestError, match=next(iter(changes))):
        ask.chat.completions.create(**asked)


def test_wrong_addresses_and_methods(http: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/a%00b", 400),
    ):
        answer = http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_an_unknown_route_names_those_there_are(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (404, "unknown_url")
    assert error["message"].startswith("POST /v1/embeddings is not served here")
    served = [
        f"{method.upper()} {path.removeprefix('/v1')}"
        for path, methods in http.get("/openapi.json").json()["paths"].items()
        if path.startswith("/v1/")
        for method in methods
    ]
    assert served
    for route in served:
        assert route in error["message"]
