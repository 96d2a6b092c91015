"""The one place where this package reads the environment, and what it hands on to a gateway that it starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Environment:
    """Which gateway the command line talks to: TANDEM_URL and TANDEM_API_KEY."""

    url: str
    key: str | None


def client_environment() -> Environment:
    """What the shell says; an empty variable counts as none."""
    return Environment(os.environ.get("TANDEM_URL") or DEFAULT_URL, os.environ.get("TANDEM_API_KEY") or None)


def gateway_environment(config: Path | None = None, data: Path | None = None) -> dict[str, str]:
    """The environment for a gateway's process: this one's, with a settings file and a data folder if given."""
    chosen = {"TANDEM_CONFIG": config, "TANDEM_DATA_DIR": data}
    return {**os.environ, **{name: str(path.absolute()) for name, path in chosen.items() if path is not None}}
