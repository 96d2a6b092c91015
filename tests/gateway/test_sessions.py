"""Sessions: found by what is known of them, with a true status, moved between projects, shown as a timeline."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

import httpx
import pytest
import tinker
from tinker.types import SessionSearchRequest
from tinker.types.search_owner import AccessibleSearchOwner
from tinker.types.session_status_query import (
    ActiveSessionStatusQuery,
    CancelledSessionStatusQuery,
    ClientFinishedSessionStatusQuery,
)

from tests.gateway.conftest import KEY, begin_run, clean, datum, outcome, send_pass
from tests.served import ServedGateway

# The SDK warns of its own deprecations, and leaves the connections of its background loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def begin(http: httpx.Client, **fields: Any) -> str:
    return str(http.post("/api/v1/create_session", json=fields).json()["session_id"])


def search(http: httpx.Client, **fields: Any) -> list[str]:
    answer = http.post("/api/v1/sessions/search", json=fields)
    assert answer.status_code == 200, answer.text
    return [each["session_id"] for each in answer.json()["sessions"]]


def test_a_request_that_is_repeated_finds_its_session(http: httpx.Client) -> None:
    headers = {"X-Idempotency-Key": f"k{time.time()}"}
    ids = {
        http.post("/api/v1/create_session", json={}, headers=headers).json()["session_id"] for _ in range(3)
    }
    assert len(ids) == 1
    assert begin(http) not in ids


def test_a_finished_session_stops_its_heartbeat_and_takes_nothing_more(http: httpx.Client) -> None:
    session = begin(http)
    assert http.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 200
    finish = {"reason": {"type": "errored"}, "detail": "out of ideas"}
    assert http.post(f"/api/v1/sessions/{session}/finish", json=finish).status_code == 200
    again = {"reason": {"type": "success"}, "detail": None}
    assert http.post(f"/api/v1/sessions/{session}/finish", json=again).status_code == 200
    assert http.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 410
    begun = {"session_id": session, "model_seq_id": 0, "base_model": "fake/model"}
    assert http.post("/api/v1/create_model", json=begun).status_code == 410
    [summary] = http.post("/api/v1/sessions/search", json={"session_id": session}).json()["sessions"]
    assert summary["status"] == {
        "type": "client_finished",
        "reason": {"type": "errored"},
        "detail": "out of ideas",
    }


def test_sessions_are_found_by_each_thing_that_is_known_of_them(http: httpx.Client) -> None:
    mark = f"m{time.time()}"
    more = {"n": 3, "on": True, "off": None, "deep": {"a": [1]}}
    blue = begin(http, display_name="Blue 50%_Run", user_metadata={"mark": mark, **more}, project_id="p1")
    red = begin(http, display_name="red run", user_metadata={"mark": mark})
    done = begin(http, user_metadata={"mark": mark}, project_id="p2")
    http.post(f"/api/v1/sessions/{done}/finish", json={"reason": {"type": "interrupted"}})
    marked = {"user_metadata": {"mark": mark}}
    assert search(http, **marked) == [done, red, blue]
    shown = http.get(f"/api/v1/sessions/{blue}").json()["user_metadata"]
    assert shown == {"mark": mark, "n": "3", "on": "true", "off": "null", "deep": '{"a":[1]}'}
    for name in ("n", "on", "off"):
        assert search(http, user_metadata={"mark": mark, name: shown[name]}) == [blue]
    assert search(http, user_metadata={"mark": mark, "on": "1"}) == []
    assert search(http, user_metadata={"mark": "other"}) == []
    assert search(http, **marked, display_name="RUN") == [red, blue]
    assert search(http, **marked, display_name="run blue") == [blue]
    assert search(http, **marked, display_name="50%_") == [blue]
    assert search(http, **marked, display_name="5_%") == []
    assert search(http, **marked, display_name="red", session_id=blue) == [red, blue]
    assert search(http, **marked, session_id=done) == [done]
    assert search(http, **marked, project_ids=["p1", "p2"]) == [done, blue]
    assert search(http, **marked, project_ids=["default"]) == [red]
    assert search(http, **marked, statuses=[{"type": "active"}]) == [red, blue]
    finished = {"type": "client_finished"}
    assert search(http, **marked, statuses=[finished]) == [done]
    assert search(http, **marked, statuses=[{**finished, "reasons": ["success"]}]) == []
    assert search(
        http, **marked, statuses=[{**finished, "reasons": ["interrupted"]}, {"type": "active"}]
    ) == [
        done,
        red,
        blue,
    ]
    assert search(http, **marked, statuses=[{"type": "cancelled"}, {"type": "failed"}]) == []


def test_pages_follow_one_another_without_gap_or_repetition(http: httpx.Client) -> None:
    mark = f"m{time.time()}"
    made = [begin(http, user_metadata={"mark": mark}) for _ in range(7)]
    seen: list[str] = []
    cursor = None
    for _ in range(10):
        body = {"user_metadata": {"mark": mark}, "limit": 2, "cursor": cursor}
        page = http.post("/api/v1/sessions/search", json=body).json()
        seen += [each["session_id"] for each in page["sessions"]]
        cursor = page.get("next_cursor")
        if cursor is None:
            break
    assert seen == made[::-1]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 201}, "limit"),
        ({"statuses": []}, "statuses"),
        ({"statuses": [{"type": "asleep"}]}, "asleep"),
        ({"owner": {"type": "team"}}, "team"),
        ({"statuses": [{"type": "active", "reasons": ["success"]}]}, "reasons"),
        ({"statuses": [{"type": "client_finished", "reasons": []}]}, "reasons"),
        ({"owner": {"type": "user"}}, "owner_urns"),
        ({"owner": {"type": "own", "owner_urns": ["tml:user:ada"]}}, "owner_urns"),
        ({"cursor": {"last_created_at": "2026-01-01T00:00:00", "last_session_id": "x"}}, "last_created_at"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_a_search_for_what_cannot_be_is_refused(http: httpx.Client, body: dict[str, Any], word: str) -> None:
    answer = http.post("/api/v1/sessions/search", json=body)
    assert answer.status_code == 422
    assert word in clean(answer)["detail"]


def test_the_official_sdk_searches_and_assigns(served: ServedGateway) -> None:
    rest = tinker.RestClient(base_url=served.url, api_key=KEY)
    with tinker.ServiceClient(base_url=served.url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4).result()
        client.save_state("one").result()
        session_id = service.holder.get_session_id()
        rest.assign_session_project(session_id, "tests").result()
        wanted = SessionSearchRequest(
            project_ids=["tests"],
            owner=AccessibleSearchOwner(),
            statuses=[ActiveSessionStatusQuery(), ClientFinishedSessionStatusQuery(reasons=["success"])],
            limit=1,
        )
        [summary] = rest.search_sessions(wanted).result().sessions
        assert (summary.session_id, summary.project_id) == (session_id, "tests")
        assert summary.checkpoints_count == 1
        assert summary.status is not None
        assert summary.status.type == "active"
        assert summary.checkpoint_storage_bytes
        cancelled = SessionSearchRequest(statuses=[CancelledSessionStatusQuery()])
        assert rest.search_sessions(cancelled).result().sessions == []
        runs = rest.list_training_runs(limit=100, project_id="tests").result()
        assert [run.training_run_id for run in runs.training_runs] == [client.model_id]
        assert runs.cursor.total_count == 1
    [summary] = rest.search_sessions(SessionSearchRequest(session_id=session_id)).result().sessions
    assert summary.status is not None
    assert summary.status.type == "client_finished"


def trace_of(url: str) -> dict[str, Any]:
    """Fetched as the SDK does it: without a key."""
    with urllib.request.urlopen(url, timeout=30) as response:
        assert int(response.headers["Content-Length"]) > 0
        trace: dict[str, Any] = json.load(response)
        return trace


def test_a_trace_shows_what_happened_in_the_session(service: tinker.ServiceClient) -> None:
    client = service.create_lora_training_client("fake/model", rank=4).result()
    client.forward_backward([datum()], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError):
        client.forward_backward([datum()], "no_such_loss").result()  # type: ignore[arg-type]
    sampler = client.save_weights_and_get_sampling_client().result()
    sampler.sample(
        tinker.ModelInput.from_ints([1, 2]),
        num_samples=1,
        sampling_params=tinker.SamplingParams(max_tokens=2),
    ).result()
    url = service.create_rest_client().export_session_trace(service.holder.get_session_id()).result()
    events = trace_of(url)["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [(each["name"], each["args"]["status"]) for each in slices][:2] == [
        ("create_run", "done"),
        ("forward_backward", "done"),
    ]
    ends = [each["ts"] + each["dur"] for each in slices]
    assert all(end <= begun["ts"] + 1 for end, begun in zip(ends, slices[1:], strict=False))
    tracks = {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}
    assert slices[0]["tid"] == tracks[client.model_id]
    begun = [event for event in events if event["ph"] == "b" and event["name"] == "sample"]
    ended = [event for event in events if event["ph"] == "e" and event["name"] == "sample"]
    assert len(begun) == len(ended) == 1
    assert begun[0]["ts"] <= ended[0]["ts"]
    failed = [event for event in events if event.get("args", {}).get("status") == "failed"]
    assert any("no_such_loss" in event["args"]["error"] for event in failed)


def test_a_trace_is_fetched_with_the_signed_address_only(http: httpx.Client) -> None:
    run = begin_run(http)
    outcome(http, send_pass(http, run, 1, [1, 2, 3]).json()["request_id"])
    session, other = run.partition(":")[0], begin(http)
    answer = http.get(f"/api/v1/sessions/{session}/trace_export").json()
    assert answer["status"] == "ready"
    assert trace_of(answer["url"])["traceEvents"]
    for wrong in (answer["url"].replace(session, other), answer["url"][:-1] + "x"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            trace_of(wrong)
    assert http.get(f"/api/v1/sessions/{session}/trace").status_code == 422
    assert http.get("/api/v1/sessions/no-such/trace_export").status_code == 404
