"""How many threads a pass gets is a function of the pass alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from engines.hf.threads import WORTH_SHARING, Threads
from tests.hf.conftest import MakeEngine
from tests.hf.material import create, forward, forward_backward, step, supervised


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_small_pass_gets_one_thread_and_a_large_one_all() -> None:
    threads = Threads(2)
    counts = []
    for rows in (1, 2**10 - 1, 2**10, 1):
        threads.share(WORTH_SHARING // 2**10, rows)
        counts.append(torch.get_num_threads())
    assert counts == [1, 1, 2, 1]
    threads.share_all()
    assert torch.get_num_threads() == 2


def test_what_ran_before_does_not_change_the_count_of_a_pass(make_engine: MakeEngine) -> None:
    engine = make_engine(threads=2)
    create(engine)
    used = []
    for left_behind in (1, 2):
        torch.set_num_threads(left_behind)
        forward(engine, supervised([5]))
        used.append(torch.get_num_threads())
    assert used == [1, 1]


def test_a_step_takes_all_threads_whatever_its_pass_took(make_engine: MakeEngine) -> None:
    engine = make_engine(threads=2)
    create(engine)
    forward_backward(engine, supervised([5]))
    assert torch.get_num_threads() == 1
    step(engine)
    assert torch.get_num_threads() == 2
