"""AdminClient: what it returns is what the gateway says, and every failure is one exception with a sentence."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from gateway.admin import views
from sdk import AdminClient, AdminError, admin_records
from tests.admin.conftest import save
from tests.gateway.conftest import begin_run
from tests.sdk.conftest import STEPS, Place

NOBODY = "http://127.0.0.1:9"


@pytest.fixture
def client(place: Place) -> Iterator[AdminClient]:
    with AdminClient(place.url) as client:
        yield client


@pytest.mark.parametrize("name", ["Run", "Step", "Checkpoint", "Session", "Future", "Engine", "Metrics"])
def test_records_have_the_fields_that_the_gateway_describes(name: str) -> None:
    record = getattr(admin_records, name)
    view = getattr(views, f"{name}View")
    assert {field.name for field in dataclasses.fields(record)} == set(view.model_fields)


def test_a_run(place: Place, client: AdminClient) -> None:
    run = client.run(place.trained)
    assert (run.run_id, run.status, run.step, run.lora.rank) == (place.trained, "active", STEPS, 8)
    assert timedelta(0) < datetime.now(UTC) - run.created_at < timedelta(minutes=10)
    assert [found.run_id for found in client.runs(session_id=run.session_id)] == [place.trained]
    assert client.session(run.session_id).session_id == run.session_id


def test_steps_are_what_the_client_of_the_run_saw(place: Place, client: AdminClient) -> None:
    steps = list(client.steps(place.trained))
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    assert [step.loss for step in steps] == pytest.approx(place.losses, rel=1e-9)
    assert [step.loss_per_token for step in steps] == pytest.approx([loss / 4 for loss in place.losses])
    assert list(client.steps(place.trained, after=STEPS - 2)) == steps[-2:]
    assert list(client.steps(place.fresh)) == []


@pytest.mark.parametrize("page", [1, 2, 1000])
def test_iterators_walk_all_pages(page: int, place: Place, client: AdminClient) -> None:
    calls = list(client.futures(run_id=place.trained, page=page))
    assert [call.seq_id for call in calls] == list(range(2 * STEPS + 3, -1, -1))
    saved = client.checkpoints(run_id=place.trained, page=page)
    assert [checkpoint.path for checkpoint in saved] == place.paths[::-1]
    kinds = [saved.kind for saved in client.checkpoints(run_id=place.trained, kind="weights", page=page)]
    assert kinds == ["weights", "weights"]


def test_steps_walk_all_pages(place: Place, client: AdminClient, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(client.steps(place.trained))
    monkeypatch.setattr("sdk.admin._STEPS_IN_A_PAGE", 5)
    assert list(client.steps(place.trained)) == whole


def test_an_iterator_asks_for_no_more_pages_than_it_needs(place: Place) -> None:
    asked = []
    with AdminClient(place.url) as client:
        client._http.event_hooks["request"] = [lambda request: asked.append(request.url.path)]
        futures = client.futures(page=2)
        assert asked == []
        next(futures)
        next(futures)
    assert len(asked) == 1


def test_engines_futures_and_counters(place: Place, client: AdminClient) -> None:
    [engine] = client.engines()
    again = client.engine("fake")
    assert (engine.state, engine.pid) == (again.state, again.pid) == ("ready", place.gateway.engine_pids()[0])
    call = next(client.futures(kind="optim_step", status="done", engine="fake"))
    assert call == client.future(call.request_id)
    assert call.ran_s is not None and call.ran_s > 0
    assert client.metrics().engines["fake"]["starts"] == 1


def test_a_checkpoint_is_deleted(place: Place, client: AdminClient) -> None:
    with httpx.Client(base_url=place.url, headers={"X-API-Key": "tml-x"}, trust_env=False) as http:
        path = save(http, begin_run(http), 1, "a.b=c+d@e-f")
    assert client.checkpoint(path).name == "a.b=c+d@e-f"
    client.delete_checkpoint(path)
    with pytest.raises(AdminError, match="there is no checkpoint") as refused:
        client.checkpoint(path)
    assert refused.value.status == 404


@pytest.mark.parametrize(
    ("ask", "status", "words"),
    [
        (lambda client: client.run("nobody"), 404, "no run 'nobody'"),
        (lambda client: client.run("../engines"), 404, "Not Found"),
        (lambda client: client.engine("x?y#z"), 404, "no engine 'x?y#z'"),
        (lambda client: list(client.runs(page=0)), 422, "limit"),
        (lambda client: list(client.runs(status="odd")), 422, "status"),
        (lambda client: client.checkpoint("tinker://a/b"), None, "no checkpoint's path"),
        (lambda client: client.delete_checkpoint("a/weights/b"), None, "no checkpoint's path"),
    ],
)
def test_a_refusal_is_the_gateways_sentence(
    ask: Callable[[AdminClient], Any], status: int | None, words: str, client: AdminClient
) -> None:
    with pytest.raises(AdminError) as refused:
        ask(client)
    assert refused.value.status == status
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (NOBODY, "nothing answers at http://127.0.0.1:9; start it with `tandem serve`"),
        ("localhost:8000", "is no URL"),
        ("http://localhost:many", "is no URL"),
        ("http://no-such-host.invalid", "http://no-such-host.invalid cannot be reached: [Errno -"),
    ],
)
def test_where_nothing_answers_the_message_says_so(url: str, words: str) -> None:
    with pytest.raises(AdminError) as refused, AdminClient(url) as client:
        client.engines()
    assert refused.value.status is None
    assert words in str(refused.value)


def test_a_gateway_that_does_not_answer_in_time_is_told_from_none() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with (
            pytest.raises(AdminError, match="did not answer in time"),
            AdminClient(url, timeout_s=0.1) as client,
        ):
            client.engines()


def answering(response: httpx.Response) -> AdminClient:
    """A client of something else than a gateway."""
    client = AdminClient("http://elsewhere.example")
    client._http = httpx.Client(
        base_url="http://elsewhere.example", transport=httpx.MockTransport(lambda request: response)
    )
    return client


@pytest.mark.parametrize(
    ("response", "status", "words"),
    [
        (httpx.Response(200, text="<html>hello</html>"), None, "as no gateway of this version does"),
        (httpx.Response(200, json={"name": "x"}), None, "as no gateway of this version does"),
        (httpx.Response(302, headers={"location": "/login"}), 302, "answers 302"),
        (httpx.Response(502, text="<html>\n<b>Bad gateway</b>"), 502, "answers 502: <html> <b>Bad gateway"),
        (httpx.Response(500, json={"error": "odd"}), 500, "answers 500"),
        (httpx.Response(503), 503, "answers 503: nothing"),
    ],
)
def test_what_is_no_gateway_is_told_so(response: httpx.Response, status: int | None, words: str) -> None:
    with pytest.raises(AdminError) as refused, answering(response) as client:
        client.engines()
    assert refused.value.status == status
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_fields_of_a_newer_gateway_are_passed_over(place: Place) -> None:
    engines = httpx.get(f"{place.url}/admin/v1/engines", trust_env=False).json()["items"]
    newer = [{**engine, "mood": "good", "roles": [*engine["roles"], "dream"]} for engine in engines]
    with answering(httpx.Response(200, json={"items": newer, "next_cursor": None})) as client:
        assert client.engines()[0].roles == ["train", "sample", "dream"]


def test_the_key_is_sent_and_the_environments_proxy_is_not_asked_for_this_machine(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", NOBODY)
    with AdminClient(place.url, "tml-secret") as client:
        assert client.engines()
        assert client._http.headers["X-API-Key"] == "tml-secret"
    with pytest.raises(AdminError), AdminClient("http://gateway.example", timeout_s=5) as client:
        client.engines()
