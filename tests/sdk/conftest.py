"""A gateway without keys and with a little in it: two runs, three checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.admin.conftest import finish, save
from tests.gateway.conftest import begin_run, send_pass, send_step
from tests.served import ServedGateway

STEPS = 12


@dataclass(frozen=True)
class Place:
    """The gateway; a run with STEPS steps and a fresh one; the checkpoints of the first, oldest first."""

    gateway: ServedGateway
    trained: str
    fresh: str
    paths: list[str]
    losses: list[float]

    @property
    def url(self) -> str:
        return self.gateway.url


@pytest.fixture(scope="package")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Nobody changes the two runs and the three checkpoints."""
    gateway = ServedGateway(tmp_path_factory.mktemp("sdk"))
    gateway.start()
    with httpx.Client(
        base_url=gateway.url, timeout=60, headers={"X-API-Key": "tml-x"}, trust_env=False
    ) as http:
        trained, losses = begin_run(http, rank=8), []
        for step in range(STEPS):
            result = finish(http, send_pass(http, trained, 2 * step + 1, [1, 2, 3, 4, 5]))
            losses.append(result["metrics"]["loss:sum"])
            finish(http, send_step(http, trained, 2 * step + 2))
        paths = [save(http, trained, 2 * STEPS + 1 + number, f"w{number}") for number in range(2)]
        paths.append(save(http, trained, 2 * STEPS + 3, "s", "sampler_weights"))
        fresh = begin_run(http)
    yield Place(gateway, trained, fresh, paths, losses)
    gateway.stop()
