"""How an engine process is started: here, or what stands in for it when it runs elsewhere."""

from __future__ import annotations

import sys
from typing import NamedTuple

import msgspec

from gateway.engine_settings import EngineSettings
from gateway.settings import Settings, engine_environment


class Launch(NamedTuple):
    """What is run with the socket's address and the page of vital signs, and in which environment."""

    command: list[str]
    environment: dict[str, str]


def launch_of(engine: EngineSettings, settings: Settings) -> Launch:
    """To have one replica of an engine."""
    environment = engine_environment(next(iter(engine.devices), None))
    if engine.ray is None:
        return Launch([engine.python, "-m", "engines.host"], environment)
    wanted = {
        **msgspec.to_builtins(engine.ray),
        "storage": "" if settings.storage_url else str(settings.storage_dir.resolve()),
        "plugin": engine.plugin,
        "python": "" if engine.python == sys.executable else engine.python,
    }
    command = [sys.executable, "-m", "engines.on_ray", "--wanted", msgspec.json.encode(wanted).decode()]
    return Launch(command, environment)
