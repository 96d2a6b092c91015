"""`tandem serve`, `stop` and `keys`: a gateway on this machine."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import click

from sdk.cli_view import Refused, View, asks_gateway
from sdk.environment import gateway_environment, is_loopback

CONFIG = click.option(
    "--config", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Settings file, TOML."
)
DATA = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Data folder.  [the settings', else ./data]",
)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True)
@CONFIG
@DATA
def serve(host: str, port: int, config: Path | None, data: Path | None) -> None:
    """Start a gateway with its engines; Ctrl-C ends it.

    What is not given here comes from the settings, see docs/settings.md.
    """
    if not is_loopback(host):
        click.echo(
            f"Listening on {host}: other machines can connect. While there are no API keys the gateway refuses "
            "them (403); make keys with `tandem keys add OWNER`.",
            err=True,
        )
    # Every client polls, so a line for each request would bury what matters in the log; `tandem futures` has the calls.
    command = [sys.executable, "-m", "uvicorn", "gateway.app:app", "--host", host, "--port", str(port)]
    sys.stdout.flush()
    os.execve(sys.executable, [*command, "--no-access-log"], gateway_environment(config, data))


@click.command()
@click.option(
    "--within", type=click.IntRange(1), default=60, show_default=True, help="Seconds to wait for its end."
)
@asks_gateway
def stop(view: View, within: int) -> None:
    """Stop a gateway on this machine, as Ctrl-C in its terminal does. Nothing that it has accepted is lost."""
    if not is_loopback(view.client.host):
        raise Refused(f"{view.client.url} is another machine's; stop the gateway there")
    pid = view.client.metrics().pid
    try:
        os.kill(pid, signal.SIGINT)
    except (ProcessLookupError, PermissionError) as error:
        raise Refused(f"process {pid} of {view.client.url} cannot be stopped: {error.strerror}") from error
    deadline = time.monotonic() + within
    while _runs(pid):
        if time.monotonic() > deadline:
            raise Refused(f"process {pid} has not ended within {within} s; it finishes what it does")
        time.sleep(0.1)
    if view.as_json:
        view.json({"stopped": pid})
    else:
        click.echo(f"stopped: {view.client.url} (process {pid})", err=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether it has ended and only its parent has not asked yet; known on Linux only."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


@click.group()
def keys() -> None:
    """Make, list and remove API keys, on the machine of the gateway; it need not run."""


@keys.command()
@click.argument("owner")
@click.option("--label", default="", help="What it is used for.")
@click.option("--admin", is_flag=True, help="Sees everybody's runs in the admin API.")
@CONFIG
@DATA
def add(owner: str, label: str, admin: bool, config: Path | None, data: Path | None) -> None:
    """Make a key of OWNER; it is shown once."""
    _keys(config, data, "add", owner, "--label", label, *["--admin"] * admin)


@keys.command("list")
@CONFIG
@DATA
def list_keys(config: Path | None, data: Path | None) -> None:
    """Owners, labels and hashes."""
    _keys(config, data, "list")


@keys.command()
@click.argument("hash")
@CONFIG
@DATA
def remove(hash: str, config: Path | None, data: Path | None) -> None:
    """Remove the key whose hash begins with HASH, as `list` shows it; it stops working within seconds."""
    _keys(config, data, "remove", hash)


def _keys(config: Path | None, data: Path | None, *arguments: str) -> None:
    """The gateway's own command, which knows its settings and its database."""
    sys.stdout.flush()
    command = [sys.executable, "-m", "gateway.keys", *arguments]
    os.execve(sys.executable, command, gateway_environment(config, data))
