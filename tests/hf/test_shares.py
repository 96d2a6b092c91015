"""Operations of one call belong to different runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.operations import Datum, Forward, LoraSpec
from engines.tensors import Tensor
from engines.tuning.lora import Adapter, Site, size
from engines.tuning.optimizer import AdamW
from engines.tuning.runs import Run, shares_of


def a_run() -> Run:
    sites, spec = [Site("model.layers.0.mlp.up_proj", 3, 4)], LoraSpec(2, 1)
    return Run(Adapter(sites, spec, torch.zeros(size(sites, spec))), AdamW())


def test_each_operation_of_a_call_has_its_run_to_itself() -> None:
    tokens = Tensor.of(np.array([1, 2], dtype=np.int32))
    operation = Forward([Datum(tokens, {})], "cross_entropy", {})
    first, second = a_run(), a_run()
    shares = shares_of([(first, operation), (second, operation)])
    assert [share.run is run for share, run in zip(shares, (first, second), strict=True)] == [True, True]
    with pytest.raises(AssertionError, match="one run"):
        shares_of([(first, operation), (second, operation), (first, operation)])
