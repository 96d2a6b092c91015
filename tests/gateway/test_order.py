"""A run's operations take effect in the order of their numbers, each once, however they arrive."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.gateway.conftest import begin_run, outcome, send_pass, send_step

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def final_loss(http: httpx.Client, run_id: str, seq_id: int) -> float:
    promise = send_pass(http, run_id, seq_id, TOKENS).json()
    return float(outcome(http, promise["request_id"])["metrics"]["loss:sum"])


def test_operations_that_arrive_out_of_order_run_in_order(http: httpx.Client) -> None:
    straight, shuffled = begin_run(http), begin_run(http)
    numbers = list(range(1, 13))
    for order, run_id in ((numbers, straight), (numbers[::-1], shuffled)):
        for seq_id in order:
            sent = (
                send_step(http, run_id, seq_id)
                if seq_id % 2 == 0
                else send_pass(http, run_id, seq_id, TOKENS)
            )
            assert sent.status_code == 200
    assert final_loss(http, straight, 13) == final_loss(http, shuffled, 13)


def test_a_promise_for_a_later_number_is_answered_before_the_earlier_arrives(http: httpx.Client) -> None:
    run_id = begin_run(http)
    later = send_step(http, run_id, 2)
    assert later.status_code == 200
    first = send_pass(http, run_id, 1, TOKENS)
    assert "metrics" in outcome(http, first.json()["request_id"])
    assert outcome(http, later.json()["request_id"])["type"] == "optim_step"


def test_a_repeated_submit_is_the_first_one(http: httpx.Client) -> None:
    once, often = begin_run(http), begin_run(http)
    for run_id, times in ((once, 1), (often, 8)):
        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _, run=run_id: send_pass(http, run, 1, TOKENS), range(times)))
        assert len({reply.json()["request_id"] for reply in replies}) == 1
        for _ in range(times):
            outcome(http, send_step(http, run_id, 2).json()["request_id"])
    assert final_loss(http, once, 3) == final_loss(http, often, 3)


def test_a_result_can_be_fetched_again(http: httpx.Client) -> None:
    run_id = begin_run(http)
    promise = send_pass(http, run_id, 1, TOKENS).json()
    assert outcome(http, promise["request_id"]) == outcome(http, promise["request_id"])


def test_a_rejected_operation_consumes_its_number(http: httpx.Client) -> None:
    run_id = begin_run(http)
    bad = send_step(http, run_id, 1, learning_rate="fast")
    good = send_pass(http, run_id, 2, TOKENS)
    failed = outcome(http, bad.json()["request_id"])
    assert failed["category"] == "user"
    assert "learning_rate" in failed["error"]
    assert "metrics" in outcome(http, good.json()["request_id"])


def test_what_waits_behind_a_missing_number_fails_and_names_it(http: httpx.Client) -> None:
    run_id = begin_run(http)
    waiting = [send_pass(http, run_id, 2, TOKENS), send_step(http, run_id, 3)]
    for promise in waiting:
        failed = outcome(http, promise.json()["request_id"])
        assert failed["category"] == "user"
        assert "operation 1 " in failed["error"]
    late = outcome(http, send_pass(http, run_id, 1, TOKENS).json()["request_id"])
    assert "came after" in late["error"]
    assert final_loss(http, run_id, 4) > 0


def test_runs_do_not_wait_for_each_others_order(http: httpx.Client) -> None:
    stuck, free = begin_run(http), begin_run(http)
    send_step(http, stuck, 5)
    assert final_loss(http, free, 1) > 0


def test_a_retried_creation_is_one_run(http: httpx.Client) -> None:
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 3, "base_model": "fake/model", "lora_config": {"rank": 4}}
    first, second = (http.post("/api/v1/create_model", json=body).json() for _ in range(2))
    assert first == second
    assert first["model_id"] == f"{session}:train:3"
    runs = http.get(f"/api/v1/sessions/{session}").json()["training_run_ids"]
    assert runs == [first["model_id"]]


def test_a_retried_session_is_one_session(http: httpx.Client) -> None:
    headers = {"X-Idempotency-Key": "the-same"}
    ids = {
        http.post("/api/v1/create_session", json={}, headers=headers).json()["session_id"] for _ in range(3)
    }
    assert len(ids) == 1


def save(http: httpx.Client, run_id: str, seq_id: int, **more: bool) -> str:
    body = {"model_id": run_id, "seq_id": seq_id, "path": "latest", **more}
    return str(http.post("/api/v1/save_weights", json=body).json()["request_id"])


def load(http: httpx.Client, run_id: str, seq_id: int) -> str:
    body = {
        "model_id": run_id,
        "seq_id": seq_id,
        "path": f"tinker://{run_id}/weights/latest",
        "optimizer": True,
    }
    return str(http.post("/api/v1/load_weights", json=body).json()["request_id"])


def test_nothing_is_loaded_that_is_still_to_be_replaced_before(http: httpx.Client) -> None:
    """The weights that the path has when the load arrives are not those that it has when its turn comes."""
    run_id = begin_run(http)
    outcome(http, save(http, run_id, 1))
    promises = [send_step(http, run_id, 4).json()["request_id"]]  # which waits for 2 and 3
    promises += [save(http, run_id, 5, overwrite=True), load(http, run_id, 6)]
    for seq_id in (2, 3):
        outcome(http, send_pass(http, run_id, seq_id, TOKENS).json()["request_id"])
    stepped, saved, loaded = (outcome(http, promise) for promise in promises)
    assert (stepped["type"], saved["type"], loaded["category"]) == ("optim_step", "save_weights", "user")
    assert "still to be saved, by operation 5 of this run" in loaded["error"]
    trained = final_loss(http, run_id, 7)
    outcome(http, send_step(http, run_id, 8).json()["request_id"])
    assert final_loss(http, run_id, 9) != trained
    assert outcome(http, load(http, run_id, 10))["type"] == "load_weights"
    assert final_loss(http, run_id, 11) == trained


def test_a_save_that_comes_later_does_not_keep_a_checkpoint_from_being_loaded(http: httpx.Client) -> None:
    run_id = begin_run(http)
    outcome(http, save(http, run_id, 1))
    later = save(http, run_id, 4, overwrite=True)
    loaded = load(http, run_id, 3)
    outcome(http, send_pass(http, run_id, 2, TOKENS).json()["request_id"])
    assert outcome(http, loaded)["type"] == "load_weights"
    assert outcome(http, later)["type"] == "save_weights"
