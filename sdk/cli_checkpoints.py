"""`tandem checkpoints`: saved weights, listed, taken out as files, and deleted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from sdk.admin import AdminError, checkpoint_route
from sdk.cli_layout import size
from sdk.cli_rows import CHECKPOINTS, checkpoint_row
from sdk.cli_view import Refused, Unanswered, View, asks_gateway, lists, refuse_given
from sdk.exports import ExportFailed


@click.group(invoke_without_command=True)
@click.option("--run", "run_id", metavar="ID", help="Only those of this run.")
@click.option(
    "--kind", type=click.Choice(["weights", "sampler_weights"]), help="To train on, or to sample from."
)
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
