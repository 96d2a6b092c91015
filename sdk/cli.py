"""The `tandem` command: start a gateway, and look at what one holds and does.

Exit codes: 0 done, 1 the gateway refused or the question was declined, 2 the command line is wrong, 3 no gateway
answers.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from click.core import ParameterSource

from sdk.admin import AdminClient, AdminError, checkpoint_route
from sdk.cli_layout import Column, Row, console_of, size
from sdk.cli_rows import (
    CHECKPOINTS,
    ENGINES,
    FUTURES,
    RUNS,
    SESSIONS,
    STEPS,
    checkpoint_row,
    engine_row,
    future_row,
    plot_text,
    run_row,
    session_row,
    show_list,
    show_run,
    step_row,
)
from sdk.environment import DEFAULT_URL, client_environment, gateway_environment, is_loopback

T = TypeVar("T")

_SAVED_SHOWN = 5


class Refused(click.ClickException):
    """The gateway's own sentence, in one line on standard error."""

    exit_code = 1


class Unanswered(click.ClickException):
    """There is no gateway, in one line on standard error."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class View:
    """What a command works with: the gateway it asks, and how it is to answer."""

    client: AdminClient
    as_json: bool

    def listed(
        self,
        things: Iterable[T],
        columns: Sequence[Column],
        row: Callable[[T], Row],
        limit: int | None,
        none: str,
    ) -> None:
        """Show at most `limit` things, all when it is None; `none` is said when there are none."""
        found = list(itertools.islice(things, None if limit is None else limit + 1))
        shown = found if limit is None else found[:limit]
        if self.as_json:
            self.json(shown)
        elif shown:
            show_list(console_of(), columns, [row(thing) for thing in shown])
        else:
            click.echo(none, err=True)
        if len(found) > len(shown):
            click.echo(f"The newest {limit} are shown; there are more, see --limit and --all.", err=True)

    def json(self, answer: Any) -> None:
        """For machines."""
        click.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2))


def asks_gateway(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --url, --key and --json; it gets a View as its first argument."""

    @click.option("--url", help=f"Where the gateway answers.  [TANDEM_URL, else {DEFAULT_URL}]")
    @click.option("--key", help="API key; on a shared machine rather set TANDEM_API_KEY.")
    @click.option("--json", "as_json", is_flag=True, help="JSON for programs.")
    @functools.wraps(command)
    def asking(url: str | None, key: str | None, as_json: bool, **arguments: Any) -> None:
        environment = client_environment()
        try:
            with AdminClient(
                url or _of_group("url") or environment.url, key or _of_group("key") or environment.key
            ) as client:
                command(View(client, as_json or bool(_of_group("as_json"))), **arguments)
        except AdminError as error:
            raise (Unanswered if error.status is None else Refused)(str(error)) from error

    return asking


def _of_group(option: str) -> Any:
    """An option that stands before the subcommand: `tandem checkpoints --url … delete …`."""
    group = click.get_current_context().parent
    return group.params.get(option) if group is not None else None


def _refuse_given(*parameters: str, beside: str, context: click.Context | None = None) -> None:
    """Refuse options that would change nothing, rather than let them look obeyed. Raises UsageError."""
    context = context or click.get_current_context()
    given = [
        max(option.opts, key=len)
        for option in context.command.params
        if option.name in parameters
        and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"{', '.join(given)}: only for lists, not beside {beside}.", context)


def lists(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command --owner, --limit and --all; it gets `owner` and `limit`, None for everything."""

    @click.option("--owner", help="Only what belongs to this owner; for an admin's key.")
    @click.option(
        "--limit", "-n", type=click.IntRange(1), default=20, show_default=True, help="The newest so many."
    )
    @click.option("--all", "everything", is_flag=True, help="No limit.")
    @functools.wraps(command)
    def listing(*arguments: Any, limit: int, everything: bool, **named: Any) -> None:
        command(*arguments, limit=None if everything else limit, **named)

    return listing


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tandem-gateway", prog_name="tandem")
def main() -> None:
    """Train and sample adapters on shared base models, on your own machines.

    Start a gateway with `tandem serve`; the other commands look at one that is running. Without API keys a gateway
    serves programs on its own machine only.
    """


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings file, TOML."
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Data folder.  [the settings', else ./data]",
)
def serve(host: str, port: int, config: Path | None, data: Path | None) -> None:
    """Start a gateway with its engines; Ctrl-C ends it.

    What is not given here comes from the settings, see docs/settings.md.
    """
    if not is_loopback(host):
        click.echo(
            f"Listening on {host}: other machines can connect. While there are no API keys the gateway refuses "
            "them (403); make keys with `python -m gateway.keys add OWNER`.",
            err=True,
        )
    # Every client polls, so a line for each request would bury what matters in the log; `tandem futures` has the calls.
    command = [sys.executable, "-m", "uvicorn", "gateway.app:app", "--host", host, "--port", str(port)]
    sys.stdout.flush()
    os.execve(sys.executable, [*command, "--no-access-log"], gateway_environment(config, data))


@main.command()
@click.argument("run_id", required=False, metavar="[ID]")
@click.option("--status", type=click.Choice(["creating", "active", "failed", "unloaded"]))
@click.option("--model", help="Only those on this base model.")
@click.option(
    "--steps", type=click.IntRange(1), default=10, show_default=True, help="With ID: the last so many."
)
@lists
@asks_gateway
def runs(
    view: View,
    run_id: str | None,
    status: str | None,
    model: str | None,
    steps: int,
    owner: str | None,
    limit: int | None,
) -> None:
    """Who trains what; with ID one run, its metrics by step and its loss as a plot."""
    if run_id is not None:
        _refuse_given("status", "model", "owner", "limit", "everything", beside="an ID")
        _show_one_run(view, run_id, steps)
        return
    found = view.client.runs(owner=owner, status=status, base_model=model)
    view.listed(found, RUNS, run_row, limit, "There are no such runs.")


def _show_one_run(view: View, run_id: str, last: int) -> None:
    run = view.client.run(run_id)
    steps = list(view.client.steps(run_id))
    saved = list(view.client.checkpoints(run_id=run_id))
    if view.as_json:
        view.json({"run": run, "steps": steps, "checkpoints": saved})
        return
    console = console_of()
    show_run(console, run, saved[:_SAVED_SHOWN])
    if len(saved) > _SAVED_SHOWN:
        click.echo(f"{len(saved) - _SAVED_SHOWN} more: tandem checkpoints --run {run_id}", err=True)
    if steps:
        click.echo()
        show_list(console, STEPS, [step_row(step) for step in steps[-last:]])
    plot = plot_text(steps, console.width)
    if plot is not None:
        click.echo(f"\n{plot}")


@main.group(invoke_without_command=True)
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
        _refuse_given(*filters, beside=repr(context.invoked_subcommand), context=context)
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


@main.command()
@asks_gateway
def engines(view: View) -> None:
    """The engine processes: what they serve, and whether they are well."""
    view.listed(view.client.engines(), ENGINES, engine_row, None, "There are no engines.")


@main.command()
@click.option("--status", type=click.Choice(["queued", "running", "done", "failed"]))
@click.option("--kind", help="Only calls of this kind: forward_backward, optim_step, sample …")
@click.option("--run", "run_id", metavar="ID", help="Only those of this run.")
@click.option("--engine", help="Only those of this engine.")
@lists
@asks_gateway
def futures(
    view: View,
    status: str | None,
    kind: str | None,
    run_id: str | None,
    engine: str | None,
    owner: str | None,
    limit: int | None,
) -> None:
    """Accepted calls: how long they waited and ran, and why they failed."""
    found = view.client.futures(owner=owner, status=status, kind=kind, run_id=run_id, engine=engine)
    view.listed(found, FUTURES, future_row, limit, "There are no such calls.")


@main.command()
@lists
@asks_gateway
def sessions(view: View, owner: str | None, limit: int | None) -> None:
    """Connected clients, and those that were."""
    view.listed(view.client.sessions(owner=owner), SESSIONS, session_row, limit, "There are no sessions.")


if __name__ == "__main__":
    main()
