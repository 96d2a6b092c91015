"""Deleting by what checkpoints are, and unnamed samplers that get a name."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import tinker

from sdk import AdminClient, AdminError
from tests.admin.conftest import save
from tests.checkpoints.conftest import Place, route_of, trained_run
from tests.gateway.conftest import datum

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
ROUTE = "/admin/v1/checkpoints"


def several(http: httpx.Client) -> tuple[str, list[str]]:
    """A run with three checkpoints to train on and two to sample from, oldest first."""
    run_id = trained_run(http)
    kinds = ["weights", "sampler_weights", "weights", "sampler_weights", "weights"]
    return run_id, [save(http, run_id, 3 + place, f"n{place}", kind) for place, kind in enumerate(kinds)]


def paths_of(http: httpx.Client, run_id: str) -> list[str]:
    rows = http.get(ROUTE, params={"run_id": run_id}).json()["items"]
    return [row["path"] for row in rows][::-1]


def prune(http: httpx.Client, **where: Any) -> dict[str, Any]:
    answer = http.delete(ROUTE, params=where)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_the_newest_of_each_kind_stay(place: Place, alice: httpx.Client) -> None:
    before = place.folders()
    run_id, paths = several(alice)
    tried = prune(alice, run_id=run_id, keep_last=1, dry_run=True)
    assert tried["paths"] == paths[:3]
    assert tried["dry_run"] is True
    assert paths_of(alice, run_id) == paths
    done = prune(alice, run_id=run_id, keep_last=1)
    assert (done["paths"], done["dry_run"], done["more"]) == (paths[:3], False, False)
    assert done["size_bytes"] == tried["size_bytes"] > 0
    assert paths_of(alice, run_id) == paths[3:]
    assert len(place.folders() - before) == 2
    assert prune(alice, run_id=run_id, keep_last=1)["paths"] == []


def test_by_kind_name_and_time(alice: httpx.Client) -> None:
    run_id, paths = several(alice)
    assert prune(alice, run_id=run_id, kind="sampler_weights", dry_run=True)["paths"] == [paths[1], paths[3]]
    assert prune(alice, run_id=run_id, name_prefix="n4", dry_run=True)["paths"] == [paths[4]]
    rows = {row["path"]: row for row in alice.get(ROUTE, params={"run_id": run_id}).json()["items"]}
    earlier, later = (datetime.fromisoformat(rows[paths[place]]["created_at"]) for place in (1, 2))
    moment = (earlier + (later - earlier) / 2).isoformat()
    assert prune(alice, run_id=run_id, before=moment, dry_run=True)["paths"] == paths[:2]
    assert prune(alice, run_id=run_id, after=moment, dry_run=True)["paths"] == paths[2:]
    some = prune(alice, run_id=run_id, limit=2)
    assert (some["paths"], some["more"]) == (paths[:2], True)
    assert paths_of(alice, run_id) == paths[2:]


@pytest.mark.parametrize("misspelt", ["dryrun", "keeplast", "names_prefix"])
def test_a_misspelt_filter_deletes_nothing(alice: httpx.Client, misspelt: str) -> None:
    run_id, paths = several(alice)
    answer = alice.delete(ROUTE, params={"run_id": run_id, misspelt: "1"})
    assert answer.status_code == 422
    assert answer.json()["param"] == misspelt
    assert "keep_last" in answer.json()["detail"]
    assert paths_of(alice, run_id) == paths


@pytest.mark.parametrize(
    "where", [{}, {"dry_run": True}, {"owner": "alice"}, {"before": "2026-01-31T00:00:00"}]
)
def test_everything_is_not_a_selection(alice: httpx.Client, where: dict[str, Any]) -> None:
    run_id, paths = several(alice)
    assert alice.delete(ROUTE, params=where).status_code == 400
    assert paths_of(alice, run_id) == paths


def test_others_are_not_reached(alice: httpx.Client, bob: httpx.Client, root: httpx.Client) -> None:
    run_id, paths = several(alice)
    assert prune(bob, run_id=run_id)["paths"] == []
    assert bob.delete(ROUTE, params={"owner": "alice", "run_id": run_id}).status_code == 403
    assert paths_of(alice, run_id) == paths
    assert prune(root, owner="bob", run_id=run_id)["paths"] == []
    assert prune(root, owner="alice", run_id=run_id)["paths"] == paths


def test_what_a_run_began_at_keeps_its_files(place: Place, alice: httpx.Client) -> None:
    run_id, paths = several(alice)
    with tinker.ServiceClient(base_url=place.url, api_key=place.keys["alice"]) as service:
        child = service.create_training_client_from_state(paths[0]).result()
        assert prune(alice, run_id=run_id, keep_last=0)["paths"] == paths
        assert child.forward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0


def test_the_admin_client_prunes(place: Place, alice: httpx.Client) -> None:
    run_id, paths = several(alice)
    later = datetime.now(UTC) + timedelta(hours=1)
    with AdminClient(place.url, place.keys["alice"]) as admin:
        with pytest.raises(AdminError, match="at least one"):
            admin.delete_checkpoints()
        tried = admin.delete_checkpoints(run_id=run_id, before=later, keep_last=2, dry_run=True)
        assert tried.paths == [paths[0]]
        assert admin.delete_checkpoints(run_id=run_id, after=later).paths == []
        assert admin.delete_checkpoints(run_id=run_id, keep_last=2).paths == [paths[0]]


# ------------------------------------------------------------------ promotion


def unnamed(service: tinker.ServiceClient, place: Place) -> tuple[tinker.SamplingClient, str, str]:
    """A sampler of weights without a name, its id and the run."""
    client = service.create_lora_training_client("fake/model", rank=4, seed=5).result()
    client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(tinker.AdamParams(learning_rate=0.05)).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    with AdminClient(place.url, place.keys["alice"]) as admin:
        [row] = admin.samplers(run_id=client.model_id)
    assert row.path is None
    return sampler, row.sampler_id, client.model_id


def test_an_unnamed_sampler_gets_a_name(place: Place, alice: httpx.Client, bob: httpx.Client) -> None:
    prompt = tinker.ModelInput.from_ints([1, 2, 3, 4, 5])
    with tinker.ServiceClient(base_url=place.url, api_key=place.keys["alice"]) as service:
        sampler, sampler_id, run_id = unnamed(service, place)
        before = place.folders()
        assert bob.post(f"/admin/v1/samplers/{sampler_id}/promote", json={"name": "best"}).status_code == 404
        assert bob.get(f"/admin/v1/samplers/{sampler_id}").status_code == 404
        with AdminClient(place.url, place.keys["alice"]) as admin:
            made = admin.promote_sampler(sampler_id, "best", ttl_seconds=7200)
            assert made.path == f"tinker://{run_id}/sampler_weights/best"
            assert made.size_bytes > 0
            assert made.expires_at is not None
            assert admin.sampler(sampler_id).run_id == run_id
            assert (
                admin.promote_sampler(sampler_id, "best").expires_at is None
            )  # said again, with another expiry
            _, other_id, _ = unnamed(service, place)
            other = admin.promote_sampler(other_id, "best")
            assert other.path != made.path
            client = service.create_training_client_from_state(other.path).result()
            client.save_weights_and_get_sampling_client().result()
            client.save_weights_for_sampler("best").result()
            [third] = [each for each in admin.samplers(run_id=client.model_id) if each.path is None]
            with pytest.raises(AdminError, match="exists already"):
                admin.promote_sampler(third.sampler_id, "best")
            with pytest.raises(AdminError, match="1 to 200"):
                admin.promote_sampler(sampler_id, "a/b")
        assert len(place.folders() - before) == 3  # of the three other saves: promotion copies nothing
        named = service.create_sampling_client(model_path=made.path).result()
        assert named.compute_logprobs(prompt).result() == sampler.compute_logprobs(prompt).result()
        assert alice.delete(route_of(made.path)).status_code == 200
        assert sampler.compute_logprobs(prompt).result()[0] is None  # it keeps its files


def test_samplers_that_cannot_be_promoted_say_why(place: Place, alice: httpx.Client) -> None:
    session = alice.post("/api/v1/create_session", json={}).json()["session_id"]
    path = save(alice, trained_run(alice), 3, "w", "sampler_weights")
    made = []
    for place_, more in enumerate(({"base_model": "fake/model"}, {"model_path": path})):
        body = {"session_id": session, "sampling_session_seq_id": place_, **more}
        made.append(alice.post("/api/v1/create_sampling_session", json=body).json()["sampling_session_id"])
    answers = [alice.post(f"/admin/v1/samplers/{each}/promote", json={"name": "x"}) for each in made]
    assert [answer.status_code for answer in answers] == [400, 400]
    assert "base model alone" in answers[0].text
    assert path in answers[1].text
    assert alice.post("/admin/v1/samplers/none/promote", json={"name": "x"}).status_code == 404
    assert alice.post(f"/admin/v1/samplers/{made[0]}/promote", json={"nome": "x"}).status_code == 422


def test_samplers_are_listed_in_pages(alice: httpx.Client, bob: httpx.Client) -> None:
    session = alice.post("/api/v1/create_session", json={}).json()["session_id"]
    for number in range(5):
        body = {"session_id": session, "sampling_session_seq_id": number, "base_model": "fake/model"}
        assert alice.post("/api/v1/create_sampling_session", json=body).status_code == 200
    seen: list[str] = []
    cursor: str | None = None
    while True:
        where = {"session_id": session, "limit": 2, **({"cursor": cursor} if cursor else {})}
        page = alice.get("/admin/v1/samplers", params=where).json()
        seen += [row["sampler_id"] for row in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == [f"{session}:sample:{number}" for number in (4, 3, 2, 1, 0)]
    assert bob.get("/admin/v1/samplers", params={"session_id": session}).json()["items"] == []
