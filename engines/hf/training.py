"""The operations of several runs in common passes: collate -> forward -> loss -> backward -> split.

Rows of different runs never meet: attention stays within a sequence, each adapter is applied to its own segment, and
each loss is computed from its own operation's rows. What is not finite in one of them leaves the others as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.hf.model import BaseModel
from engines.interface import UserError
from engines.operations import Forward, ForwardBackward, ForwardResult
from engines.tensors import Tensor as Bytes
from engines.tuning.collating import Batch, collate, width_of
from engines.tuning.lora import ANCHOR, Segment
from engines.tuning.packed_attention import PackedLayout
from engines.tuning.runs import Run, Share, check, judge, not_finite, segments_of, settle, shares_of


def forward(
    base: BaseModel, items: Sequence[tuple[Run, Forward]], pass_tokens: int, *, together: bool
) -> list[ForwardResult | UserError]:
    """Losses and log-probs of operations of different runs, in common passes if `together`; no run changes.

    UserError where the loss is not finite, or refuses its data.
    """
    shares = shares_of(items)
    return _computed(base, shares, pass_tokens, together=together, with_gradient=False)


def forward_backward(
    base: BaseModel, items: Sequence[tuple[Run, ForwardBackward]], pass_tokens: int, *, together: bool
) -> list[ForwardResult | UserError]:
    """The same, and each gradient is added to its run's. UserError, without effect, where anything is not finite."""
    shares = shares_of(items)
    outcomes = _computed(base, shares, pass_tokens, together=together, with_gradient=True)
    settle(shares, outcomes)
    return outcomes


def _computed(
    base: BaseModel, shares: Sequence[Share], pass_tokens: int, *, together: bool, with_gradient: bool
) -> list[ForwardResult | UserError]:
    """The outcome of each, which has had no effect yet: an error of any pass may still come. Operations that go
    `together` are computed in lanes, which share the tokens that a pass may take."""
    sizes = [sum(datum.tokens.shape[0] for datum in share.operation.data) for share in shares]
    lanes = base.lanes(sizes) if together else [list(range(len(shares)))]
    most = max(1, pass_tokens // len(lanes))
    run = _forward_backward_passes if with_gradient else _forward_passes
    works = [partial(run, base, [shares[number] for number in lane], most, together) for lane in lanes]
    with base.strict():
        found = dict(zip(chain(*lanes), chain(*base.threads.side_by_side(works)), strict=True))
    return [found[number] for number in range(len(shares))]


def _forward_passes(
    base: BaseModel, shares: Sequence[Share], pass_tokens: int, together: bool
) -> list[ForwardResult | UserError]:
    operations = [share.operation for share in shares]
    passes: list[Tensor] = []
    with torch.no_grad():
        for batch in collate(base.device, operations, pass_tokens, together=together):
            segments = segments_of(shares, batch, with_gradient=False)
            logprobs = _logprobs(base, batch, segments)
            judge(shares, batch, logprobs, len(passes), with_slope=False)
            passes.append(logprobs)
    return _split(shares, passes)


def _forward_backward_passes(
    base: BaseModel, shares: Sequence[Share], pass_tokens: int, together: bool
) -> list[ForwardResult | UserError]:
    """Leaves each operation's gradient with its share."""
    operations = [share.operation for share in shares]
    passes: list[Tensor] = []
    for batch in collate(base.device, operations, pass_tokens, together=together):
        segments = segments_of(shares, batch, with_gradient=True)
        with base.routing.along(segments):  # on the way back too, for layers that are computed again
            logprobs = _logprobs(base, batch, segments)
            slope = judge(shares, batch, logprobs.detach(), len(passes), with_slope=True)
            with torch.autograd.set_multithreading_enabled(False):  # in this thread, where the routing holds
                torch.autograd.grad(
                    logprobs, ANCHOR, slope, allow_unused=True
                )  # adds to the segments' gradients
        passes.append(logprobs.detach())
    return _split(shares, passes)


def _logprobs(base: BaseModel, batch: Batch, segments: Sequence[Segment]) -> Tensor:
    """Log-probs float32 [T, K] of the targets."""
    hidden = base.hidden(batch.pack, PackedLayout(batch.lengths), segments)
    return base.unembedding.logprobs(hidden, batch.targets, segments)


# ---------------------------------------------------------------------------- split


def _split(shares: Sequence[Share], passes: Sequence[Tensor]) -> list[ForwardResult | UserError]:
    """Read everything from the device at once and give each datum of each operation its own part."""
    losses = torch.stack([share.loss for share in shares])
    checks = torch.stack([check(share) for share in shares])
    totals = torch.stack([losses, checks]).tolist()
    host = [logprobs.cpu().numpy() for logprobs in passes]
    return [
        _outcome(share, host, total, gradient_broken=not np.isfinite(checked))
        for share, total, checked in zip(shares, *totals, strict=True)
    ]


def _outcome(
    share: Share, host: Sequence[NDArray[np.float32]], loss: float, *, gradient_broken: bool
) -> ForwardResult | UserError:
    operation = share.operation
    if share.refusal is not None:
        return share.refusal
    if not np.isfinite(loss) or gradient_broken:
        return not_finite(operation, loss)
    outputs: list[dict[str, Bytes]] = [{} for _ in operation.data]
    for number, piece in share.rows:
        rows = host[number][piece.rows]
        for member, own in zip(piece.shares.members, piece.shares.rows, strict=True):
            datum = operation.data[member]
            shape = datum.loss_inputs["target_tokens"].shape
            outputs[member] = {"logprobs": Bytes.of(rows[own, : width_of(datum)].reshape(shape))}
    metrics = {} if share.judge is None else share.judge.metrics()
    return ForwardResult(outputs=outputs, metrics={**metrics, "loss:sum": loss})
