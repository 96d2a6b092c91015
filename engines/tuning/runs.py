"""A run in memory, and an operation's way through the passes of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engines.interface import UserError
from engines.operations import ForwardResult, OptimStep
from engines.tuning.collating import Batch, Operation, Piece
from engines.tuning.judging import Judge, judge_of
from engines.tuning.lora import Adapter, Gradient, Segment
from engines.tuning.optimizer import AdamW, Step, take

VECTORS = 4
"""Vectors of an adapter's size that a run holds at most: its values, the gradient, both moments of the optimizer."""


@dataclass
class Run:
    """A fine-tuning in progress. `pending` is the gradient since the last step; `spare` is memory for
    the next one, kept while there is no pending one."""

    adapter: Adapter
    optimizer: AdamW
    pending: Gradient | None = None
    spare: Gradient | None = None

    def new_gradient(self) -> Gradient:
        """One that is zero; it is the caller's until it is `pending` or given back as `spare`."""
        gradient, self.spare = self.spare, None
        if gradient is None:
            return Gradient(self.adapter)
        gradient.values.zero_()
        return gradient


class Rows(NamedTuple):
    """Where the log-probs of some data of an operation are: the rows of `piece` in pass `number`."""

    number: int
    piece: Piece


class Share:
    """One operation on its way through the passes of a call, and what they leave of it on the device."""

    def __init__(self, run: Run, operation: Operation) -> None:
        self.run = run
        self.operation = operation
        self.judge: Judge | None = None
        self.loss = torch.zeros((), dtype=torch.float64, device=run.adapter.values.device)
        self.rows: list[Rows] = []
        self.gradient: Gradient | None = None
        self.refusal: UserError | None = None

    def judged(self, logprobs: Tensor, piece: Piece, *, with_slope: bool) -> Tensor:
        """Take the loss of the piece's own log-probs [T, K]; gives its slope, the derivative by each of them.

        Data that the loss refuses have none: the operation fails in the end.
        """
        try:
            self.judge = self.judge or judge_of(self.operation)
            judged = self.judge.judge(logprobs, piece.shares, with_slope=with_slope)
        except UserError as error:
            self.refusal = self.refusal or error
            return torch.zeros_like(logprobs)
        self.loss += judged.loss
        return torch.zeros_like(logprobs) if judged.slope is None else judged.slope

    def segment(self, rows: slice, *, with_gradient: bool) -> Segment:
        """Rows of a pass that belong to the operation's run."""
        if with_gradient and self.gradient is None:
            self.gradient = self.run.new_gradient()
        return Segment(self.run.adapter, rows.start, rows.stop, self.gradient)

    def apply(self) -> None:
        """Add the gradient to the run's own."""
        run = self.run
        if run.pending is None:
            run.pending = self.gradient
        elif self.gradient is not None:
            run.pending.values.add_(self.gradient.values)

    def discard(self) -> None:
        """The operation has no effect."""
        if self.run.pending is None:
            self.run.spare = self.gradient


def shares_of(items: Sequence[tuple[Run, Operation]]) -> list[Share]:
    """Of the operations of one call, each of another run: each has the run's spare gradient to itself, and they may be
    computed by several threads."""
    assert len({id(run) for run, _ in items}) == len(items), "two operations of one run in a call"
    return [Share(run, operation) for run, operation in items]


def segments_of(shares: Sequence[Share], batch: Batch, *, with_gradient: bool) -> list[Segment]:
    """What each run owns of a pass."""
    return [
        shares[piece.operation].segment(piece.rows, with_gradient=with_gradient) for piece in batch.pieces
    ]


def judge(
    shares: Sequence[Share], batch: Batch, logprobs: Tensor, number: int, *, with_slope: bool
) -> Tensor:
    """Each operation's loss of pass `number`; gives the slope by all log-probs, float32 [T, K]."""
    slopes = []
    for piece in batch.pieces:
        share = shares[piece.operation]
        share.rows.append(Rows(number, piece))
        slopes.append(share.judged(logprobs[piece.rows], piece, with_slope=with_slope))
    return slopes[0] if len(slopes) == 1 else torch.cat(slopes)


def check(share: Share) -> Tensor:
    """Float64 []: not finite when the gradient is not, for finite float32 numbers have a finite sum in float64."""
    if share.gradient is None:
        return torch.zeros_like(share.loss)
    return share.gradient.values.sum(dtype=torch.float64)


def not_finite(operation: Operation, loss: float) -> UserError:
    """What an operation is refused with whose loss, or else its gradient, is not finite."""
    what = f"loss is {loss}" if not np.isfinite(loss) else "gradient holds infinities or NaN"
    return UserError(
        f"{operation.loss}: the {what}; check the loss inputs, and whether earlier steps have made the weights "
        "diverge. The operation had no effect."
    )


def settle(shares: Sequence[Share], outcomes: Sequence[ForwardResult | UserError]) -> None:
    """Add the gradient of each operation to its run's own, unless it was refused."""
    for share, outcome in zip(shares, outcomes, strict=True):
        if isinstance(outcome, UserError):
            share.discard()
        else:
            share.apply()


class Parts(Protocol):
    """Where several processes hold one run: how its gradients' norms are told, and who steps which of its values."""

    def norms(self, gradients: Sequence[Gradient]) -> Sequence[float]:
        """Of whole gradients, of which the runs here hold parts."""

    def take(self, run: Run, vector: Tensor) -> Tensor:
        """What this process steps of a vector of the run's values; the optimizer's moments are of this shape."""

    def put(self, run: Run, own: Tensor) -> None:
        """Have the run's values hold what each process has made of its own."""


def optim_step(items: Sequence[tuple[Run, OptimStep]], parts: Parts | None = None) -> list[float | UserError]:
    """One optimizer step of each run with its pending gradient, which is used up; gives its norm before clipping.

    Without a pending gradient nothing changes and the norm is 0. UserError, without effect, where sums of finite
    gradients have left float32's range.
    """
    due = [(run, run.pending, settings) for run, settings in items if run.pending is not None]
    if parts is None:
        steps = [Step(run.optimizer, run.adapter.values, own.values, wanted) for run, own, wanted in due]
        taken = iter(take(steps))
    else:
        norms = parts.norms([own for _, own, _ in due])
        steps = [
            Step(run.optimizer, parts.take(run, run.adapter.values), parts.take(run, own.values), wanted)
            for run, own, wanted in due
        ]
        taken = iter(take(steps, norms))
        for (run, _, _), step in zip(due, steps, strict=True):
            parts.put(run, step.values)
    outcomes: list[float | UserError] = []
    for run, _ in items:
        norm = next(taken) if run.pending is not None else 0.0
        if not isinstance(norm, UserError) and run.pending is not None:
            run.spare, run.pending = run.pending, None
        outcomes.append(norm)
    return outcomes
