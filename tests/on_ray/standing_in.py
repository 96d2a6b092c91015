"""What stands in for an engine process on Ray, started as the gateway starts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engines.messages import LoadFailed
from tests.engines.owner import Owner

PATIENCE_S = 90.0


def start(storage: Path, owner_timeout_s: float = 8.0, **wanted: Any) -> Owner:
    """Its owner's end; `wanted` is what the engine needs of a node."""
    told = {"address": "127.0.0.1:1", "storage": str(storage), "wait_s": 2.0, **wanted}
    arguments = ["--wanted", json.dumps(told), "--owner-timeout", str(owner_timeout_s)]
    return Owner(storage, module="engines.on_ray", arguments=arguments)


def refused(storage: Path, **wanted: Any) -> LoadFailed:
    """What it says when it finds no place."""
    with start(storage, **wanted) as owner:
        failed = owner.receive(LoadFailed, PATIENCE_S)
        assert owner.process.wait(PATIENCE_S) == 1
        return failed
