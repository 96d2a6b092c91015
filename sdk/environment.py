"""The one place where this package reads the environment, and what it hands on to a gateway that it starts."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.request import getproxies_environment

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Environment:
    """Which gateway is meant, and the key for it: TANDEM_URL; TANDEM_API_KEY, else TINKER_API_KEY."""

    url: str
    key: str | None


def client_environment() -> Environment:
    """What the shell says; an empty variable counts as none."""
    key = os.environ.get("TANDEM_API_KEY") or os.environ.get("TINKER_API_KEY") or None
    return Environment(os.environ.get("TANDEM_URL") or DEFAULT_URL, key)


def gateway_environment(config: Path | None = None, data: Path | None = None) -> dict[str, str]:
    """The environment for a gateway's process: this one's, with a settings file and a data folder if given."""
    chosen = {"TANDEM_CONFIG": config, "TANDEM_DATA_DIR": data}
    return {**os.environ, **{name: str(path.absolute()) for name, path in chosen.items() if path is not None}}


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine's own and reached from nowhere else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def takes_proxies(host: str) -> bool:
    """Whether the environment's proxies are for this host.

    They cannot reach this machine's own gateway, and it would refuse what they forward.
    """
    return not is_loopback(host)


def go_without_proxies(host: str) -> None:
    """Have every client that this process makes from now on reach a host directly, as NO_PROXY says it."""
    excepted = getproxies_environment().get("no", "")
    if host not in (name.strip() for name in excepted.split(",")) and excepted.strip() != "*":
        joined = ",".join(filter(None, (excepted, host)))
        os.environ.update(
            {"no_proxy": joined, "NO_PROXY": joined}
        )  # programs differ in which one they prefer
