"""AdamW on a flat vector against torch.optim.AdamW and torch's own clipping, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines.interface import UserError
from engines.operations import OptimStep
from engines.tuning.optimizer import AdamW, Step, take

SIZE = 257


def stepped(optimizer: AdamW, values: torch.Tensor, gradient: torch.Tensor, settings: OptimStep) -> float:
    """One step by itself; gives the norm."""
    (norm,) = take([Step(optimizer, values, gradient, settings)])
    if isinstance(norm, UserError):
        raise norm
    return norm


def gradients(seed: int, scale: float) -> list[torch.Tensor]:
    """Ten gradients; some entries are always zero, as those of A are while B is zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(SIZE, generator=generator) * scale for _ in range(10)]
    return [gradient.index_fill(0, torch.arange(0, SIZE, 5), 0.0) for gradient in drawn]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.5},
        {"grad_clip_norm": 0.3},
        {"grad_clip_norm": 1e9},
        {"beta1": 0.0, "beta2": 0.999, "eps": 1e-3},
        {"beta1": 0.5, "beta2": 0.0, "weight_decay": 0.1, "grad_clip_norm": 2.0},
    ],
)
def test_equals_torch(settings: dict[str, Any], scale: float) -> None:
    """Every setting may change between steps: the learning rate does."""
    start = torch.randn(SIZE, generator=torch.Generator().manual_seed(9))
    values, weight = start.clone(), torch.nn.Parameter(start.clone())
    own, reference = AdamW(), torch.optim.AdamW([weight])
    for number, gradient in enumerate(gradients(3, scale)):
        step = OptimStep(learning_rate=1e-2 / (1 + number), **settings)
        weight.grad = gradient.clone()
        limit = step.grad_clip_norm or float("inf")
        expected = torch.nn.utils.clip_grad_norm_([weight], limit)
        reference.param_groups[0].update(
            lr=step.learning_rate,
            betas=(step.beta1, step.beta2),
            eps=step.eps,
            weight_decay=step.weight_decay,
        )
        reference.step()
        norm = stepped(own, values, gradient.clone(), step)
        assert norm == pytest.approx(float(expected), rel=1e-6)
        torch.testing.assert_close(values, weight.detach(), rtol=1e-6, atol=1e-7)
    assert own.steps == 10
    moments = reference.state[weight]
    assert own.exp_avg is not None and own.exp_avg_sq is not None
    torch.testing.assert_close(own.exp_avg, moments["exp_avg"], rtol=1e-5, atol=0)
    torch.testing.assert_close(own.exp_avg_sq, moments["exp_avg_sq"], rtol=1e-5, atol=0)


def test_the_norm_of_huge_gradients_does_not_overflow() -> None:
    """Squares of 1e30 are beyond float32."""
    norm = stepped(AdamW(), torch.zeros(4), torch.full((4,), 1e30), OptimStep(grad_clip_norm=1.0))
    assert norm == pytest.approx(2e30, rel=1e-6)


@pytest.mark.parametrize("broken", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(broken: float) -> None:
    values, optimizer = torch.ones(3), AdamW()
    stepped(optimizer, values, torch.tensor([0.5, 1.0, -1.0]), OptimStep())
    before, moment = values.clone(), optimizer.exp_avg
    assert moment is not None
    kept, gradient = moment.clone(), torch.tensor([1.0, broken, 2.0])
    with pytest.raises(UserError, match="must be finite"):
        stepped(optimizer, values, gradient, OptimStep(grad_clip_norm=1.0, weight_decay=0.5))
    assert torch.equal(values, before) and torch.equal(moment, kept) and optimizer.steps == 1
    assert gradient[0] == 1.0 and gradient[2] == 2.0


def test_untouched_weights_stay() -> None:
    """A weight that never had a gradient moves by decay alone."""
    values = torch.ones(3)
    optimizer = AdamW()
    stepped(optimizer, values, torch.tensor([0.0, 1.0, -1.0]), OptimStep(learning_rate=0.1))
    assert values.tolist() == pytest.approx([1.0, 0.9, 1.1])
    stepped(optimizer, values, torch.zeros(3), OptimStep(learning_rate=0.1, weight_decay=0.5))
    assert float(values[0]) == pytest.approx(0.95)


def test_steps_of_many_runs_are_each_what_it_is_alone() -> None:
    """Several sizes and settings in one call, one of them broken: to the last bit, for a replay may have others beside
    it."""
    settings = [
        OptimStep(learning_rate=1e-3),
        OptimStep(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=0.5),
    ]
    sizes = [1, 7, 64, 257, 5000, 40000]
    starts = [torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    together, alone = ([start.clone() for start in starts] for _ in range(2))
    ours, theirs = ([AdamW() for _ in sizes] for _ in range(2))
    for number in range(5):
        drawn = [torch.randn(size, generator=torch.Generator().manual_seed(number)) for size in sizes]
        if number == 3:
            drawn[2][0] = float("inf")
        steps = [
            Step(optimizer, values, gradient.clone(), settings[(i + number) % 2])
            for i, (optimizer, values, gradient) in enumerate(zip(ours, together, drawn, strict=True))
        ]
        norms = take(steps)
        for i, gradient in enumerate(drawn):
            (norm,) = take([Step(theirs[i], alone[i], gradient.clone(), settings[(i + number) % 2])])
            assert isinstance(norms[i], UserError) if number == 3 and i == 2 else norm == norms[i]
    for mine, other in zip(together, alone, strict=True):
        assert torch.equal(mine, other)
    assert [optimizer.steps for optimizer in ours] == [5, 5, 4, 5, 5, 5]
    assert not torch.equal(together[2], starts[2])


def test_no_steps_at_all() -> None:
    assert take([]) == []
