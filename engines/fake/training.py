"""One training operation of one run: forward → loss → backward, datum by datum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.fake.losses import FORMULAS
from engines.fake.model import Adapter, Weights, gradient_of, log_softmax, logits_of, states_of
from engines.fake.optimizer import AdamW
from engines.interface import UserError
from engines.losses import LOSSES
from engines.operations import Datum, Forward, ForwardBackward, ForwardResult, OptimStep
from engines.tensors import Tensor

Array = NDArray[Any]


VECTORS = 4
"""Vectors of an adapter's size that a run holds at most: its values, the gradient, both moments of the optimizer."""


@dataclass
class Run:
    """A fine-tuning in progress. `pending` is the gradient since the last step, laid out like the adapter's values."""

    adapter: Adapter
    optimizer: AdamW = field(default_factory=AdamW)
    pending: Array | None = None


def forward(weights: Weights, run: Run, operation: Forward) -> ForwardResult:
    """Losses and log-probs; the run does not change. UserError when the loss is not finite."""
    return _evaluate(weights, run.adapter, operation, None)


def forward_backward(weights: Weights, run: Run, operation: ForwardBackward) -> ForwardResult:
    """The same, and the gradient is added to the run's. UserError, without effect, when anything is not finite."""
    gradient = np.zeros_like(run.adapter.values)
    result = _evaluate(weights, run.adapter, operation, gradient)
    with np.errstate(over="ignore", invalid="ignore"):  # a step refuses what is not finite
        run.pending = gradient if run.pending is None else run.pending + gradient
    return result


def optim_step(run: Run, settings: OptimStep) -> float:
    """One step with the pending gradient, which is used up; gives its norm. Without one nothing changes, it is 0.

    UserError, without effect, when sums of finite gradients have left float32's range.
    """
    if run.pending is None:
        return 0.0
    norm = run.optimizer.step(run.adapter.values, run.pending, settings)
    run.pending = None
    return norm


def _evaluate(
    weights: Weights, adapter: Adapter, operation: Forward | ForwardBackward, gradient: Array | None
) -> ForwardResult:
    """The result of a pass; the gradient is added to `gradient` if there is one."""
    config = LOSSES[operation.loss].with_defaults(operation.loss_config)
    outputs = []
    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
        for datum in operation.data:
            logprobs, loss = _pass(weights, adapter, datum, operation.loss, config, gradient)
            outputs.append({"logprobs": Tensor.of(logprobs)})
            total += loss
    if not np.isfinite(total) or (gradient is not None and not np.isfinite(gradient).all()):
        what = f"loss is {total}" if not np.isfinite(total) else "gradient is not finite"
        raise UserError(
            f"{operation.loss}: the {what}; check the loss inputs, and whether earlier steps have made the weights "
            "diverge. The operation had no effect."
        )
    return ForwardResult(outputs=outputs, metrics={"loss:sum": total})


def _pass(
    weights: Weights,
    adapter: Adapter,
    datum: Datum,
    loss: str,
    config: dict[str, float],
    gradient: Array | None,
) -> tuple[Array, float]:
    """Log-probs of the targets, of their shape, and the summed loss of one datum."""
    inputs: dict[str, Array] = {name: tensor.array() for name, tensor in datum.loss_inputs.items()}
    targets: Array = inputs["target_tokens"]
    columns = targets.reshape(len(targets), -1)
    states = states_of(weights, adapter, datum.tokens.array())
    scores = log_softmax(logits_of(weights, adapter, states.y))
    logprobs = np.take_along_axis(scores, columns, axis=1).reshape(targets.shape)
    losses, slopes = FORMULAS[loss](logprobs, inputs, config)
    if gradient is not None:
        slopes = slopes.reshape(columns.shape)
        grad_logits = -np.exp(scores) * slopes.sum(axis=1, keepdims=True)
        np.add.at(grad_logits, (np.arange(len(columns))[:, None], columns), slopes)
        gradient += gradient_of(weights, adapter, states, grad_logits)
    return logprobs, float(losses.sum(dtype=np.float64))
