"""Calls of a REST client."""

from __future__ import annotations

import io
import tarfile
import time
from typing import Any

import tinker

from tests.compat.registry import check
from tests.compat.world import Call, resolved, train


def _run_id(path: str) -> str:
    return path.removeprefix("tinker://").split("/")[0]


def _checkpoint_id(path: str) -> str:
    return path.removeprefix("tinker://").split("/", 1)[1]


def _entry(call: Call, path: str) -> Any:
    """What the listing says of a checkpoint, or None."""
    listed = resolved(call.world.rest.list_checkpoints(_run_id(path))).checkpoints
    return next((item for item in listed if item.tinker_path == path), None)


@check("RestClient()")
def constructed(call: Call) -> None:
    client = tinker.RestClient(base_url=call.world.url, api_key=call.world.key)
    assert resolved(client.list_training_runs()).cursor.limit == 20


@check("RestClient.get_training_run", "RestClient.get_training_run_by_tinker_path")
def get_training_run(call: Call) -> None:
    path = call.world.trained_path
    by_path = "by_tinker_path" in call.name
    run = call(path if by_path else _run_id(path))
    assert run.training_run_id == _run_id(path) and run.base_model == call.world.base_model
    assert run.is_lora and run.lora_rank == 4 and not run.corrupted
    assert run.last_request_time.tzinfo is not None
    assert run.last_checkpoint.tinker_path.startswith(f"tinker://{run.training_run_id}/weights/")
    if call.accepts("access_scope"):
        scoped = call(path if by_path else _run_id(path), access_scope="accessible")
        assert scoped.training_run_id == _run_id(path)


@check("RestClient.list_training_runs")
def list_training_runs(call: Call) -> None:
    for _ in range(2):
        call.world.new_run(rank=1)
    first, second = call(limit=1), call(limit=1, offset=1)
    assert first.cursor.total_count >= 2 and (second.cursor.offset, second.cursor.limit) == (1, 1)
    (newest,), (older,) = first.training_runs, second.training_runs
    assert newest.training_run_id != older.training_run_id
    whole = [run.training_run_id for run in call(limit=2, **call.given(access_scope="owned")).training_runs]
    assert whole == [newest.training_run_id, older.training_run_id]
    if call.accepts("project_id"):
        assert call(project_id="no-such-project").training_runs == []


@check("RestClient.list_checkpoints")
def list_checkpoints(call: Call) -> None:
    path = call.world.new_checkpoint()
    (entry,) = [item for item in call(_run_id(path)).checkpoints if item.tinker_path == path]
    assert entry.checkpoint_id == _checkpoint_id(path) and entry.checkpoint_type == "training"
    assert entry.time.tzinfo is not None and abs(entry.time.timestamp() - time.time()) < 60


@check("RestClient.list_user_checkpoints")
def list_user_checkpoints(call: Call) -> None:
    paths = [call.world.new_checkpoint() for _ in range(3)][::-1]
    page = call(limit=2, offset=1)
    assert [item.tinker_path for item in page.checkpoints] == paths[1:]
    assert page.cursor.total_count >= 3


@check("RestClient.delete_checkpoint", "RestClient.delete_checkpoint_from_tinker_path")
def delete_checkpoint(call: Call) -> None:
    path = call.world.new_checkpoint()
    assert _entry(call, path) is not None
    arguments = (path,) if "from_tinker_path" in call.name else (_run_id(path), _checkpoint_id(path))
    assert call(*arguments) is None
    assert _entry(call, path) is None


@check("RestClient.publish_checkpoint_from_tinker_path", "RestClient.unpublish_checkpoint_from_tinker_path")
def publish(call: Call) -> None:
    path = call.world.new_checkpoint()
    wanted = call.name.startswith("publish")
    if not wanted:
        resolved(call.target.publish_checkpoint_from_tinker_path(path))
    for _ in range(2):  # twice is as once
        assert call(path) is None
        assert _entry(call, path).public is wanted


@check("RestClient.set_checkpoint_ttl_from_tinker_path")
def set_ttl(call: Call) -> None:
    path = call.world.new_checkpoint()
    assert call(path, 7200) is None
    expires = _entry(call, path).expires_at
    assert expires is not None and abs(expires.timestamp() - time.time() - 7200) < 60
    assert call(path, None) is None
    assert _entry(call, path).expires_at is None


@check(
    "RestClient.get_checkpoint_archive_url",
    "RestClient.get_checkpoint_archive_url_from_tinker_path",
    "RestClient.download_checkpoint_archive",
    "RestClient.download_checkpoint_archive_from_tinker_path",
)
def archive(call: Call) -> None:
    path = call.world.sampler_path
    arguments = (path,) if "from_tinker_path" in call.name else (_run_id(path), _checkpoint_id(path))
    result = call(*arguments)
    content = result if isinstance(result, bytes) else call.world.download(result.url)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        names = {member.name.removeprefix("./") for member in tar.getmembers()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names, names
    if not isinstance(result, bytes):
        assert result.expires.timestamp() > time.time()


@check("RestClient.get_external_weights_urls")
def external_urls(call: Call) -> None:
    path = resolved(call.world.trained.save_weights_external(call.world.name())).path
    answer = call(path)
    assert answer.expires.tzinfo is not None and answer.expires.timestamp() > time.time()
    for url in answer.urls.values():
        assert call.world.download(url)


@check("RestClient.get_sampler")
def get_sampler(call: Call) -> None:
    sampler = resolved(call.world.service.create_sampling_client(model_path=call.world.sampler_path))
    session_id = call.world.service.holder.get_session_id()
    ids = resolved(call.target.get_session(session_id)).sampler_ids
    found = [call(sampler_id) for sampler_id in ids]
    assert all(entry.base_model == call.world.base_model for entry in found)
    assert call.world.sampler_path in [entry.model_path for entry in found]
    assert sampler is not None


@check("RestClient.list_sessions", "RestClient.get_session")
def sessions(call: Call) -> None:
    run_id = resolved(call.world.run.get_info()).model_id
    session_id = run_id.split(":train:")[0]
    if call.name.startswith("list"):
        assert session_id in call(limit=100).sessions
        assert len(call(limit=1, **call.given(access_scope="owned")).sessions) == 1
        return
    session = call(session_id)
    assert run_id in session.training_run_ids
    if call.accepts("access_scope"):
        assert call(session_id, access_scope="accessible").training_run_ids == session.training_run_ids


@check("RestClient.get_weights_info_by_tinker_path")
def weights_info(call: Call) -> None:
    info = call(call.world.trained_path)
    assert (info.base_model, info.is_lora, info.lora_rank) == (call.world.base_model, True, 4)


@check("RestClient.assign_session_project")
def assign_project(call: Call) -> None:
    run = call.world.new_run(rank=1)
    run_id = resolved(run.get_info()).model_id
    assert call(run_id.split(":train:")[0], "compat-project") is None
    listed = resolved(call.target.list_training_runs(project_id="compat-project")).training_runs
    assert run_id in [entry.training_run_id for entry in listed]


@check("RestClient.export_session_trace")
def export_trace(call: Call) -> None:
    train(call.world.run)
    run_id = resolved(call.world.run.get_info()).model_id
    url = call(run_id.split(":train:")[0])
    assert call.world.download(url)


@check("RestClient.search_sessions")
def search_sessions(call: Call) -> None:
    label = call.world.name("searched")
    service = call.world.new_service(display_name=label, user_metadata={"label": label})
    resolved(service.create_sampling_client(base_model=call.world.base_model))
    for request in ({"display_name": label}, {"user_metadata": {"label": label}}):
        found = call(tinker.types.SessionSearchRequest(**request))
        (summary,) = found.sessions
        assert summary.display_name == label and summary.checkpoints_count == 0


@check("RestClient.whoami")
def whoami(call: Call) -> None:
    identity = call()
    assert identity.user_urn
    if "org_urn" in type(identity).model_fields:
        assert identity.org_urn.startswith("tml:organization:"), identity
