"""A rolling restart: two gateways on one PostgreSQL are told to end and started again, in turn, under load."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import cast

import pytest

from tests.gateway.test_shutdown import train
from tests.gateways.balancer import balanced
from tests.gateways.conftest import Pair
from tests.served import ServedGateway

pytestmark = [
    pytest.mark.slow,
    pytest.mark.postgres,
    pytest.mark.timeout(240),
    # The SDK warns of its own deprecations, and leaves connections of its background loops to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore::FutureWarning",
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    ),
]


def test_rolling_restarts_under_load_change_no_number(mortal_pair: Pair, tmp_path: Path) -> None:
    calm = ServedGateway(tmp_path / "calm")
    calm.start()
    try:
        expected = train(calm, {})
    finally:
        calm.close()
    statuses: list[int] = []

    def restart(gateway: ServedGateway) -> None:
        statuses.append(gateway.stop(signal.SIGTERM))
        gateway.start()

    def roll() -> None:
        for gateway in mortal_pair.gateways:
            restart(gateway)

    with balanced(*(gateway.port for gateway in mortal_pair.gateways)) as balancer:
        assert train(cast(ServedGateway, balancer), {3: roll, 11: roll}) == expected
        assert balancer.switches >= 2
    assert statuses == [0, 0, 0, 0]
    assert not any("died" in gateway.log.read_text() for gateway in mortal_pair.gateways)
