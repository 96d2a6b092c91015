"""From main memory to the device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. Only from pinned memory does CUDA copy while the host goes on; torch keeps that memory
    until the copy is over, and uses it again."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
