"""How much of one call to an engine an operation makes up."""

from __future__ import annotations

import pytest

from gateway.dispatch.inputs import RecentInputs
from gateway.dispatch.weighing import weight
from tests.dispatch.test_run_queue import operation


def weight_of(kind: str, size: int | None, *, packs: bool = True, pass_tokens: int = 4096) -> float:
    inputs = RecentInputs(1 << 20)
    future = operation("a", 1, kind)
    if size is not None:
        inputs.add(future.request_id, bytes(size))
    return weight(inputs, future, packs=packs, pass_tokens=pass_tokens)


@pytest.mark.parametrize("kind", ["forward", "forward_backward"])
def test_a_pass_weighs_what_its_input_weighs(kind: str) -> None:
    assert weight_of(kind, 2**14) == 0.25
    assert weight_of(kind, 2**18) == 4.0
    assert weight_of(kind, 2**18, pass_tokens=2**14) == 1.0


@pytest.mark.parametrize(
    ("kind", "size", "packs"),
    [
        ("forward_backward", None, True),  # it would have to be read first
        ("forward_backward", 10, False),
        ("save_weights", 10, True),
        ("load_weights", 10, True),
    ],
)
def test_everything_else_fills_a_call(kind: str, size: int | None, packs: bool) -> None:
    assert weight_of(kind, size, packs=packs) == 1.0


@pytest.mark.parametrize("kind", ["create_run", "optim_step"])
def test_what_is_quick_goes_in_numbers(kind: str) -> None:
    assert weight_of(kind, None, packs=False) == 1 / 64
