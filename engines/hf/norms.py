"""Root-mean-square norms with a backward pass of their own (Zhang & Sennrich, arXiv:1910.07467).

Autograd's, put together from that of powers, means and products, takes three to four times as long on a CPU, and
small models spend a tenth of a training step in it. For CUDA torch has a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

TRIAL_ROWS = 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class RmsNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * weight over the last axis, in float32 but for the product. The weight is frozen."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape and type of `x`."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        apply: Callable[..., Tensor] = _RmsNorm.apply
        return apply(x, self.weight, self.eps)


class _RmsNorm(torch.autograd.Function):
    """With n = x * r and g = grad * weight: d x = r * (g - n * mean(g * n))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = (wide * inverse).to(x.dtype)
        ctx.save_for_backward(normed, inverse, weight)
        out: Tensor = normed * weight
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        normed, inverse, weight = ctx.saved_tensors
        scaled = (grad * weight).float()
        wide = normed.float()
        share = torch.linalg.vecdot(scaled, wide).unsqueeze(-1).div_(-wide.shape[-1])
        return scaled.addcmul_(wide, share).mul_(inverse).to(grad.dtype), None, None


def replace_norms(model: nn.Module) -> int:
    """Put `RmsNorm` where a trial shows that it computes what the model's own norm does; gives how often."""
    places = {
        name: RmsNorm(module.weight.detach(), module.variance_epsilon)
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
    }
    alike = [name for name, own in places.items() if _alike(model.get_submodule(name), own)]
    for name in alike:
        model.set_submodule(name, places[name])
    return len(alike)


@torch.inference_mode()
def _alike(module: nn.Module, own: RmsNorm) -> bool:
    """Of a pack of large, small and zero rows, which a norm that mixes tokens would not treat alike."""
    width = own.weight.shape[0]
    rows = torch.arange(TRIAL_ROWS * width, dtype=torch.float32, device=own.weight.device)
    scale = torch.tensor([[30.0], [1.0], [1e-3], [0.0]], device=own.weight.device)
    x = (rows.view(TRIAL_ROWS, width).sin() * scale).to(own.weight.dtype)[None]
    tolerance = TOLERANCE.get(x.dtype, 0.0)
    return torch.allclose(module(x).float(), own(x).float(), rtol=tolerance, atol=tolerance)
