"""Old and new clients of one owner train and sample at the same time; each uses what the other made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.compat.environments import site_of
from tests.compat.running import BASE_MODEL, environment, serving
from tests.served import ServedGateway

VERSIONS = ("0.1.0", "0.3.0", "0.18.2", "0.38.0")
STEPS = 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Client:
    """A process with one version of the SDK."""

    def __init__(self, sdk: str, gateway: ServedGateway, key: str, home: Path) -> None:
        home.mkdir()
        command = [sys.executable, "-m", "tests.compat.drive", gateway.url, key, BASE_MODEL]
        self._log = (home / "log").open("wb")
        self._process = subprocess.Popen(
            command,
            cwd=home,
            env=environment(site_of(sdk), gateway.url, key, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __call__(self, action: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([action, *arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, Path(self._log.name).read_text()[-3000:]
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    """One of each generation, all of the same owner."""
    folder = tmp_path_factory.mktemp("side-by-side")
    with serving(folder) as gateway:
        key = gateway.add_key("one owner")
        started = {sdk: Client(sdk, gateway, key, folder / sdk) for sdk in VERSIONS}
        yield started
        for client in started.values():
            client.close()


def test_all_train_at_once_and_get_the_same_numbers(clients: dict[str, Client]) -> None:
    """The same seed and data: what the wire looks like changes nothing, nor does who else trains."""

    def work(client: Client) -> list[float]:
        run = client("begin", 3)
        client("train", run, STEPS)
        numbers: list[float] = client("logprobs", run)
        return numbers

    alone = work(clients["0.38.0"])
    with ThreadPoolExecutor(len(clients)) as pool:
        together = list(pool.map(work, clients.values()))
    for numbers in together:
        assert numbers == pytest.approx(alone, abs=1e-5)


def test_each_lists_the_runs_of_all(clients: dict[str, Client]) -> None:
    for client in clients.values():
        client("begin", 1)
    listed = [client("runs") for client in clients.values()]
    assert len(listed[0]) >= len(clients)
    assert all(runs == listed[0] for runs in listed)


@pytest.mark.parametrize(("one", "other"), [*combinations(VERSIONS, 2), *combinations(VERSIONS[::-1], 2)])
def test_a_checkpoint_of_one_is_used_by_the_other(clients: dict[str, Client], one: str, other: str) -> None:
    """Trained on, and sampled: tokens and numbers are the same as its maker's."""
    maker, user = clients[one], clients[other]
    run = maker("begin", 9)
    maker("train", run, STEPS)
    numbers = maker("logprobs", run)
    resumed = user("resume", maker("save", run))
    assert user("logprobs", resumed) == pytest.approx(numbers, abs=1e-5)
    user("train", resumed, 1)
    assert sum(user("logprobs", resumed)) > sum(numbers) + 0.01
    assert maker("logprobs", run) == numbers  # the run itself is untouched
    path = maker("save_sampler", run)
    tokens, values = user("sample", path)
    own_tokens, own_values = maker("sample", path)
    assert tokens == own_tokens
    assert values == pytest.approx(own_values, abs=1e-5)
