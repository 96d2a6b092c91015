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
from engines.hf.lora import Adapter, Segment
from engines.hf.losses import Judge, judge_of
from engines.hf.model import BaseModel
from engines.hf.optimizer import AdamW
from engines.interface import UserError
from engines.operations import Forward, ForwardBackward, ForwardResult, OptimStep
from engines.tensors import Tensor as Bytes

VECTORS = 4
"""Vectors of an adapter's size that a run holds at most: its values, the gradient, both moments of the optimizer."""


@dataclass
class Run:
    """A fine-tuning in progress. `pending` is the gradient since the last step, float32 like `adapter.values`."""

    adapter: Adapter
    optimizer: AdamW
    pending: Tensor | None = None


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
        self.gradient: Tensor | None = None
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

    def add(self, gradient: Tensor) -> None:
        """Take the gradient of one pass."""
        self.gradient = gradient if self.gradient is None else self.gradient.add_(gradient)

    def apply(self) -> None:
        """Add the gradient to the run's own."""
        if self.gradient is not None:
            pending = self.run.pending
            self.run.pending = self.gradient if pending is None else pending.add_(self.gradient)


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
            logprobs = _logprobs(base, shares, batch)
            _judge(shares, batch, logprobs, len(passes), with_slope=False)
            passes.append(logprobs)
    return _split(shares, passes)


def forward_backward(
    base: BaseModel, items: Sequence[tuple[Run, ForwardBackward]], pass_tokens: int, *, together: bool
) -> list[ForwardResult | UserError]:
    """The same, and each gradient is added to its run's. UserError, without effect, where anything is not finite."""
    shares = [Share(run, operation) for run, operation in items]
    leaves = [run.adapter.leaves() for run, _ in items]
    passes: list[Tensor] = []
    for batch in collate(base, [operation for _, operation in items], pass_tokens, together=together):
        logprobs = _logprobs(base, shares, batch)
        slope = _judge(shares, batch, logprobs.detach(), len(passes), with_slope=True)
        _differentiate(shares, leaves, batch, logprobs, slope)
        passes.append(logprobs.detach())
    outcomes = _split(shares, passes)
    for share, outcome in zip(shares, outcomes, strict=True):
        if not isinstance(outcome, UserError):
            share.apply()
    return outcomes


def optim_step(run: Run, settings: OptimStep) -> float:
    """One optimizer step with the pending gradient, which is used up; gives its norm before clipping.

    Without a pending gradient nothing changes and the norm is 0. UserError, without effect, when sums of finite
    gradients have left float32's range.
    """
    if run.pending is None:
        return 0.0
    norm = run.optimizer.step(run.adapter.values, run.pending, settings)
    run.pending = None
    return norm


def _logprobs(base: BaseModel, shares: Sequence[Share], batch: Batch) -> Tensor:
    """Log-probs float32 [T, K] of the targets."""
    segments = [
        Segment(shares[piece.operation].run.adapter, piece.rows.start, piece.rows.stop)
        for piece in batch.pieces
    ]
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


def _differentiate(
    shares: Sequence[Share], leaves: Sequence[list[Tensor]], batch: Batch, logprobs: Tensor, slope: Tensor
) -> None:
    """Give each operation of the pass the gradient by the `leaves` of its run's adapter."""
    numbers = [piece.operation for piece in batch.pieces]
    wanted = [leaf for number in numbers for leaf in leaves[number]]
    grads = iter(torch.autograd.grad(logprobs, wanted, slope))
    for number in numbers:
        shares[number].add(torch.cat([next(grads).reshape(-1) for _ in leaves[number]]))


# ---------------------------------------------------------------------------- split


def _split(shares: Sequence[Share], passes: Sequence[Tensor]) -> list[ForwardResult | UserError]:
    """Read everything from the device at once and give each datum of each operation its own part."""
    losses = torch.stack([share.loss for share in shares])
    broken = torch.stack([_broken(share) for share in shares])
    totals = torch.stack([losses, broken]).tolist()
    host = [logprobs.cpu().numpy() for logprobs in passes]
    return [
        _outcome(share, host, total, gradient_broken=bool(flag))
        for share, total, flag in zip(shares, *totals, strict=True)
    ]


def _broken(share: Share) -> Tensor:
    """Float64 []: 1 when the gradient is not finite."""
    if share.gradient is None:
        return torch.zeros_like(share.loss)
    return share.gradient.isfinite().all().logical_not().to(torch.float64)


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
