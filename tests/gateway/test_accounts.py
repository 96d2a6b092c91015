"""Usage, the audit log, and one's own key: what the routes tell is what has happened, counted here independently."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import tinker

from tests.gateway.conftest import begin_run, clean, datum
from tests.gateway.test_keys import client_with, make_key
from tests.postgres import PostgresServer
from tests.served import ServedGateway

# The SDK warns of its own deprecations, and leaves the connections of its background loops to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
PROMPT = tinker.ModelInput.from_ints([1, 2, 3, 4, 5])


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedGateway]:
    """A gateway of this module's own, so that what is counted is known."""
    settings = {}
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("pg_server")
        template: str = request.getfixturevalue("_pg_template")
        settings["database_url"] = server.url(server.create_database(template=template))
    gateway = ServedGateway(tmp_path_factory.mktemp("accounts"), None, **settings)
    gateway.start()
    yield gateway
    gateway.stop()
    gateway.close()


def window() -> tuple[str, str]:
    """The hours around now."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return (hour - timedelta(hours=1)).isoformat(), (hour + timedelta(hours=1)).isoformat()


def totals(usage: tinker.types.BillingUsageResponse, session_id: str | None) -> Counter[str]:
    """Token and save counts of a session by kind."""
    found: Counter[str] = Counter()
    for event in usage.data:
        info: Any = event.event_info
        if event.session_id == session_id and info.type != "storage":
            kind = f"{info.type}:cached" if getattr(info, "cached", False) else info.type
            found[kind] += info.count if info.type == "checkpoint" else info.token_count
    return found


def test_usage_is_what_was_done(served: ServedGateway, service: tinker.ServiceClient) -> None:
    client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
    client.forward_backward([datum(0, 12), datum(1, 30)], "cross_entropy").result()
    client.optim_step(tinker.AdamParams(learning_rate=0.01)).result()
    client.forward([datum(2, 7)], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError):
        client.forward_backward([datum(3, 100)], "no_such_loss").result()  # type: ignore[arg-type]
    path = client.save_state("one").result().path
    sampler = client.save_weights_and_get_sampling_client().result()
    params = tinker.SamplingParams(max_tokens=6, stop=[], seed=1)
    answers = [sampler.sample(PROMPT, num_samples=count, sampling_params=params).result() for count in (3, 2)]
    cached = sum(answer.prompt_cache_hit_tokens for answer in answers)
    usage = tinker.AdminClient(base_url=served.url, api_key="tml-test").get_billing_usage(*window()).result()
    session_id = service.holder.get_session_id()
    expected = {
        "training": 12 + 30 + 7,
        "sampling_prefill": 2 * 5 - cached,
        "sampling_prefill:cached": cached,
        "sampling_sample": (3 + 2) * 6,
        "checkpoint": 1,
    }
    assert totals(usage, session_id) == {kind: count for kind, count in expected.items() if count}
    assert session_id in usage.sessions
    assert {event.base_model for event in usage.data} == {"fake/model"}
    assert {event.user_id for event in usage.data} == {"tml:user:local"}
    assert all(event.bucket_end - event.bucket_start == timedelta(hours=1) for event in usage.data)
    size = service.create_rest_client().list_user_checkpoints().result().checkpoints[0].size_bytes
    assert size
    stored = sum(e.event_info.gigabyte_hours for e in usage.data if e.event_info.type == "storage")
    assert 0 < stored < size / 1e9 * 60 / 3600
    now = tinker.AdminClient(base_url=served.url, api_key="tml-test")
    [item] = now.get_current_checkpoint_storage_usage().result().data
    assert (item.checkpoint_count, item.size_bytes) == (1, size)
    assert item.size_gigabytes == pytest.approx(size / 1e9)
    assert now.get_current_checkpoint_storage_usage("no-such").result().data == []
    service.create_rest_client().delete_checkpoint_from_tinker_path(path).result()
    assert now.get_current_checkpoint_storage_usage().result().data == []


def test_openai_requests_are_counted_too(served: ServedGateway, http: httpx.Client) -> None:
    def counted() -> Counter[str]:
        starting_on, ending_before = window()
        answer = http.get(
            "/api/v1/billing/usage/events",
            params={"starting_on": starting_on, "ending_before": ending_before},
        )
        return totals(tinker.types.BillingUsageResponse.model_validate(answer.json()), None)

    before = counted()
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="tml-test")
    reply = client.completions.create(model="fake/model", prompt="hello", max_tokens=7, n=2)
    stream = client.completions.create(model="fake/model", prompt="hello", max_tokens=5, stream=True)
    told = sum(1 for _ in stream)
    assert told > 1
    assert reply.usage is not None
    deadline = time.monotonic() + 5
    while (used := counted() - before)["sampling_sample"] < reply.usage.completion_tokens + 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert used["sampling_sample"] <= reply.usage.completion_tokens + 5
    assert used["sampling_prefill"] + used["sampling_prefill:cached"] >= 2 * reply.usage.prompt_tokens


def test_a_window_that_cannot_be_is_refused(http: httpx.Client) -> None:
    good = {"starting_on": "2026-01-01T00:00:00Z", "ending_before": "2026-01-15T00:00:00Z"}
    assert http.get("/api/v1/billing/usage/events", params=good).json() == {"data": [], "sessions": {}}
    for changes, word in (
        ({"starting_on": "2026-01-01T00:00:01Z"}, "full hour"),
        ({"ending_before": "2026-01-01T00:00:00Z"}, "after starting_on"),
        ({"ending_before": "2026-01-15T01:00:00Z"}, "14 days"),
        ({"starting_on": "2999-01-01T00:00:00Z", "ending_before": "2999-01-02T00:00:00Z"}, "future"),
        ({"starting_on": "2026-01-01T00:00:00"}, "starting_on"),
        ({"starting_on": "yesterday"}, "starting_on"),
    ):
        answer = http.get("/api/v1/billing/usage/events", params={**good, **changes})
        assert answer.status_code == 422
        assert word in clean(answer)["detail"]


def test_the_audit_log_tells_what_was_done_today(
    served: ServedGateway, service: tinker.ServiceClient
) -> None:
    client = service.create_lora_training_client("fake/model", rank=4).result()
    path = client.save_state("logged").result().path
    rest = service.create_rest_client()
    rest.publish_checkpoint_from_tinker_path(path).result()
    service.create_training_client_from_state(path).result()
    session_id = service.holder.get_session_id()
    rest.assign_session_project(session_id, "proj").result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    admin = tinker.AdminClient(base_url=served.url, api_key="tml-test")
    log = admin.get_audit_log("checkpoints").result().entries
    mine = [entry for entry in log if entry.tinker_path == path]
    assert [entry.event for entry in mine] == [
        "checkpoint_created",
        "checkpoint_published",
        "checkpoint_read",
        "checkpoint_deleted",
    ]
    assert mine[2].purpose == "training"
    assert mine[2].event_details["reader"] == "tml:user:local"
    assert {entry.model_id for entry in mine} == {path.removeprefix("tinker://").split("/")[0]}
    [assigned] = [
        entry
        for entry in admin.get_audit_log("projects").result().entries
        if entry.event_details["session_id"] == session_id
    ]
    assert assigned.event == "project_session_assigned"
    assert assigned.event_details["project_id"] == "proj"
    everything = admin.get_audit_log().result().entries
    assert [entry.timestamp for entry in everything] == sorted(entry.timestamp for entry in everything)
    assert "run_created" in {entry.event for entry in everything}
    assert admin.get_audit_log("teams").result().entries == []
    assert admin.get_audit_log(day=datetime.now(UTC).date() - timedelta(days=1)).result().entries == []


@pytest.mark.parametrize("params", [{"event_type": "nothing"}, {"day": "yesterday"}])
def test_what_the_audit_log_does_not_know_is_refused(http: httpx.Client, params: dict[str, str]) -> None:
    assert http.get("/api/v1/audit", params=params).status_code == 422


def test_without_keys_one_is_the_machine(http: httpx.Client) -> None:
    me = http.get("/api/v1/auth/apikey/me").json()
    assert me["details"] == {"org_details": {"name": "tandem"}, "user_details": {"email": "local"}}
    assert http.delete("/api/v1/auth/apikey/me").status_code == 404


def test_owners_see_their_own_and_an_admin_everybodys(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path / "keys")
    ann, bob = make_key(gateway, "ann@example.org", "--label", "laptop"), make_key(gateway, "bob")
    root = make_key(gateway, "root", "--admin")
    gateway.start()
    try:
        with (
            client_with(gateway, ann) as as_ann,
            client_with(gateway, bob) as as_bob,
            client_with(gateway, root) as as_root,
        ):
            run = begin_run(as_ann)
            _only_owner_and_admin_see(as_ann, as_bob, as_root, run)
            me = as_ann.get("/api/v1/auth/apikey/me").json()
            assert me["name"] == "laptop"
            assert me["details"]["user_details"]["email"] == "ann@example.org"
            token = as_ann.post("/api/v1/auth/token", json={}).json()["jwt"]
            assert as_ann.delete("/api/v1/auth/apikey/me").status_code == 200
            assert as_ann.get("/api/v1/sessions").status_code == 401
            with client_with(gateway, token) as with_token:
                assert with_token.get("/api/v1/sessions").json()["code"] == "invalid_token"
            assert as_bob.delete("/api/v1/auth/apikey/me").status_code == 200
            last = as_root.delete("/api/v1/auth/apikey/me")
            assert last.status_code == 403
            assert "only key" in last.json()["detail"]
            entries = as_root.get("/api/v1/audit", params={"event_type": "organizations"}).json()["entries"]
            assert Counter(entry["event"] for entry in entries) == {
                "api_key_created": 3,
                "api_key_deleted": 2,
            }
            assert me["key_id"] in [entry["event_details"]["key_id"] for entry in entries]
    finally:
        gateway.stop()
        gateway.close()


def _only_owner_and_admin_see(
    as_ann: httpx.Client, as_bob: httpx.Client, as_root: httpx.Client, run: str
) -> None:
    session = run.partition(":")[0]
    scope = {"access_scope": "accessible"}
    for client, visible in ((as_ann, True), (as_bob, False), (as_root, True)):
        listed = client.get("/api/v1/training_runs", params=scope).json()
        assert ([each["training_run_id"] for each in listed["training_runs"]] == [run]) is visible
        assert listed["cursor"]["total_count"] == int(visible)
        expected = 200 if visible else 404
        assert client.get(f"/api/v1/training_runs/{run}", params=scope).status_code == expected
        assert client.get(f"/api/v1/sessions/{session}", params=scope).status_code == expected
        assert (client.get("/api/v1/sessions", params=scope).json()["sessions"] == [session]) is visible
        found = client.post("/api/v1/sessions/search", json={"owner": {"type": "accessible"}}).json()
        assert ([each["session_id"] for each in found["sessions"]] == [session]) is visible
        named = {"owner": {"type": "user", "owner_urns": ["tml:user:ann@example.org", "x"]}}
        found = client.post("/api/v1/sessions/search", json=named).json()
        assert ([each["session_id"] for each in found["sessions"]] == [session]) is visible
        entries = client.get("/api/v1/audit").json()["entries"]
        assert ("run_created" in [entry["event"] for entry in entries]) is visible
    for client in (as_bob, as_root):
        assert client.get("/api/v1/training_runs").json()["training_runs"] == []
        assert client.get(f"/api/v1/sessions/{session}").status_code == 404
        assert client.get(f"/api/v1/sessions/{session}/trace_export").status_code == 404
        body = {"project_id": "p"}
        assert client.put(f"/api/v1/sessions/{session}/project", json=body).status_code == 404
