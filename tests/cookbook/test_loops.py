"""The official cookbook's loops learn what they are given, unmodified; `python -m tests.cookbook` makes their place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest

from tests.cookbook.running import cookbook_python, run_loop, series, store_tokenizer
from tests.served import TINY_ENGINE, ServedGateway

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        not cookbook_python().exists(),
        reason="`python -m tests.cookbook` has not made the cookbook's environment",
    ),
]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    served = ServedGateway(tmp_path_factory.mktemp("cookbook"), [TINY_ENGINE])
    served.start(120)
    yield served
    served.close()


@pytest.fixture(scope="module")
def hub(gateway: ServedGateway, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    store_tokenizer(gateway.url, folder)
    return folder


def test_the_supervised_loop(gateway: ServedGateway, hub: Path, tmp_path: Path) -> None:
    log = run_loop("supervised", gateway.url, tmp_path, hub)
    trained = series(log, "train_mean_nll")
    tested = series(log, "test/nll")
    assert len(trained) == 3 * 7
    assert trained[-1] < 0.1 * trained[0]
    assert tested[-1] < 0.3 * tested[0]


def test_a_supervised_loop_goes_on_where_it_was_stopped(
    gateway: ServedGateway, hub: Path, tmp_path: Path
) -> None:
    """It begins a new run at its last checkpoint, with the optimizer's state, and knows what the first has learnt."""
    first = series(run_loop("supervised_beginning", gateway.url, tmp_path, hub), "train_mean_nll")
    both = series(run_loop("supervised", gateway.url, tmp_path, hub), "train_mean_nll")
    assert len(first) == 7
    assert both[:7] == first
    assert len(both) == 3 * 7
    assert max(both[7:]) < 0.6 * first[0]
    assert both[-1] < 0.1 * first[0]


@pytest.mark.parametrize("loop", ["importance_sampling", "ppo"])
def test_the_reinforcement_loop(gateway: ServedGateway, hub: Path, tmp_path: Path, loop: str) -> None:
    log = run_loop(loop, gateway.url, tmp_path, hub)
    rewards = series(log, "env/all/reward/total")
    assert len(rewards) == 8
    assert mean(rewards[-2:]) > 2 * rewards[0], rewards
    # what the sampler said of its tokens is what the trainer computes for them
    if loop == "importance_sampling":
        assert max(map(abs, series(log, "optim/kl_sample_train_v1"))) < 1e-4


def test_the_preference_loop(gateway: ServedGateway, hub: Path, tmp_path: Path) -> None:
    log = run_loop("preference", gateway.url, tmp_path, hub)
    losses = series(log, "dpo_loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # both models are the base model still
    assert losses[-1] < 0.1
    assert series(log, "accuracy")[-1] == 1.0
