"""How many tokens a pass may take: as many as the device's memory holds, and no more than keep it busy.

What a token costs is measured once, when the model is loaded: the bytes that a pass keeps for its way back.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from engines.hf.model import BaseModel
from engines.operations import LoraSpec
from engines.tuning.lora import Adapter, Gradient, Segment, size
from engines.tuning.packed_attention import PackedLayout

log = logging.getLogger("engines.hf")

ENOUGH = {"cpu": 4096, "cuda": 16384}
"""Tokens from which a larger pass is not faster."""
PASS_SHARE = 0.25
"""Part of what is free once the base model is loaded that a pass may take. The rest of what runs and adapters leave is
for logits, and for what a layer takes for a moment."""
LEAST = 64
TRIAL_TOKENS = 64
TRIAL_RANK = 16
RECOVERY = 64
"""A call that went well adds this part of it to a budget that has shrunk: it doubles in 45 calls."""


class TokenBudget:
    """`tokens` of a pass. A pass that lacks memory halves it, calls that go well let it grow again.

    A fixed one (deterministic mode, whose numbers must be the same in every process) stays what it is.
    """

    def __init__(self, full: int, *, fixed: bool) -> None:
        self.full = full
        self.tokens = full
        self._fixed = fixed

    def shrink(self, total: int, longest: int) -> bool:
        """A call of `total` tokens lacked memory. Whether smaller passes can be tried; not when each datum, `longest`
        tokens at most, has had one for itself."""
        tried = min(self.tokens, total)
        if self._fixed or tried <= max(LEAST, longest):
            return False
        self.tokens = max(LEAST, tried // 2)
        log.warning("passes have %d tokens at most now", self.tokens)
        return True

    def went_well(self) -> None:
        """A call found the memory that it needed."""
        self.tokens = min(self.full, self.tokens + max(1, self.tokens // RECOVERY))


def token_budget(
    base: BaseModel, free_bytes: int | None, limit: int | None, *, deterministic: bool
) -> TokenBudget:
    """What memory allows, at most `limit` or what keeps the device busy. Deterministic mode does not look at memory,
    for what is free differs from one process to the next."""
    most = limit or ENOUGH.get(base.device.type, ENOUGH["cpu"])
    if deterministic or free_bytes is None:
        return TokenBudget(most, fixed=deterministic)
    fit = int(free_bytes * PASS_SHARE / bytes_per_token(base))
    return TokenBudget(min(most, max(LEAST, fit)), fixed=False)


def bytes_per_token(base: BaseModel) -> float:
    """Bytes that a pass through the layers keeps until it goes back, for each of its tokens."""
    spec = LoraSpec(rank=TRIAL_RANK, seed=0)
    numbers = torch.zeros(size(base.sites, spec), dtype=torch.float32, device=base.device)
    adapter = Adapter(base.sites, spec, numbers)
    weights = {weight.untyped_storage().data_ptr() for weight in base.module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    length = min(TRIAL_TOKENS, base.max_context)
    pack = base.pack([[0] * length])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.hidden(pack, PackedLayout([length]), [Segment(adapter, 0, length, Gradient(adapter))])
    own = (tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    return sum(own) / length
