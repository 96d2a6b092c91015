"""The own root-mean-square norm against its formula, and where it is put."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from engines.hf.norms import RmsNorm, replace_norms
from tests.hf.conftest import MakeEngine


def plain(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float64, with autograd's backward pass."""
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(3, 8), (1, 5, 2, 16), (1, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    x = (torch.randn(shape, generator=generator) * 3).to(dtype).requires_grad_(True)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    found, expected = RmsNorm(weight, 1e-6)(x), plain(x, weight, 1e-6)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(found, x, upstream)
    (reference,) = torch.autograd.grad(expected, x, upstream.double())
    torch.testing.assert_close(grad.double(), reference.double(), rtol=tolerance, atol=tolerance)


def test_rows_of_zeros_stay_finite() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    found = RmsNorm(torch.ones(4), 1e-6)(x)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert not found.any() and grad.isfinite().all()


def test_only_what_computes_the_same_is_replaced() -> None:
    """Gemma's norm multiplies by 1 + weight."""
    gemma = GemmaRMSNorm(8)
    gemma.variance_epsilon = 1e-6
    model = nn.ModuleDict({"qwen": Qwen3RMSNorm(8, 1e-6), "gemma": gemma, "layer": nn.LayerNorm(8)})
    assert replace_norms(model) == 1
    assert isinstance(model["qwen"], RmsNorm)
    assert model["gemma"] is gemma


def test_an_engine_has_replaced_all_of_its_model(make_engine: MakeEngine) -> None:
    names = [type(module).__name__ for module in make_engine("tied").base.module.modules()]
    assert names.count("RmsNorm") == 2 * 4 + 1
    assert "Qwen3RMSNorm" not in names
