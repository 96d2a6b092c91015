"""Every route that takes an id, each called with an id of somebody else's."""

from __future__ import annotations

from typing import Any

from tests.gateway.conftest import json_datum

TOKENS = [3, 1, 4, 1, 5]
SIGNED = {
    "/api/v1/downloads/{version}/{run_id}/{kind}/{name}/{file}",
    "/api/v1/sessions/{session_id}/trace",
}
CUSTOM_LOSS = {"name": "mine", "inputs": [], "graph": {"format": 1, "nodes": []}}


def foreign_posts(things: dict[str, str], own_session: str) -> list[tuple[str, Any]]:
    """Every route of the Tinker dialect whose body has an id, with one of somebody else's."""
    run, session, path = things["run"], things["session"], things["path"]
    numbered = {"model_id": run, "seq_id": 9}
    sample = {"seq_id": 0, "prompt": {"chunks": [{"tokens": [1]}]}}
    passing = {"data": [json_datum(TOKENS)], "loss_fn": "cross_entropy"}
    created = {"model_seq_id": 5, "base_model": "fake/model"}
    return [
        ("create_model", {"session_id": session, **created}),
        ("get_info", {"model_id": run}),
        ("forward_backward", {**numbered, "forward_backward_input": passing}),
        ("forward", {**numbered, "forward_input": passing}),
        ("optim_step", numbered),
        ("unload_model", {"model_id": run}),
        ("save_weights", {**numbered, "path": "stolen"}),
        ("save_weights_for_sampler", {**numbered, "path": "stolen"}),
        ("load_weights", {**numbered, "path": path}),
        ("load_weights", {"session_id": own_session, "model_seq_id": 3, "path": path}),
        ("load_weights", {"session_id": session, "model_seq_id": 3, "path": path}),
        ("weights_info", {"tinker_path": path}),
        (
            "create_sampling_session",
            {"session_id": own_session, "sampling_session_seq_id": 8, "model_path": path},
        ),
        (
            "create_sampling_session",
            {"session_id": session, "sampling_session_seq_id": 8, "base_model": "fake/model"},
        ),
        ("asample", {"sampling_session_id": things["sampler"], **sample}),
        ("retrieve_future", {"request_id": things["future"]}),
        ("retrieve_future", {"request_id": f"{run}:unload"}),
        ("session_heartbeat", {"session_id": session}),
        (f"sessions/{session}/finish", {}),
        (f"training_runs/{run}/checkpoints/weights/mine/publish", None),
        ("save_weights_external", {**numbered, "path": "stolen"}),
        ("copy_weights", {"source_path": path, "destination_project_id": "p"}),
        ("create_custom_loss", {"session_id": session, "custom_loss_seq_id": 0, **CUSTOM_LOSS}),
        ("cancel_future", {"request_id": things["future"]}),
        ("join_sampling_session", {"sampling_session_id": things["sampler"]}),
        (
            "retrieve_futures",
            {"target": {"type": "sampling_session", "sampling_session_id": things["sampler"]}, "timeout": 0},
        ),
    ]


def foreign_requests(things: dict[str, str], own_session: str) -> list[tuple[str, str, Any]]:
    """Every route that takes an id, each with an id of somebody else's."""
    run, session, path = things["run"], things["session"], things["path"]
    checkpoint = f"{run}/weights/mine"
    tinker = "/api/v1"
    named = f"{tinker}/training_runs/{run}/checkpoints/weights/mine"
    return [
        *(("POST", f"{tinker}/{route}", body) for route, body in foreign_posts(things, own_session)),
        ("GET", f"{tinker}/samplers/{things['sampler']}", None),
        ("GET", f"{tinker}/sessions/{session}", None),
        ("GET", f"{tinker}/training_runs/{run}", None),
        ("GET", f"{tinker}/training_runs/{run}/checkpoints", None),
        ("GET", f"{tinker}/models/{run}/checkpoints", None),
        ("GET", f"{named}/archive", None),
        ("GET", f"{named}/external_weights_urls", None),
        ("GET", f"{tinker}/sessions/{session}/trace_export", None),
        ("PUT", f"{tinker}/sessions/{session}/project", {"project_id": "p"}),
        ("DELETE", f"{named}/publish", None),
        ("PUT", f"{named}/ttl", {"ttl_seconds": 7200}),
        ("DELETE", named, None),
        ("GET", f"/admin/v1/runs/{run}", None),
        ("GET", f"/admin/v1/runs/{run}/metrics", None),
        ("GET", f"/admin/v1/runs/{run}/snapshots", None),
        ("GET", f"/admin/v1/sessions/{session}", None),
        ("GET", f"/admin/v1/futures/{things['future']}", None),
        ("GET", f"/admin/v1/samplers/{things['sampler']}", None),
        ("POST", f"/admin/v1/samplers/{things['sampler']}/promote", {"name": "stolen"}),
        ("POST", f"/admin/v1/samplers/{things['sampler']}/compare", {}),
        ("GET", f"/admin/v1/checkpoints/{checkpoint}", None),
        ("DELETE", f"/admin/v1/checkpoints/{checkpoint}", None),
        *(("GET", f"{prefix}/models/{path}", None) for prefix in ("/v1", "/oai/api/v1")),
        *(
            ("POST", f"{prefix}/{route}", {"model": path, **body})
            for prefix in ("/v1", "/oai/api/v1")
            for route, body in (
                ("completions", {"prompt": "a"}),
                ("chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            )
        ),
    ]
