"""Replicas of which some are one gateway's and some another's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateways.conftest import Pair, database
from tests.postgres import PostgresServer
from tests.replicas.conftest import alone, client_of, drawn, future, prompt, sampler, send, states, until
from tests.served import ServedGateway

pytestmark = [pytest.mark.postgres, pytest.mark.slow]
NAMES = {"sampler", "sampler-2", "sampler-3"}


@pytest.fixture
def pair(tmp_path: Path, pg_server: PostgresServer, _pg_template: str) -> Iterator[Pair]:
    made = Pair(
        tmp_path, database(pg_server, _pg_template), [sampler(1, delay_s=0.02)], samples_in_engine="8"
    )
    made.start()
    yield made
    made.close()


def wherever(gateway: ServedGateway) -> dict[str, str]:
    """What a gateway says of each replica, wherever it is."""
    engines: dict[str, str] = httpx.get(f"{gateway.url}/readyz", timeout=10).json()["engines"]
    return {name: state.partition(" at ")[0] for name, state in engines.items()}


def bounds(client: httpx.Client, number: int) -> None:
    answer = client.put("/admin/v1/engines/sampler/replicas", json={"min": number, "max": number})
    assert answer.status_code == 200, answer.text


def test_both_follow_one_decision_and_one_takes_over_from_the_other(pair: Pair, tmp_path: Path) -> None:
    with client_of(pair.holder.url) as first, client_of(pair.other.url) as second:
        bounds(second, 3)  # at the one that has no engine yet
        ready = dict.fromkeys(NAMES, "ready")
        until(lambda: wherever(pair.holder) == wherever(pair.other) == ready, "three are ready for both")
        for name in NAMES:  # each is in one place
            assert {states(first)[name], states(second)[name]} == {"ready", "waiting"}
        sent = [send(second if number % 2 else first, prompt(number), seed=number) for number in range(60)]
        for number, request_id in enumerate(sent):
            asked = first if number % 3 else second
            assert drawn(asked, request_id) == alone(prompt(number), number, str(tmp_path)), number
        assert {future(first, request_id)["engine"] for request_id in sent} == NAMES
        late = [send(first, prompt(number), seed=number) for number in range(60, 120)]
        pair.holder.kill()
        for number, request_id in enumerate(late, start=60):
            assert drawn(second, request_id) == alone(prompt(number), number, str(tmp_path)), number
        until(lambda: states(second) == ready, "all are the other one's")
        bounds(second, 1)
        until(lambda: states(second) == {"sampler": "ready"}, "one is left")
        last = send(second, prompt(5), seed=5)
        assert drawn(second, last) == drawn(second, sent[5])
