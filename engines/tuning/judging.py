"""From the log-probs of a pass to the loss, and to its slope: the derivative by each log-prob."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engines.graphs import CustomLoss, GraphInput
from engines.interface import UserError
from engines.losses import LOSSES
from engines.losses.formulas import FORMULAS
from engines.losses.growth import Allowance
from engines.losses.rebuilding import LossProgram, slope_of
from engines.operations import Datum, Forward, ForwardBackward


class Judged(NamedTuple):
    """The summed loss, float64 []; `slope` float32 of the shape of the log-probs, None where only the loss was
    wanted."""

    loss: Tensor
    slope: Tensor | None


class Shares(NamedTuple):
    """The data of one pass: for each its position in the operation and its rows. `inputs` are float32 [T, K]."""

    members: Sequence[int]
    rows: Sequence[slice]
    inputs: Mapping[str, Tensor]


class Judge(Protocol):
    """The loss of one operation, asked pass by pass."""

    def judge(self, logprobs: Tensor, shares: Shares, *, with_slope: bool) -> Judged:
        """The loss of log-probs float32 [T, K], which hold no graph."""

    def metrics(self) -> dict[str, float]:
        """What the loss tells besides its sum, over all passes so far."""


def judge_of(operation: Forward | ForwardBackward) -> Judge:
    """For an operation that `engines.checks` has accepted."""
    if operation.custom is not None:
        return _TracedLoss(operation.custom, operation.data)
    return _BuiltInLoss(operation)


class _BuiltInLoss:
    def __init__(self, operation: Forward | ForwardBackward) -> None:
        self._spec = LOSSES[operation.loss]
        self._formula = FORMULAS[operation.loss]
        self._settings = self._spec.with_defaults(operation.loss_config)

    def judge(self, logprobs: Tensor, shares: Shares, *, with_slope: bool) -> Judged:
        def total(leaf: Tensor) -> Tensor:
            return self._losses(leaf, shares).sum(dtype=torch.float64)

        return _evaluated(total, logprobs, with_slope=with_slope)

    def metrics(self) -> dict[str, float]:
        return {}

    def _losses(self, logprobs: Tensor, shares: Shares) -> Tensor:
        """Of all tokens at once, or of each datum by itself."""
        if not self._spec.per_sequence:
            return self._formula(logprobs, shares.inputs, self._settings)
        parts = []
        for own in shares.rows:
            inputs = {name: values[own] for name, values in shares.inputs.items()}
            parts.append(self._formula(logprobs[own], inputs, self._settings))
        return torch.cat(parts)


def _evaluated(total: Callable[[Tensor], Tensor], logprobs: Tensor, *, with_slope: bool) -> Judged:
    if not with_slope:
        return Judged(total(logprobs), None)
    leaf = logprobs.detach().requires_grad_()
    value = total(leaf)
    (slope,) = torch.autograd.grad(value, leaf)
    return Judged(value.detach(), slope)


class _TracedLoss:
    """Datum by datum on the CPU, where a client's own SDK would compute it; what it leaves is freed after each."""

    def __init__(self, loss: CustomLoss, data: Sequence[Datum]) -> None:
        self._program = LossProgram(loss)
        self._inputs = loss.inputs[1:]
        self._data = data
        self._allowance = Allowance()
        self._sums: Counter[str] = Counter()

    def judge(self, logprobs: Tensor, shares: Shares, *, with_slope: bool) -> Judged:
        host = logprobs.detach().cpu()
        slope = torch.zeros_like(host)
        total = 0.0
        for member, own in zip(shares.members, shares.rows, strict=True):
            shape = self._data[member].loss_inputs["target_tokens"].shape
            width = shape[1] if len(shape) == 2 else 1
            leaf = host[own, :width].reshape(shape).clone().requires_grad_(with_slope)
            try:
                loss = self._run(leaf, self._data[member])
                total += float(loss.detach())
                if with_slope:
                    slope[own, :width] = slope_of(loss, leaf).reshape(-1, width)
            except UserError as error:
                raise UserError(f"data[{member}]: {error}") from error
        value = torch.tensor(total, dtype=torch.float64, device=logprobs.device)
        return Judged(value, slope.to(logprobs.device) if with_slope else None)

    def metrics(self) -> dict[str, float]:
        """Sums over the data, or means."""
        count = len(self._data)
        return {
            name: value / count if name.endswith(":mean") else value for name, value in self._sums.items()
        }

    def _run(self, logprobs: Tensor, datum: Datum) -> Tensor:
        inputs = [_input(datum, entry) for entry in self._inputs]
        with torch.set_grad_enabled(logprobs.requires_grad):
            loss, metrics = self._program.run([logprobs, *inputs], self._allowance)
        for name, value in metrics.items():
            self._sums[name] += value  # type: ignore[assignment]
        return loss


def _input(datum: Datum, entry: GraphInput) -> Tensor:
    """A tensor of its own, since a loss may write to it."""
    values = torch.from_numpy(datum.loss_inputs[entry.name].array().copy())
    return values.reshape(()) if entry.rank == 0 else values
