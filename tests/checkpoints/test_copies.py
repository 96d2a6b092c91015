"""Copies: the same files under another name, owner and expiry; and access tokens, which open another's weights."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tinker

from tests.admin.conftest import finish, save
from tests.checkpoints.conftest import Place, route_of, trained_run
from tests.gateway.conftest import datum, outcome, send_pass

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
ADAM = tinker.AdamParams(learning_rate=0.02)


@pytest.fixture
def service(place: Place) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=place.url, api_key=place.keys["alice"], project_id="mine") as client:
        yield client


def copy(http: httpx.Client, source: str, key: str | None = None, **more: Any) -> httpx.Response:
    body = {"source_path": source, "destination_project_id": "archive", **more}
    token = body.pop("token", None)
    headers = {"X-Idempotency-Key": key or str(uuid.uuid4())}
    if token is not None:
        headers["X-Tinker-Weights-Access-Token"] = token
    return http.post("/api/v1/copy_weights", json=body, headers=headers)


def copied(http: httpx.Client, source: str, **more: Any) -> str:
    answer = copy(http, source, **more)
    assert answer.status_code == 200, answer.text
    path: str = answer.json()["tinker_path"]
    return path


def row_of(http: httpx.Client, path: str) -> dict[str, Any]:
    rows = http.get("/api/v1/checkpoints?limit=1000").json()["checkpoints"]
    [row] = [row for row in rows if row["tinker_path"] == path]
    return dict(row)


@pytest.mark.parametrize("kind", ["weights", "sampler_weights"])
def test_a_copy_outlives_its_source_and_shares_its_files(
    place: Place, alice: httpx.Client, kind: str
) -> None:
    before = place.folders()
    source = save(alice, trained_run(alice), 3, "w", kind)
    [folder] = place.folders() - before
    path = copied(alice, source)
    assert path.endswith(f"/{kind}/w")
    assert path != source
    assert place.folders() - before == {folder}
    first, second = row_of(alice, source), row_of(alice, path)
    for field in ("checkpoint_type", "size_bytes", "user_metadata"):
        assert first[field] == second[field]
    assert alice.delete(route_of(source)).status_code == 200
    assert folder.exists()
    assert alice.get(route_of(path, "/archive")).status_code == 302
    assert alice.delete(route_of(path)).status_code == 200
    assert not folder.exists()


def test_a_copy_trains_on_as_its_source_would(service: tinker.ServiceClient) -> None:
    client = service.create_lora_training_client("fake/model", rank=4, seed=1).result()
    for seed in range(2):
        client.forward_backward([datum(seed)], "cross_entropy").result()
        client.optim_step(ADAM).result()
    source = client.save_state("middle").result().path
    path = service.copy_weights(source).result()
    losses = []
    for begin in (source, path):
        other = service.create_training_client_from_state_with_optimizer(begin).result()
        other.forward_backward([datum(5)], "cross_entropy").result()
        other.optim_step(ADAM).result()
        losses.append(other.forward([datum(9)], "cross_entropy").result().metrics["loss:sum"])
    assert losses[0] == losses[1]


def test_the_run_of_a_copy_is_not_trained(alice: httpx.Client) -> None:
    path = copied(alice, save(alice, trained_run(alice), 3, "w"))
    run_id = path.removeprefix("tinker://").split("/")[0]
    refused = send_pass(alice, run_id, 1, [1, 2, 3])
    assert refused.status_code == 410
    assert "copied or imported" in refused.json()["detail"]
    shown = alice.get(f"/api/v1/training_runs/{run_id}").json()
    assert (shown["base_model"], shown["lora_rank"], shown["corrupted"]) == ("fake/model", 4, False)


def test_the_copy_is_in_the_project_that_was_named(place: Place, alice: httpx.Client) -> None:
    path = copied(alice, save(alice, trained_run(alice), 3, "w"), destination_project_id="elsewhere")
    session_id = path.removeprefix("tinker://").split(":")[0]
    session = alice.get(f"/admin/v1/sessions/{session_id}").json()
    assert session["project_id"] == "elsewhere"
    assert session["finished_at"] is not None  # nobody's heartbeat keeps it


def test_expiry_and_publication_are_not_inherited(alice: httpx.Client) -> None:
    source = save(alice, trained_run(alice), 3, "w")
    assert alice.put(route_of(source, "/ttl"), json={"ttl_seconds": 7200}).status_code == 200
    assert alice.post(route_of(source, "/publish")).status_code == 200
    row = row_of(alice, copied(alice, source))
    assert row["public"] is False
    assert "expires_at" not in row
    assert "expires_at" in row_of(alice, copied(alice, source, ttl_seconds=3600))
    assert copy(alice, source, ttl_seconds=60).status_code == 422


def test_a_key_belongs_to_one_copy(alice: httpx.Client, bob: httpx.Client) -> None:
    source = save(alice, trained_run(alice), 3, "w")
    key = str(uuid.uuid4())
    first = copied(alice, source, key=key)
    assert copied(alice, source, key=key) == first
    assert copied(alice, source) != first
    assert alice.delete(route_of(source)).status_code == 200
    assert copied(alice, source, key=key) == first  # the answer was lost, the copy is there
    assert copy(bob, source, key=key).status_code == 404  # another's key is another key
    assert copy(alice, source).status_code == 404


def test_a_copy_in_the_callers_session_takes_a_number_of_it(alice: httpx.Client) -> None:
    """As SDKs from 0.27 to 0.32 ask for it."""
    source = save(alice, trained_run(alice), 3, "w")
    session = alice.post("/api/v1/create_session", json={"project_id": "p"}).json()["session_id"]
    body = {"source_path": source, "session_id": session, "model_seq_id": 4}
    paths = {alice.post("/api/v1/copy_weights", json=body).json()["tinker_path"] for _ in range(2)}
    assert paths == {f"tinker://{session}:train:4/weights/w"}
    other = save(alice, trained_run(alice), 3, "w")
    refused = alice.post("/api/v1/copy_weights", json={**body, "source_path": other})
    assert refused.status_code == 400
    begin = {"session_id": session, "model_seq_id": 5, "path": next(iter(paths)), "optimizer": True}
    finish(alice, alice.post("/api/v1/load_weights", json=begin))
    taken = alice.post("/api/v1/copy_weights", json={**body, "model_seq_id": 5})
    assert taken.status_code == 400  # a run is there that trains


@pytest.mark.parametrize(
    "change",
    [
        {"destination_project_id": None},
        {"session_id": "s", "model_seq_id": 0},
        {"destination_project_id": None, "session_id": "s"},
        {"session_id": "s"},
        {"model_seq_id": 4},
        {"source_path": "tinker://x/y"},
    ],
)
def test_a_destination_is_one_of_two(alice: httpx.Client, change: dict[str, Any]) -> None:
    source = save(alice, trained_run(alice), 3, "w")
    assert copy(alice, source, **change).status_code == 400


def test_a_token_opens_its_owners_weights_for_reading(
    place: Place, alice: httpx.Client, bob: httpx.Client
) -> None:
    """It is an API key of the other owner: SDKs up to 0.36 also call weights_info with it as their own key."""
    source = save(alice, trained_run(alice), 3, "w")
    token = place.keys["alice"]
    assert copy(bob, source).status_code == 404
    path = copied(bob, source, token=token)
    assert row_of(bob, path)["checkpoint_type"] == "training"
    in_body = {"weights_access_token": token}
    assert copied(bob, source, **in_body) != path
    session = bob.post("/api/v1/create_session", json={}).json()["session_id"]
    begin = {"session_id": session, "model_seq_id": 0, "path": source, "optimizer": True}
    assert bob.post("/api/v1/load_weights", json=begin).status_code == 404
    begun = finish(bob, bob.post("/api/v1/load_weights", json={**begin, **in_body}))
    assert begun["path"] == source
    run_id = f"{session}:train:0"
    load = {"model_id": run_id, "seq_id": 1, "path": source, "optimizer": False}
    finish(bob, bob.post("/api/v1/load_weights", json={**load, **in_body}))
    without = bob.post("/api/v1/load_weights", json={**load, "seq_id": 2}).json()["request_id"]
    assert "there is no checkpoint" in outcome(bob, without)["error"]
    assert bob.delete(route_of(source)).status_code == 404  # for reading only


def test_an_unknown_token_is_said_and_not_shown(place: Place, alice: httpx.Client, bob: httpx.Client) -> None:
    source = save(alice, trained_run(alice), 3, "w")
    refused = copy(bob, source, token="tml-not-a-key-of-anybody")
    assert refused.status_code == 400
    assert refused.json()["param"] == "weights_access_token"
    log = place.gateway.log.read_text()
    assert "tml-not-a-key" not in refused.text + log


def test_the_official_sdk_reads_with_a_token(place: Place, alice: httpx.Client) -> None:
    source = save(alice, trained_run(alice), 3, "w")
    token = place.keys["alice"]
    with tinker.ServiceClient(base_url=place.url, api_key=place.keys["bob"], project_id="b") as service:
        with pytest.raises(tinker.NotFoundError):
            service.create_training_client_from_state(source).result()
        client = service.create_training_client_from_state(source, weights_access_token=token).result()
        assert client.get_info().lora_rank == 4
        path = service.copy_weights(source, weights_access_token=token).result()
        again = service.create_training_client_from_state_with_optimizer(path).result()
        assert again.get_info().model_data.model_name == "fake/model"
