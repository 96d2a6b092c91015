"""Lists: whose things are shown, filters, pages."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.admin.conftest import RUNS, Place, items
from tests.gateway.conftest import outcome

LISTS = {"runs": "run_id", "checkpoints": "path", "sessions": "session_id", "futures": "request_id"}


@pytest.mark.parametrize("route", LISTS)
def test_an_owner_sees_their_own_and_an_admin_everything(
    route: str, alice: httpx.Client, bob: httpx.Client, carol: httpx.Client, root: httpx.Client
) -> None:
    key = LISTS[route]
    own = {"alice": items(alice, route), "bob": items(bob, route), "carol": items(carol, route)}
    assert own["alice"] and own["bob"]
    everything = items(root, route)
    assert len({row[key] for row in everything}) == len(everything)
    for owner, rows in own.items():
        assert [row for row in everything if row["owner"] == owner] == rows
        assert items(root, route, owner=owner) == rows
    assert len(everything) == sum(len(rows) for rows in own.values())
    assert items(root, route, owner="nobody") == []


@pytest.mark.parametrize("route", LISTS)
def test_asking_for_anothers_list_is_refused_by_name(route: str, alice: httpx.Client) -> None:
    refused = alice.get(f"/admin/v1/{route}", params={"owner": "bob"})
    assert refused.status_code == 403
    assert refused.json()["param"] == "owner"
    assert "'bob'" in refused.json()["detail"]
    assert items(alice, route, owner="alice") == items(alice, route)


def test_anothers_thing_is_not_found_and_an_admins_is(
    place: Place, alice: httpx.Client, bob: httpx.Client, root: httpx.Client
) -> None:
    run_id, path = place.runs["alice"][0], place.paths["alice"][0].removeprefix("tinker://")
    session_id = run_id.partition(":")[0]
    request_id = items(alice, "futures", run_id=run_id)[0]["request_id"]
    for route in (
        f"runs/{run_id}",
        f"runs/{run_id}/metrics",
        f"checkpoints/{path}",
        f"sessions/{session_id}",
        f"futures/{request_id}",
    ):
        hidden, missing = bob.get(f"/admin/v1/{route}"), bob.get(f"/admin/v1/{route}x")
        assert hidden.status_code == missing.status_code == 404, route
        assert hidden.json()["code"] == "not_found" or route.endswith("metrics")
        assert alice.get(f"/admin/v1/{route}").json() == root.get(f"/admin/v1/{route}").json()
    assert bob.delete(f"/admin/v1/checkpoints/{path}").status_code == 404
    assert alice.get(f"/admin/v1/checkpoints/{path}").status_code == 200


def walk(http: httpx.Client, route: str, limit: int, **where: Any) -> list[dict[str, Any]]:
    """The list page by page."""
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        given = {"limit": limit, **where, **({"cursor": cursor} if cursor else {})}
        page = http.get(f"/admin/v1/{route}", params=given).json()
        assert len(page["items"]) <= limit
        found += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found
        assert len(page["items"]) == limit


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
@pytest.mark.parametrize("route", LISTS)
def test_the_pages_together_are_the_list_newest_first(route: str, limit: int, root: httpx.Client) -> None:
    whole = items(root, route)
    assert walk(root, route, limit) == whole
    times = [row["created_at"] for row in whole]
    assert times == sorted(times, reverse=True)


def test_pages_keep_to_a_filter_and_to_what_was_there(place: Place, alice: httpx.Client) -> None:
    first = alice.get("/admin/v1/sessions", params={"limit": 2}).json()
    rest = items(alice, "sessions")[2:]
    alice.post("/api/v1/create_session", json={}).raise_for_status()
    behind = alice.get("/admin/v1/sessions", params={"limit": 1000, "cursor": first["next_cursor"]}).json()
    assert behind["items"] == rest  # what is newer than a page does not shift the next one
    run_id = place.runs["alice"][1]
    passes = walk(alice, "futures", 2, run_id=run_id)
    assert [row["seq_id"] for row in passes] == [4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    "cursor",
    [
        "nonsense",
        "é",
        base64.urlsafe_b64encode(b'{"a": 1}').decode(),
        base64.urlsafe_b64encode(b"[1]").decode(),
        base64.urlsafe_b64encode(b'["1", "a"]').decode(),
        base64.urlsafe_b64encode(b"[1e400, 1]").decode(),
        base64.urlsafe_b64encode(rb'[1.5, "a\u0000b"]').decode(),
        base64.urlsafe_b64encode(rb'[1.5, "\ud800"]').decode(),
    ],
)
def test_a_broken_cursor_is_refused_by_name(cursor: str, alice: httpx.Client) -> None:
    for route in LISTS:
        refused = alice.get(f"/admin/v1/{route}", params={"cursor": cursor})
        assert refused.status_code == 400, refused.text
        assert refused.json()["param"] == "cursor"
        assert "next_cursor" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("route", "where", "name"),
    [
        ("runs", {"limit": 0}, "limit"),
        ("runs", {"limit": 1001}, "limit"),
        ("runs", {"limit": "many"}, "limit"),
        ("runs", {"status": "sleeping"}, "status"),
        ("futures", {"status": "lost"}, "status"),
        ("checkpoints", {"kind": "training"}, "kind"),
        ("sessions", {"cursor": "x" * 1001}, "cursor"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(
    route: str, where: dict[str, Any], name: str, alice: httpx.Client
) -> None:
    refused = alice.get(f"/admin/v1/{route}", params=where)
    assert refused.status_code in (400, 422)
    assert name in refused.text


def test_text_that_no_database_holds_is_refused(alice: httpx.Client) -> None:
    for route in ("runs?base_model=a%00b", "futures?kind=%00", "runs/a%00b", "checkpoints/r/weights/%00"):
        refused = alice.get(f"/admin/v1/{route}")
        assert refused.status_code == 400, refused.text
        assert "NUL" in refused.json()["detail"]


def test_runs_are_filtered(place: Place, root: httpx.Client) -> None:
    for owner, count in RUNS.items():
        assert len(items(root, "runs", base_model="fake/model", owner=owner)) == count
    assert items(root, "runs", base_model="other/model") == []
    assert items(root, "runs", status="failed", owner="alice") == []
    chosen = place.runs["bob"][1]
    [run] = items(root, "runs", session_id=chosen.partition(":")[0])
    assert (run["run_id"], run["owner"]) == (chosen, "bob")


def test_checkpoints_are_filtered(place: Place, alice: httpx.Client) -> None:
    paths = place.paths["alice"]
    assert [row["path"] for row in items(alice, "checkpoints")] == paths[::-1]
    assert [row["path"] for row in items(alice, "checkpoints", kind="weights")] == paths[::2][::-1]
    of_run = items(alice, "checkpoints", run_id=place.runs["alice"][1])
    assert [row["path"] for row in of_run] == [paths[3], paths[2]]
    assert items(alice, "checkpoints", base_model="other/model") == []


def test_futures_are_filtered(alice: httpx.Client) -> None:
    steps = items(alice, "futures", kind="optim_step")
    assert len(steps) == RUNS["alice"]
    assert {row["seq_id"] for row in steps} == {2}
    assert items(alice, "futures", status="queued") == []
    assert items(alice, "futures", engine="other") == []
    assert items(alice, "futures", engine="fake", status="done") == items(alice, "futures")


def test_a_run_is_described(place: Place, alice: httpx.Client) -> None:
    run = alice.get(f"/admin/v1/runs/{place.runs['alice'][1]}").json()
    assert run["lora"]["rank"] == 8
    assert run["lora"]["seed"] == 1
    assert (run["status"], run["engine"], run["base_model"]) == ("active", "fake", "fake/model")
    assert (run["step"], run["next_seq"], run["resident"]) == (1, 5, True)
    assert run["session_id"] == run["run_id"].partition(":")[0]
    for field in ("created_at", "last_request_at"):
        age = datetime.now(UTC) - datetime.fromisoformat(run[field])
        assert timedelta(0) < age < timedelta(minutes=5)
    assert run in items(alice, "runs")


def test_a_future_is_described(place: Place, alice: httpx.Client) -> None:
    run_id = place.runs["alice"][0]
    future = items(alice, "futures", run_id=run_id, kind="forward_backward")[0]
    assert future == alice.get(f"/admin/v1/futures/{future['request_id']}").json()
    times = [datetime.fromisoformat(future[f"{name}_at"]) for name in ("created", "started", "finished")]
    assert times == sorted(times)
    assert future["waited_s"] == pytest.approx((times[1] - times[0]).total_seconds(), abs=1e-5)
    assert future["ran_s"] == pytest.approx((times[2] - times[1]).total_seconds(), abs=1e-5)
    assert (future["attempts"], future["error"], future["status"]) == (1, None, "done")


def test_a_failed_call_tells_why(carol: httpx.Client) -> None:
    session = carol.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": "fake/model",
        "lora_config": {"rank": 10**6},
    }
    promise = carol.post("/api/v1/create_model", json=body).json()
    told = outcome(carol, promise["request_id"])
    [failed] = items(carol, "futures", status="failed")
    assert failed["error_category"] == "user"
    assert "rank" in failed["error"]
    assert (failed["error"], failed["run_id"]) == (told["error"], promise["model_id"])
    [run] = items(carol, "runs", status="failed")
    assert run["run_id"] == promise["model_id"]
