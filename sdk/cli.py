"""The `tandem` command: start a gateway, and look at what one holds and does.

Exit codes: 0 done, 1 the gateway refused or the question was declined, 2 the command line is wrong, 3 no gateway
answers.
"""

from __future__ import annotations

import itertools

import click

from sdk.admin import AdminError
from sdk.admin_records import Run
from sdk.cli_checkpoints import checkpoints, samplers
from sdk.cli_gateway import keys, serve, stop
from sdk.cli_layout import console_of
from sdk.cli_rows import (
    ENGINES,
    FUTURES,
    RUNS,
    SESSIONS,
    STEPS,
    engine_row,
    future_row,
    plot_text,
    run_row,
    session_row,
    show_list,
    show_run,
    step_row,
)
from sdk.cli_view import View, asks_gateway, lists, refuse_given

_SAVED_SHOWN = 5
_SEARCHED = 1000
_NOT_FOUND = 404


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tandem-gateway", prog_name="tandem")
def main() -> None:
    """Train and sample adapters on shared base models, on your own machines.

    Start a gateway with `tandem serve`; the other commands look at one that is running. Without API keys a gateway
    serves programs on its own machine only.
    """


for command in (serve, stop, keys, checkpoints, samplers):
    main.add_command(command)


@main.command()
@click.argument("run_id", required=False, metavar="[ID]")
@click.option("--status", type=click.Choice(["creating", "active", "failed", "unloaded", "storage"]))
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
    """Who trains what; with ID, or the beginning of one, a run: its metrics by step and its loss as a plot."""
    if run_id is not None:
        refuse_given("status", "model", "owner", "limit", "everything", beside="an ID")
        _show_one_run(view, run_id, steps)
        return
    found = view.client.runs(owner=owner, status=status, base_model=model)
    view.listed(found, RUNS, run_row, limit, "There are no such runs.")


def _found_run(view: View, named: str) -> Run:
    """The run of an id, or of the beginning of one, if it is no other's among the newest."""
    try:
        return view.client.run(named)
    except AdminError as error:
        if error.status != _NOT_FOUND:
            raise
        newest = itertools.islice(view.client.runs(), _SEARCHED)
        found = [run for run in newest if run.run_id.startswith(named)]
        if len(found) != 1:
            raise
        return found[0]


def _show_one_run(view: View, run_id: str, last: int) -> None:
    run = _found_run(view, run_id)
    run_id = run.run_id
    steps = list(view.client.steps(run_id))
    saved = list(view.client.checkpoints(run_id=run_id))
    snapshots = view.client.snapshots(run_id)
    if view.as_json:
        view.json({"run": run, "steps": steps, "checkpoints": saved, "snapshots": snapshots})
        return
    console = console_of()
    show_run(console, run, saved[:_SAVED_SHOWN], snapshots)
    if len(saved) > _SAVED_SHOWN:
        click.echo(f"{len(saved) - _SAVED_SHOWN} more: tandem checkpoints --run {run_id}", err=True)
    if steps:
        click.echo()
        show_list(console, STEPS, [step_row(step) for step in steps[-last:]])
    plot = plot_text(steps, console.width)
    if plot is not None:
        click.echo(f"\n{plot}")


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
