"""Products with frozen weights, by either library, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.tuning import products
from engines.tuning.products import LARGE, MUCH, product

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)
SMALL, WIDE = (32, 24), (512, LARGE // 512 + 1)


@pytest.fixture(params=[False, pytest.param(True, marks=needs_onednn)], ids=["torch", "oneDNN"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN counts as the faster one."""
    chosen: bool = request.param
    monkeypatch.setattr(products, "onednn_is_faster", lambda: chosen)
    return chosen


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [SMALL, WIDE])
@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_float64(onednn: bool, shape: tuple[int, int], rows: int, biased: bool) -> None:
    inputs, outputs = shape
    x, weight = numbers(rows, inputs), numbers(outputs, inputs)
    bias = numbers(outputs) if biased else None
    wanted = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    with torch.no_grad():
        found = product(x, weight, bias)
        back = product(found, weight.t())
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(back.double(), wanted @ weight.double(), rtol=1e-5, atol=5e-2)


def test_rows_may_have_several_axes_and_lie_apart(onednn: bool) -> None:
    x, weight = numbers(2, 3, 2 * WIDE[0])[..., : WIDE[0]], numbers(WIDE[1], WIDE[0])
    with torch.no_grad():
        found = product(x, weight)
    torch.testing.assert_close(found, (x.double() @ weight.double().t()).float(), rtol=1e-5, atol=1e-4)


def test_a_product_that_autograd_needs_has_its_gradient(onednn: bool) -> None:
    x = numbers(3, WIDE[0]).requires_grad_()
    weight = numbers(WIDE[1], WIDE[0])
    (grad,) = torch.autograd.grad(product(x, weight).sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand(3, -1), rtol=1e-5, atol=1e-4)


@needs_onednn
def test_the_shape_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    wide, narrow = numbers(WIDE[1], WIDE[0]), numbers(16, 512)
    assert products._onednn_takes(numbers(1, WIDE[0]), wide)
    assert not products._onednn_takes(numbers(1, WIDE[0]).bfloat16(), wide.bfloat16())
    rows = MUCH // narrow.numel()
    assert products._onednn_takes(torch.zeros(rows, 512), narrow)
    assert not products._onednn_takes(torch.zeros(rows - 1, 512), narrow)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert not products._onednn_takes(numbers(1, WIDE[0]), wide)
