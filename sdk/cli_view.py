"""What commands of the `tandem` command share: which gateway they ask, and how they answer."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click
import msgspec
from click.core import ParameterSource

from sdk.admin import AdminClient, AdminError
from sdk.cli_layout import Column, Row, console_of
from sdk.cli_rows import show_list
from sdk.environment import DEFAULT_URL, client_environment

T = TypeVar("T")


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


def refuse_given(*parameters: str, beside: str, context: click.Context | None = None) -> None:
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
