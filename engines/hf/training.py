"""The operations of several runs in common passes: collate -> forward -> loss -> backward -> split.

Rows of different runs never meet: attention stays within a sequence, each adapter is applied to its own segment, and
each loss is computed from its own operation's rows. What is not finite in one of them leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.hf.collating import Batch, Operation, Piece, collate, width_of
from engines.hf.lora import ANCHOR, Adapter, Gradient, Segment
from engines.hf.losses import Judge, judge_of
from engines.hf.model import BaseModel
from engines.hf.optimizer import AdamW, Step, take
from engines.interface import UserError
from engines.operations import Forward, ForwardBackward, ForwardResult, OptimStep
from engines.tensors import Tensor as Bytes

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


def forward(
    base: BaseModel, items: Sequence[tuple[Run, Forward]], pass_tokens: int, *, together: bool
) -> list[ForwardResult | UserError]:
    """Losses and log-probs of operations of different runs, in common passes if `together`; no run changes.

    UserError where the loss is not finite, or refuses its data.
    """
    shares = [Share(run, operation) for run, operation in items]
    passes: list[Tensor] = []
    with torch.no_grad():
        for batch in collate(base, [operation for _, operation in items], pass_tokens, together=together):
            segments = _segments(shares, batch, with_gradient=False)
            logprobs = _logprobs(base, batch, segments)
            _judge(shares, batch, logprobs, len(passes), with_slope=False)
            passes.append(logprobs)
    return _split(shares, passes)


def forward_backward(
    base: BaseModel, items: Sequence[tuple[Run, ForwardBackward]], pass_tokens: int, *, together: bool
) -> list[ForwardResult | UserError]:
    """The same, and each gradient is added to its run's. UserError, without effect, where anything is not finite."""
    shares = [Share(run, operation) for run, operation in items]
    passes: list[Tensor] = []
    for batch in collate(base, [operation for _, operation in items], pass_tokens, together=together):
        segments = _segments(shares, batch, with_gradient=True)
        logprobs = _logprobs(base, batch, segments)
        slope = _judge(shares, batch, logprobs.detach(), len(passes), with_slope=True)
        with base.routing.along(segments):  # of layers that are computed again
            torch.autograd.grad(logprobs, ANCHOR, slope, allow_unused=True)  # adds to the segments' gradients
        passes.append(logprobs.detach())
    outcomes = _split(shares, passes)
    for share, outcome in zip(shares, outcomes, strict=True):
        if isinstance(outcome, UserError):
            share.discard()
        else:
            share.apply()
    return outcomes


def optim_step(items: Sequence[tuple[Run, OptimStep]]) -> list[float | UserError]:
    """One optimizer step of each run with its pending gradient, which is used up; gives its norm before clipping.

    Without a pending gradient nothing changes and the norm is 0. UserError, without effect, where sums of finite
    gradients have left float32's range.
    """
    due = [(run, run.pending, settings) for run, settings in items if run.pending is not None]
    taken = iter(
        take([Step(run.optimizer, run.adapter.values, own.values, wanted) for run, own, wanted in due])
    )
    norms: list[float | UserError] = []
    for run, _ in items:
        norm = next(taken) if run.pending is not None else 0.0
        if not isinstance(norm, UserError) and run.pending is not None:
            run.spare, run.pending = run.pending, None
        norms.append(norm)
    return norms


def _segments(shares: Sequence[Share], batch: Batch, *, with_gradient: bool) -> list[Segment]:
    return [
        shares[piece.operation].segment(piece.rows, with_gradient=with_gradient) for piece in batch.pieces
    ]


def _logprobs(base: BaseModel, batch: Batch, segments: Sequence[Segment]) -> Tensor:
    """Log-probs float32 [T, K] of the targets."""
    hidden = base.hidden(batch.pack, batch.layout, segments)
    return base.unembedding.logprobs(hidden, batch.targets, segments)


def _judge(
    shares: Sequence[Share], batch: Batch, logprobs: Tensor, number: int, *, with_slope: bool
) -> Tensor:
    """Each operation's loss of pass `number`; gives the slope by all log-probs, float32 [T, K]."""
    slopes = []
    for piece in batch.pieces:
        share = shares[piece.operation]
        share.rows.append(Rows(number, piece))
        slopes.append(share.judged(logprobs[piece.rows], piece, with_slope=with_slope))
    return slopes[0] if len(slopes) == 1 else torch.cat(slopes)


# ---------------------------------------------------------------------------- split


def _split(shares: Sequence[Share], passes: Sequence[Tensor]) -> list[ForwardResult | UserError]:
    """Read everything from the device at once and give each datum of each operation its own part."""
    losses = torch.stack([share.loss for share in shares])
    checks = torch.stack([_check(share) for share in shares])
    totals = torch.stack([losses, checks]).tolist()
    host = [logprobs.cpu().numpy() for logprobs in passes]
    return [
        _outcome(share, host, total, gradient_broken=not np.isfinite(checked))
        for share, total, checked in zip(shares, *totals, strict=True)
    ]


def _check(share: Share) -> Tensor:
    """Float64 []: not finite when the gradient is not, for finite float32 numbers have a finite sum in float64."""
    if share.gradient is None:
        return torch.zeros_like(share.loss)
    return share.gradient.values.sum(dtype=torch.float64)


def _outcome(
    share: Share, host: Sequence[NDArray[np.float32]], loss: float, *, gradient_broken: bool
) -> ForwardResult | UserError:
    operation = share.operation
    if share.refusal is not None:
        return share.refusal
    if not np.isfinite(loss) or gradient_broken:
        what = f"loss is {loss}" if not np.isfinite(loss) else "gradient holds infinities or NaN"
        return UserError(
            f"{operation.loss}: the {what}; check the loss inputs, and whether earlier steps have made the weights "
            "diverge. The operation had no effect."
        )
    outputs: list[dict[str, Bytes]] = [{} for _ in operation.data]
    for number, piece in share.rows:
        rows = host[number][piece.rows]
        for member, own in zip(piece.shares.members, piece.shares.rows, strict=True):
            datum = operation.data[member]
            shape = datum.loss_inputs["target_tokens"].shape
            outputs[member] = {"logprobs": Bytes.of(rows[own, : width_of(datum)].reshape(shape))}
    metrics = {} if share.judge is None else share.judge.metrics()
    return ForwardResult(outputs=outputs, metrics={**metrics, "loss:sum": loss})
