"""What is shown of the gateway itself: engines, counters, health, and that every route is documented."""

from __future__ import annotations

import os
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from gateway.admin import router
from tests.admin.conftest import RUNS, Place

ROOT = Path(__file__).parents[2]


def test_engines_are_listed(place: Place, bob: httpx.Client) -> None:
    [engine] = bob.get("/admin/v1/engines").json()["items"]
    assert engine == bob.get("/admin/v1/engines/fake").json()
    assert (engine["name"], engine["base_model"], engine["plugin"]) == ("fake", "fake/model", "fake")
    assert (engine["state"], engine["problem"], engine["starts"]) == ("ready", None, 1)
    assert [engine["pid"]] == place.gateway.engine_pids()
    assert engine["epoch"] >= 1
    assert engine["resident_runs"] >= sum(RUNS.values())
    assert engine["max_context"] == 8192
    assert "numpy" in engine["versions"]
    assert (engine["device"], engine["dtype"]) == ("cpu", "float32")


def test_an_unknown_engine_is_not_found_and_the_known_are_named(bob: httpx.Client) -> None:
    missing = bob.get("/admin/v1/engines/other")
    assert missing.status_code == 404
    assert "fake" in missing.json()["detail"]


def test_counters_are_for_admins(place: Place, alice: httpx.Client, root: httpx.Client) -> None:
    refused = alice.get("/admin/v1/metrics")
    assert refused.status_code == 403
    assert "admin" in refused.json()["detail"]
    counters = root.get("/admin/v1/metrics").json()
    assert counters["uptime_s"] > 0
    assert counters["open_futures"] == {}
    assert counters["engines"]["fake"]["starts"] == 1
    assert counters["engines"]["fake"]["resident_runs"] >= sum(RUNS.values())
    resident = int(Path(f"/proc/{place.gateway.pid}/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
    assert counters["resident_bytes"] == pytest.approx(resident, rel=0.2)


def test_duties_are_shown_to_admins(alice: httpx.Client, root: httpx.Client) -> None:
    refused = alice.get("/admin/v1/duties")
    assert refused.status_code == 403
    assert "admin" in refused.json()["detail"]
    duties: dict[str, Any] = {}
    for _ in range(100):
        duties = {duty["name"]: duty for duty in root.get("/admin/v1/duties").json()["items"]}
        if duties.get("expired checkpoints", {}).get("runs"):
            break
        time.sleep(0.1)
    duty = duties["expired checkpoints"]
    assert (duty["holder"], duty["failures"], duty["last_error"], duty["failed_at"]) == (None, 0, None, None)
    assert duty["last_seconds"] >= 0
    assert datetime.fromisoformat(duty["last_run_at"]).timestamp() == pytest.approx(time.time(), abs=600)


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "tml-wrong"}, {"Authorization": "Basic eDp5"}])
def test_without_a_known_key_nothing_is_shown(place: Place, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=place.gateway.url, headers=headers, trust_env=False) as http:
        for route in admin_routes():
            path = re.sub(r"{kind}", "weights", route.path)
            answer = http.request(next(iter(methods_of(route))), re.sub(r"{\w+}", "x", path))
            assert answer.status_code == 401, route.path
            assert "API key" in answer.json()["detail"]


def test_a_key_may_come_as_a_bearer_token(place: Place) -> None:
    headers = {"Authorization": f"Bearer {place.keys['bob']}"}
    answer = httpx.get(f"{place.gateway.url}/admin/v1/runs", headers=headers, trust_env=False).json()
    assert {run["run_id"] for run in answer["items"]} == set(place.runs["bob"])


def test_liveness_and_readiness_need_no_key(place: Place) -> None:
    with httpx.Client(base_url=place.gateway.url, trust_env=False) as http:
        for route in ("/healthz", "/api/v1/healthz"):
            assert http.get(route).json() == {"status": "ok"}
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()) == (
            200,
            {"ready": True, "draining": False, "engines": {"fake": "ready"}},
        )


def methods_of(route: APIRoute) -> set[str]:
    assert route.methods is not None
    return route.methods


def admin_routes() -> list[APIRoute]:
    return [route for route in router.routes if isinstance(route, APIRoute)]


def test_every_route_and_parameter_is_documented() -> None:
    text = (ROOT / "docs" / "admin.md").read_text()
    for route in admin_routes():
        for method in methods_of(route):
            assert f"`{method} {route.path}`" in text
        for parameter in route.dependant.query_params:
            assert f"`{parameter.name}`" in text, f"{parameter.name} of {route.path}"


def test_the_documentation_names_no_route_that_is_none() -> None:
    text = (ROOT / "docs" / "admin.md").read_text()
    known = {f"{method} {route.path}" for route in admin_routes() for method in methods_of(route)}
    named = set(re.findall(r"`((?:GET|POST|DELETE|PUT|PATCH) /admin[^`?]*)`", text))
    assert named <= known


def test_the_openapi_page_describes_the_routes(place: Place) -> None:
    described = httpx.get(f"{place.gateway.url}/openapi.json", trust_env=False).json()["paths"]
    for route in admin_routes():
        for method in methods_of(route):
            assert described[route.path][method.lower()]["summary"]
