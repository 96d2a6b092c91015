"""The `tinker` command line: every command, run in this process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
from click.testing import CliRunner

from tests.compat.registry import BrokenInSdk, check
from tests.compat.surface import command_group
from tests.compat.world import Call, resolved


def run(*arguments: str) -> str:
    """What a command prints; it must end well."""
    result = CliRunner().invoke(command_group(), [*arguments], catch_exceptions=True)
    if result.exit_code != 0:
        details = getattr(result.exception, "details", "")
        message = getattr(result.exception, "message", result.exception)
        raise AssertionError(f"exit code {result.exit_code}: {message} {details} {result.output}")
    return result.stdout


def json_of(*arguments: str) -> Any:
    """What a command prints as JSON."""
    printed = run("--format", "json", *arguments)
    return json.loads(printed[min(printed.find(mark) % (1 << 60) for mark in "{[") :])


def _run_id(path: str) -> str:
    return path.removeprefix("tinker://").split("/")[0]


@check("tinker version")
def version(call: Call) -> None:
    assert "tinker" in run("version")


@check("tinker model list")
def model_list(call: Call) -> None:
    assert call.world.base_model in run("--format", "json", "model", "list")


@check("tinker run list", "tinker run info")
def runs(call: Call) -> None:
    run_id = _run_id(call.world.trained_path)
    arguments = ("list", "--limit", "0") if call.name.endswith("list") else ("info", run_id)
    assert run_id in json.dumps(json_of("run", *arguments))
    assert run("run", *arguments)  # as a table


@check("tinker checkpoint list", "tinker checkpoint info")
def checkpoints(call: Call) -> None:
    path = call.world.trained_path
    if call.name.endswith("info"):
        assert path in json.dumps(json_of("checkpoint", "info", path))
        return
    assert path in json.dumps(json_of("checkpoint", "list", "--run-id", _run_id(path)))
    assert path in json.dumps(json_of("checkpoint", "list", "--limit", "0"))
    assert run("checkpoint", "list")


def _listed(call: Call, path: str) -> Any:
    entries = resolved(call.world.rest.list_checkpoints(_run_id(path))).checkpoints
    return next((entry for entry in entries if entry.tinker_path == path), None)


@check("tinker checkpoint publish", "tinker checkpoint unpublish")
def publish(call: Call) -> None:
    path = call.world.new_checkpoint()
    run("checkpoint", "publish", path)
    assert _listed(call, path).public is True
    if call.name.endswith("unpublish"):
        run("checkpoint", "unpublish", path)
        assert _listed(call, path).public is False


@check("tinker checkpoint set-ttl")
def set_ttl(call: Call) -> None:
    path = call.world.new_checkpoint()
    run("checkpoint", "set-ttl", path, "--ttl", "7200")
    assert _listed(call, path).expires_at is not None
    run("checkpoint", "set-ttl", path, "--remove")
    assert _listed(call, path).expires_at is None


@check("tinker checkpoint delete")
def delete(call: Call) -> None:
    """By path; where the SDK's own `list` command hides Python's list, which paths go through, by run."""
    from tinker.cli.commands import checkpoint

    path = str(resolved(call.world.new_run(rank=1).save_state(call.world.name())).path)
    hidden = isinstance(getattr(checkpoint, "list", None), click.Command)
    by_run = hidden and "--run-id" in run("checkpoint", "delete", "--help")
    run("checkpoint", "delete", *(("--run-id", _run_id(path)) if by_run else (path,)), "--yes")
    assert _listed(call, path) is None


@check("tinker checkpoint download")
def download(call: Call) -> None:
    folder = call.world.scratch / call.world.name("download")
    run("checkpoint", "download", _downloadable(call), "--output", str(folder))
    names = {file.name for file in folder.rglob("*")}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names, names


def _downloadable(call: Call) -> str:
    """What this version downloads: archives of sampler weights first, exports of training weights later."""
    from tinker.cli.commands import checkpoint

    exports = hasattr(checkpoint, "_download_external_weights")
    return call.world.trained_path if exports else call.world.sampler_path


@check("tinker checkpoint push-hf")
def push_hf(call: Call) -> None:
    """With a hub that only remembers what it was given."""
    from tinker.cli.commands import checkpoint

    hidden = getattr(checkpoint, "list", None)
    if not isinstance(hidden, click.Command):
        _push(call)
        return
    with pytest.raises(AssertionError, match="Usage:"):  # what click says when `list` is called with patterns
        _push(call)
    with mock.patch.object(checkpoint, "list", list):
        _push(call)
    raise BrokenInSdk(
        "the module's command `list` hides Python's `list`, which it calls right before the upload"
    )


def _push(call: Call) -> None:
    with _hub(call.world.scratch / call.world.name("hub")) as given:
        run("checkpoint", "push-hf", _downloadable(call), "--repo", "someone/adapter")
        names = {file.name for file in given.rglob("*")}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names, names


@contextmanager
def _hub(folder: Path) -> Iterator[Path]:
    import huggingface_hub

    def upload_folder(self: Any, *, folder_path: str, **options: Any) -> None:
        shutil.copytree(folder_path, folder)

    hub = mock.create_autospec(huggingface_hub.HfApi)
    hub.return_value.upload_folder.side_effect = lambda **options: upload_folder(None, **options)
    missing = mock.Mock(side_effect=FileNotFoundError("an empty repository"))
    with (
        mock.patch.object(huggingface_hub, "HfApi", hub),
        mock.patch.object(huggingface_hub, "hf_hub_download", missing),
    ):
        yield folder


@check("tinker session export-trace")
def export_trace(call: Call) -> None:
    session_id = _run_id(call.world.trained_path).split(":train:")[0]
    file = call.world.scratch / call.world.name("trace")
    run("session", "export-trace", session_id, "--output", str(file))
    assert any(found.is_file() for found in [file, *file.rglob("*")])


@check("tinker billing usage")
def billing_usage(call: Call) -> None:
    assert call.world.trained_logprobs
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    window = [(hour + timedelta(hours=hours)).isoformat().replace("+00:00", "Z") for hours in (-1, 1)]
    assert json_of("billing", "usage", *window)["data"]
    assert run("billing", "usage", *window)


@check("tinker billing checkpoint-storage")
def billing_storage(call: Call) -> None:
    assert call.world.trained_path
    assert json_of("billing", "checkpoint-storage")["data"]


@check("tinker auth status")
def auth_status(call: Call) -> None:
    assert "accessible: yes" in run("auth", "status")


@check("tinker auth whoami")
def auth_whoami(call: Call) -> None:
    assert json_of("auth", "whoami")["user_urn"]


@check("tinker auth login", "tinker auth logout")
def auth_login(call: Call) -> None:
    """Stores the key that was typed, with what the gateway says of it; then removes it again."""
    from tinker.cli import login
    from tinker.lib import credentials

    file = call.world.scratch / call.world.name("credentials")
    # 0.27 asks a browser unless it is told to ask for the key, with click; later ones ask for the key, themselves
    asks_itself = hasattr(login, "prompt_api_key")
    typed = mock.Mock(return_value=call.world.key)
    asking = (
        mock.patch.object(login, "prompt_api_key", typed)
        if asks_itself
        else mock.patch("click.prompt", typed)
    )
    with mock.patch.object(credentials, "default_credentials_path", lambda: file), asking:
        assert run("auth", "login", *(() if asks_itself else ("--api-key",)))
        assert call.world.key in file.read_text()
        assert "Removed credential" in run("auth", "logout")
        assert call.world.key not in file.read_text()
