"""Products of rows with frozen weights, by whichever of torch's libraries is faster on the processor.

torch multiplies float32 matrices by MKL. oneDNN, which torch brings for other types, is faster on AMD's processors: on
two cores of an EPYC 1.05 to 1.3 times with thousands of rows, 1.2 to 4 times with the 1 to 32 rows of decoding steps.
Which one computes a product follows from its shape, and from whether autograd has to go back through it; never from
what ran before. So it has the same bits wherever it is repeated.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 200_000
"""Items of a weight from which oneDNN is faster with any number of rows. It takes some 10 µs more to begin."""
MUCH = 2**26
"""Multiply-adds from which it is for smaller weights. The first product of each shape takes it a millisecond more."""


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` [..., m] of rows [..., n] and weight [m, n], which may be a transposed view."""
    if _onednn_takes(rows, weight):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        return out
    return F.linear(rows, weight, bias)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is a processor of the kind that it was measured on, and torch has been built with it."""
    file = Path("/proc/cpuinfo")
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and file.exists() and "AuthenticAMD" in file.read_text()


def _onednn_takes(rows: Tensor, weight: Tensor) -> bool:
    """It has no way back for autograd, so it takes what needs none."""
    if rows.dtype != torch.float32 or weight.dtype != torch.float32 or rows.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and rows.requires_grad:
        return False
    enough = weight.numel() >= LARGE or rows.numel() * weight.shape[0] >= MUCH
    return enough and onednn_is_faster()
