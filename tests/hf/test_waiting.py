"""On a GPU the host must not wait in the middle of a decoding step: its one wait is for the drawn tokens.

Without a GPU this shows in the operations themselves: those whose outcome the host needs before it can go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engines.operations import AdapterRef, LoraSpec
from tests.hf.conftest import MakeEngine
from tests.hf.material import create, request, saved, supervised, text, train

WAITING = {
    "_local_scalar_dense",  # item(), bool(), int() of a tensor
    "item",  # the same in inference mode
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
}
"""And indexing with a boolean tensor, which calls `nonzero`, on a GPU from within."""


class Watch(TorchDispatchMode):
    """Counts operations by name; an index that is a boolean tensor counts as `nonzero`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    @property
    def waits(self) -> set[str]:
        return {name for name, count in self.seen.items() if count} & WAITING

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.seen[name] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            self.seen["nonzero"] += sum(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            )
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_waits() -> None:
    values = torch.arange(4.0)
    for wait in (
        lambda: values.sum().item(),
        lambda: bool(values[0] > 1),
        lambda: values[values > 1],
        values.nonzero,
        lambda: values.masked_select(values > 1),
    ):
        with Watch() as watch:
            wait()
        assert watch.waits
    with Watch() as watch:
        values[torch.tensor([1, 2])] = 0.0
    assert not watch.waits


@pytest.mark.parametrize("adapted", [False, True])
def test_a_decoding_step_does_not_wait_in_the_middle(make_engine: MakeEngine, adapted: bool) -> None:
    """Greedy, drawn, cut, penalised and with alternatives, of the base model and of two adapters, in 2 layers; one is
    so long that it attends in a call of its own."""
    engine = make_engine()
    adapters: list[AdapterRef | None] = [None]
    for number in range(2 * adapted):
        create(engine, f"run{number}", LoraSpec(4, number))
        train(engine, supervised([20]), steps=1, run_id=f"run{number}")
        adapters.append(saved(engine, f"run{number}", f"adapters/{number}"))
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"top_k": 5, "top_p": 0.9},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2, "logit_bias": {3: 1.0}},
        {"topk_sample_logprobs": 4},
    ]
    for call_id, kind in enumerate(kinds):
        adapter = adapters[call_id % len(adapters)]
        prompt = text(call_id, 9 if call_id else 480)
        engine.start_sample(call_id, request(prompt, max_tokens=20, adapter=adapter, **kind))
    engine.advance()
    with Watch() as watch:
        for _ in range(3):
            assert len(engine.advance()) == len(kinds)
    assert watch.seen["scaled_dot_product_attention"] == 3 * 2 * 2
    assert not watch.waits
