"""Gateways, their engine and their database are killed, stopped and cut off under load; clients see a pause.

Four clients train pipelined and sample, through an address that leads to whichever gateway answers. Whatever happens,
their numbers and their final weights are those of one gateway left in peace, and the database has every operation once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import tinker
from sqlalchemy.engine import make_url

from tests.gateway.conftest import datum
from tests.gateways.balancer import Balancer, balanced
from tests.gateways.conftest import KEY, Pair, database, rows, state, wait_for_company
from tests.postgres import PostgresServer
from tests.served import ServedGateway, has_ended
from tests.threads import beside

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    # The SDK warns of its own deprecations, and leaves connections of its background loops to the garbage collector.
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
]
CLIENTS = 4
STEPS = 40
WITHIN_S = 120.0
"""What takes longer than this has not happened; a machine that is busy with other things takes some of it."""
PAUSE_S = 0.1
"""Between two steps of a client, so that what happens happens in the middle."""
ADAM = tinker.AdamParams(learning_rate=0.01)
PROMPT = tinker.ModelInput.from_ints([1, 2, 3])


class Told(NamedTuple):
    """All that a client has been told."""

    losses: list[float]
    drawn: list[list[int]]
    path: str


class Life(NamedTuple):
    """What one client has been told, and the weights that it has saved."""

    losses: list[float]
    drawn: list[list[int]]
    weights: bytes


def live(url: str, seed: int, begun: threading.Barrier) -> Told:
    """One client's life."""
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        client = service.create_lora_training_client("fake/model", rank=4, seed=seed).result()
        sampler = service.create_sampling_client(base_model="fake/model").result()
        begun.wait(60)
        passes, steps, samples = [], [], []
        for step in range(STEPS):
            passes.append(client.forward_backward([datum(100 * seed + step)], "cross_entropy"))
            steps.append(client.optim_step(ADAM))
            params = tinker.SamplingParams(max_tokens=4, seed=step)
            samples.append(sampler.sample(PROMPT, num_samples=1, sampling_params=params))
            time.sleep(PAUSE_S)
        losses = [future.result().metrics["loss:sum"] for future in passes]
        assert all(future.result() for future in steps)
        drawn = [list(future.result().sequences[0].tokens) for future in samples]
        return Told(losses, drawn, client.save_state("end").result().path)


def lives(url: str, database_url: str, storage: Path, disaster: Callable[[], None]) -> list[Life]:
    """Those of all clients, while something happens in their middle."""
    begun = threading.Barrier(CLIENTS + 1)
    futures = [beside(live, url, seed, begun) for seed in range(CLIENTS)]
    begun.wait(60)
    disaster()
    told = [future.result(WITHIN_S) for future in futures]
    folders = dict(rows(database_url, "select path, folder from checkpoints"))
    return [
        Life(
            each.losses, each.drawn, (storage / folders[each.path] / "adapter_model.safetensors").read_bytes()
        )
        for each in told
    ]


def require_each_once(database_url: str) -> None:
    """By the database: every step of every run is there once, in order, and nothing is left or failed."""
    kinds = dict(rows(database_url, "select kind, count(*) from futures where status = 'done' group by kind"))
    per_client = {
        "create_run": 1,
        "forward_backward": STEPS,
        "optim_step": STEPS,
        "save_weights": 1,
        "sample": STEPS,
    }
    assert kinds == {kind: CLIENTS * count for kind, count in per_client.items()}
    assert rows(database_url, "select request_id, status, error from futures where status <> 'done'") == []
    steps = rows(
        database_url, "select run_id, array_agg(step order by seq_id), count(*) from steps group by run_id"
    )
    assert [(step, count) for _, step, count in steps] == [(list(range(1, STEPS + 1)), STEPS)] * CLIENTS
    assert rows(database_url, "select distinct step, next_seq from runs") == [(STEPS, 2 * STEPS + 2)]


def epoch(pair: Pair) -> int:
    """How many times the engine's lease has been taken."""
    [(number,)] = rows(pair.url, "select epoch from leases")
    return int(number)


@pytest.fixture(scope="module")
def expected(
    pg_server: PostgresServer, _pg_template: str, tmp_path_factory: pytest.TempPathFactory
) -> list[Life]:
    """The same clients at one gateway to which nothing happens."""
    url = database(pg_server, _pg_template)
    gateway = ServedGateway(tmp_path_factory.mktemp("calm"), None, database_url=url)
    gateway.start()
    try:
        found = lives(gateway.url, url, gateway.data_dir / "storage", lambda: None)
        require_each_once(url)
        return found
    finally:
        gateway.close()


@pytest.fixture
def balancer(mortal_pair: Pair) -> Iterator[Balancer]:
    """Prefers the gateway without the engine."""
    with balanced(mortal_pair.other.port, mortal_pair.holder.port) as balancer:
        yield balancer


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while True:
        with suppress(httpx.TransportError):  # it does not answer yet, or not any more
            if true():
                return
        assert time.monotonic() < deadline, f"not within {WITHIN_S} s: {what}"
        time.sleep(0.1)


def until_taken_over(gateway: ServedGateway) -> None:
    until(lambda: state(gateway) == "ready", "another gateway's engine is taken over")


def test_the_holder_is_killed(mortal_pair: Pair, balancer: Balancer, expected: list[Life]) -> None:
    """Clients are at the other gateway, which takes the engine over."""

    def kill() -> None:
        time.sleep(1)
        mortal_pair.holder.kill()
        until_taken_over(mortal_pair.other)

    assert lives(balancer.url, mortal_pair.url, mortal_pair.storage, kill) == expected
    require_each_once(mortal_pair.url)
    assert (
        epoch(mortal_pair) >= 2
    )  # more, where a busy machine has kept the new holder from renewing its lease


def test_the_holder_is_killed_with_all_clients_at_it(
    mortal_pair: Pair, balancer: Balancer, expected: list[Life]
) -> None:
    balancer.order.reverse()

    def kill() -> None:
        time.sleep(1)
        mortal_pair.holder.kill()

    assert lives(balancer.url, mortal_pair.url, mortal_pair.storage, kill) == expected
    require_each_once(mortal_pair.url)
    assert balancer.switches >= 1


def test_the_gateway_without_the_engine_is_killed_with_all_clients_at_it(
    mortal_pair: Pair, balancer: Balancer, expected: list[Life]
) -> None:
    def kill() -> None:
        time.sleep(1)
        mortal_pair.other.kill()

    assert lives(balancer.url, mortal_pair.url, mortal_pair.storage, kill) == expected
    require_each_once(mortal_pair.url)
    assert epoch(mortal_pair) == 1


def test_the_holder_stands_still_for_longer_than_its_lease_and_goes_on(
    mortal_pair: Pair, balancer: Balancer, expected: list[Life]
) -> None:
    """It finds that its lease is gone and its engine too, and waits; what it had in hand is refused or was done."""
    holder, other = mortal_pair.gateways
    [engine] = holder.engine_pids()

    def pause() -> None:
        time.sleep(1)
        holder.pause()
        until_taken_over(other)
        until(lambda: has_ended(engine), "the engine of a gateway that stands still ends")
        holder.go_on()
        until(lambda: engine not in holder.engine_pids(), "the holder sees that its engine is gone")
        until(
            lambda: state(holder) == "ready at another gateway" or epoch(mortal_pair) > 2,
            "the holder sees that its lease is gone",
        )

    assert lives(balancer.url, mortal_pair.url, mortal_pair.storage, pause) == expected
    require_each_once(mortal_pair.url)
    assert (
        epoch(mortal_pair) >= 2
    )  # more, where a busy machine has kept the new holder from renewing its lease


def test_holder_and_engine_stand_still_and_go_on_together(
    mortal_pair: Pair, balancer: Balancer, expected: list[Life]
) -> None:
    """As on a machine that is suspended: the old engine cannot end before the new one works."""
    holder, other = mortal_pair.gateways
    [engine] = holder.engine_pids()

    def pause() -> None:
        time.sleep(1)
        holder.pause()
        os.kill(engine, signal.SIGSTOP)
        until_taken_over(other)
        os.kill(engine, signal.SIGCONT)
        holder.go_on()

    assert lives(balancer.url, mortal_pair.url, mortal_pair.storage, pause) == expected
    require_each_once(mortal_pair.url)


def test_both_are_stopped_one_after_the_other_and_started_again(
    mortal_pair: Pair, balancer: Balancer, expected: list[Life]
) -> None:
    """A rolling restart: a lease that is given back is taken at once."""
    holder, other = mortal_pair.gateways

    def roll() -> None:
        time.sleep(1)
        assert holder.stop() == 0
        until_taken_over(other)
        holder.start()
        assert other.stop() == 0
        until_taken_over(holder)
        other.start()

    assert lives(balancer.url, mortal_pair.url, mortal_pair.storage, roll) == expected
    require_each_once(mortal_pair.url)


# ---------------------------------------------------------------------------- the database


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that a test may stop."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def lonely(own_server: PostgresServer, tmp_path: Path) -> Iterator[Pair]:
    """A pair on that server."""
    pair = Pair(tmp_path, own_server.url(own_server.create_database()))
    try:
        pair.holder.migrate()
        pair.start()
        yield pair
    finally:
        pair.close()


def test_all_connections_are_cut_again_and_again(
    lonely: Pair, own_server: PostgresServer, expected: list[Life]
) -> None:
    name = make_url(lonely.url).database
    assert name is not None

    def cut() -> None:
        for _ in range(8):
            time.sleep(0.5)
            assert own_server.cut_connections(name) > 2

    with balanced(lonely.other.port, lonely.holder.port) as balancer:
        assert lives(balancer.url, lonely.url, lonely.storage, cut) == expected
    require_each_once(lonely.url)
    wait_for_company(lonely.gateways)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["fast", "immediate"])
def test_the_server_is_stopped_and_started_again(
    lonely: Pair, own_server: PostgresServer, expected: list[Life], how: signal.Signals
) -> None:
    def restart() -> None:
        time.sleep(1)
        own_server.stop(how)
        time.sleep(1)
        own_server.start_again()

    with balanced(lonely.other.port, lonely.holder.port) as balancer:
        assert lives(balancer.url, lonely.url, lonely.storage, restart) == expected
    require_each_once(lonely.url)
