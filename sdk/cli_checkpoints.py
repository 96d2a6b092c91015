"""`tandem checkpoints` and `tandem samplers`: saved weights, and what can be done with them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from sdk.admin import AdminError, checkpoint_route
from sdk.cli_layout import console_of, size
from sdk.cli_rows import CHECKPOINTS, SAMPLERS, checkpoint_row, sampler_row, show_list
from sdk.cli_view import Refused, Unanswered, View, asks_gateway, lists, refuse_given
from sdk.exports import ExportFailed

_KINDS = click.Choice(["weights", "sampler_weights", "external_weights"])
_SHOWN = 20


@click.group(invoke_without_command=True)
@click.option("--run", "run_id", metavar="ID", help="Only those of this run.")
@click.option("--kind", type=_KINDS, help="To train on, to sample from, or files to download.")
@click.option("--model", help="Only those on this base model.")
@lists
@asks_gateway
@click.pass_context
def checkpoints(
    context: click.Context,
    view: View,
    run_id: str | None,
    kind: str | None,
    model: str | None,
    owner: str | None,
    limit: int | None,
) -> None:
    """Saved weights, by the tinker:// paths that clients load them with."""
    if context.invoked_subcommand is not None:
        filters = ("run_id", "kind", "model", "owner", "limit", "everything")
        refuse_given(*filters, beside=repr(context.invoked_subcommand), context=context)
    else:
        found = view.client.checkpoints(owner=owner, run_id=run_id, kind=kind, base_model=model)
        view.listed(found, CHECKPOINTS, checkpoint_row, limit, "There are no such checkpoints.")


class CheckpointPath(click.ParamType[str]):
    """A tinker:// path, refused before anything is asked."""

    name = "path"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            checkpoint_route(value)
        except AdminError as error:
            self.fail(str(error), param, ctx)
        return value


class Moment(click.ParamType[datetime]):
    """A date or time in ISO 8601; one without a zone is UTC."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time; one looks like 2026-01-31 or 2026-01-31T12:00:00Z", param, ctx)
        return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


@checkpoints.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=CheckpointPath())
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@asks_gateway
def delete(view: View, paths: Sequence[str], yes: bool) -> None:
    """Delete checkpoints for good.

    Runs that began at one and samplers made from it are not affected. When one of several cannot be deleted the others
    are deleted all the same.
    """
    found = [view.client.checkpoint(path) for path in paths]
    if not yes:
        for checkpoint in found:
            click.echo(f"{checkpoint.path} ({size(checkpoint.size_bytes)})", err=True)
        click.confirm("Delete for good?", abort=True, err=True)
    deleted, failed = _delete_each(view, list(dict.fromkeys(paths)))
    if view.as_json:
        view.json({"deleted": deleted, "failed": {path: str(error) for path, error in failed.items()}})
    if failed:
        unanswered = all(error.status is None for error in failed.values())
        kept = f"{len(failed)} of {len(deleted) + len(failed)} not deleted."
        raise (Unanswered if unanswered else Refused)(kept)


def _delete_each(view: View, paths: Sequence[str]) -> tuple[list[str], dict[str, AdminError]]:
    """Delete, saying of each path what became of it; what was deleted, and what was not with the reason."""
    deleted: list[str] = []
    failed: dict[str, AdminError] = {}
    for path in paths:
        try:
            view.client.delete_checkpoint(path)
        except AdminError as error:
            failed[path] = error
            click.echo(f"not deleted: {path}: {error}", err=True)
        else:
            deleted.append(path)
            click.echo(f"deleted: {path}", err=True)
    return deleted, failed


@checkpoints.command()
@click.argument("path", metavar="PATH", type=CheckpointPath())
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--base-model",
    help="Written as base_model_name_or_path; a name or a folder that the reader can load.  [the served name]",
)
@asks_gateway
def export(view: View, path: str, folder: Path, base_model: str | None) -> None:
    """Write the adapter of a checkpoint into FOLDER, as PEFT and vLLM read it.

    FOLDER must be new or empty.
    """
    try:
        exported = view.client.export_checkpoint(path, folder, base_model=base_model)
    except ExportFailed as error:
        raise Refused(str(error)) from error
    if view.as_json:
        view.json(exported)
        return
    for name, count in exported.files.items():
        click.echo(f"{folder / name}  ({size(count)})")
    click.echo(f"base model: {exported.base_model}")


@checkpoints.command()
@click.option("--run", "run_id", metavar="ID", help="Of this run.")
@click.option("--kind", type=_KINDS, help="Of this kind.")
@click.option("--model", "base_model", help="On this base model.")
@click.option("--prefix", "name_prefix", help="Whose names begin so.")
@click.option("--before", type=Moment(), help="Saved before then.")
@click.option("--after", type=Moment(), help="Saved then or later.")
@click.option(
    "--keep-last", type=click.IntRange(0), default=0, help="But not the newest so many of each run and kind."
)
@click.option("--owner", help="Of this owner; for an admin's key.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say which.")
@asks_gateway
def prune(view: View, yes: bool, dry_run: bool, **selection: Any) -> None:
    """Delete checkpoints for good by what they are; at least one condition besides --owner is needed.

    `tandem checkpoints prune --run ID --keep-last 3` keeps the newest three of each kind.
    """
    found = view.client.delete_checkpoints(**selection, dry_run=True)
    if not view.as_json:
        for path in found.paths[:_SHOWN]:
            click.echo(path, err=True)
        if len(found.paths) > _SHOWN:
            click.echo(f"… and {len(found.paths) - _SHOWN} more", err=True)
    if dry_run or not found.paths:
        deletion = found
    else:
        if not yes:
            click.confirm(
                f"Delete {len(found.paths)} for good ({size(found.size_bytes)})?", abort=True, err=True
            )
        deletion = view.client.delete_checkpoints(**selection)
    if view.as_json:
        view.json(deletion)
        return
    would = "would be deleted" if dry_run else "deleted"
    click.echo(f"{len(deletion.paths)} {would}, {size(deletion.size_bytes)}.", err=True)
    if deletion.more:
        click.echo("There are more of them: run it again.", err=True)


@checkpoints.command("import")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--model", "base_model", required=True, help="The base model it was trained on, as it is served."
)
@click.option("--name", required=True, help="Of the checkpoint.")
@click.option("--ttl", "ttl_seconds", type=click.IntRange(3600), help="Seconds after which it expires.")
@asks_gateway
def import_folder(view: View, folder: Path, base_model: str, name: str, ttl_seconds: int | None) -> None:
    """Make a checkpoint of an adapter in PEFT's format, trained elsewhere.

    FOLDER holds `adapter_config.json` and `adapter_model.safetensors`. Runs can begin at the checkpoint, and it can be
    sampled.
    """
    made = view.client.import_adapter(folder, base_model=base_model, name=name, ttl_seconds=ttl_seconds)
    if view.as_json:
        view.json(made)
        return
    click.echo(made.checkpoint.path)
    lora = made.checkpoint.lora
    text = f"rank {lora.rank}, alpha {lora.alpha:g}, {made.layers - made.zero_layers} layers"
    if made.zero_layers:
        text += f"; {made.zero_layers} more of the same parts, which the adapter leaves alone, are zeros"
    click.echo(text + ".", err=True)


@click.group(invoke_without_command=True)
@click.option("--run", "run_id", metavar="ID", help="Only those with weights of this run.")
@click.option("--session", "session_id", metavar="ID", help="Only those of this session.")
@lists
@asks_gateway
@click.pass_context
def samplers(
    context: click.Context,
    view: View,
    run_id: str | None,
    session_id: str | None,
    owner: str | None,
    limit: int | None,
) -> None:
    """What clients sample from: base models, checkpoints, and weights that have no name."""
    if context.invoked_subcommand is not None:
        filters = ("run_id", "session_id", "owner", "limit", "everything")
        refuse_given(*filters, beside=repr(context.invoked_subcommand), context=context)
    else:
        found = view.client.samplers(owner=owner, run_id=run_id, session_id=session_id)
        view.listed(found, SAMPLERS, sampler_row, limit, "There are no such samplers.")


@samplers.command()
@click.argument("sampler_id", metavar="ID")
@click.argument("name")
@click.option("--ttl", "ttl_seconds", type=click.IntRange(3600), help="Seconds after which it expires.")
@asks_gateway
def promote(view: View, sampler_id: str, name: str, ttl_seconds: int | None) -> None:
    """Give the weights of an unnamed sampler a name, so that they are a checkpoint."""
    checkpoint = view.client.promote_sampler(sampler_id, name, ttl_seconds=ttl_seconds)
    if view.as_json:
        view.json(checkpoint)
    else:
        show_list(console_of(), CHECKPOINTS, [checkpoint_row(checkpoint)])
