"""One training operation: collate -> forward -> loss -> backward -> split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.hf.attention import PackedLayout
from engines.hf.lora import Adapter, Segment
from engines.hf.losses import Shares, judge_of
from engines.hf.model import BaseModel, Pack
from engines.hf.optimizer import AdamW
from engines.interface import UserError
from engines.losses import LOSSES
from engines.operations import Datum, Forward, ForwardBackward, ForwardResult, OptimStep
from engines.tensors import Tensor as Bytes


@dataclass
class Run:
    """A fine-tuning in progress. `pending` is the gradient since the last step, float32 like `adapter.values`."""

    adapter: Adapter
    optimizer: AdamW
    pending: Tensor | None = None


class Batch(NamedTuple):
    """The data of one pass, one after the other. `targets` int64 and the inputs are [T, K] on the device, K the largest
    of the data; what pads a datum to K has weight 0."""

    pack: Pack
    layout: PackedLayout
    targets: Tensor
    shares: Shares


class Passed(NamedTuple):
    """What one pass leaves on the device: log-probs float32 [T, K] and the summed loss, float64 []."""

    batch: Batch
    logprobs: Tensor
    loss: Tensor


def forward(base: BaseModel, run: Run, operation: Forward, pass_tokens: int) -> ForwardResult:
    """Losses and log-probs; the run does not change. UserError when the loss is not finite."""
    judge = judge_of(operation)
    passes = []
    with torch.no_grad():
        for batch in collate(base, operation, pass_tokens):
            logprobs = _logprobs(base, run.adapter, batch)
            judged = judge.judge(logprobs, batch.shares, with_slope=False)
            passes.append(Passed(batch, logprobs, judged.loss))
    return _split(operation, passes, None, judge.metrics())


def forward_backward(
    base: BaseModel, run: Run, operation: ForwardBackward, pass_tokens: int
) -> ForwardResult:
    """The same, and the gradient is added to the run's. UserError, without effect, when anything is not finite."""
    judge = judge_of(operation)
    leaves = run.adapter.leaves()
    gradient = None
    passes = []
    for batch in collate(base, operation, pass_tokens):
        logprobs = _logprobs(base, run.adapter, batch)
        judged = judge.judge(logprobs.detach(), batch.shares, with_slope=True)
        grads = torch.autograd.grad(logprobs, leaves, judged.slope)
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        gradient = flat if gradient is None else gradient.add_(flat)
        passes.append(Passed(batch, logprobs.detach(), judged.loss))
    result = _split(operation, passes, gradient, judge.metrics())
    run.pending = gradient if run.pending is None or gradient is None else run.pending.add_(gradient)
    return result


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


def _logprobs(base: BaseModel, adapter: Adapter, batch: Batch) -> Tensor:
    """Log-probs float32 [T, K] of the targets."""
    segments = (Segment(adapter, 0, batch.targets.shape[0]),)
    hidden = base.hidden(batch.pack, batch.layout, segments)
    return base.unembedding.logprobs(hidden, batch.targets, segments)


# ---------------------------------------------------------------------------- collate


def collate(base: BaseModel, operation: Forward | ForwardBackward, pass_tokens: int) -> Iterator[Batch]:
    """Pack the data, shortest first, into passes of at most `pass_tokens` tokens (a longer datum goes alone)."""
    for members in _fill(operation.data, pass_tokens):
        data = [operation.data[i] for i in members]
        width = max(_width(datum) for datum in data)
        targets = torch.from_numpy(_rows(data, "target_tokens", width, np.int64))
        lengths = [datum.tokens.shape[0] for datum in data]
        ends = list(accumulate(lengths))
        yield Batch(
            base.pack([datum.tokens.array() for datum in data]),
            PackedLayout(lengths),
            targets.to(base.device, non_blocking=True),
            Shares(
                members,
                [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)],
                _inputs(base, operation, data, width),
            ),
        )


def _inputs(
    base: BaseModel, operation: Forward | ForwardBackward, data: Sequence[Datum], width: int
) -> dict[str, Tensor]:
    """The loss inputs besides the targets; of the settings per token those that any of the data brings. A traced loss
    takes its own from the data."""
    if operation.custom is not None:
        return {}
    spec = LOSSES[operation.loss]
    settings = spec.with_defaults(operation.loss_config)
    names = [name for name in spec.inputs if name != "target_tokens"]
    names += [name for name in spec.per_token if any(name in datum.loss_inputs for datum in data)]
    rows = [_rows(data, name, width, np.float32, settings.get(name)) for name in names]
    inputs = torch.from_numpy(np.stack(rows)).to(base.device, non_blocking=True)
    return dict(zip(names, inputs, strict=True))


def _fill(data: Sequence[Datum], pass_tokens: int) -> Iterator[list[int]]:
    """Positions of the data of each pass. Sorted by length, so that equal lengths attend in one call."""
    members: list[int] = []
    tokens = 0
    for i in sorted(range(len(data)), key=lambda i: data[i].tokens.shape[0]):
        length = data[i].tokens.shape[0]
        if members and tokens + length > pass_tokens:
            yield members
            members, tokens = [], 0
        members.append(i)
        tokens += length
    if members:
        yield members


def _width(datum: Datum) -> int:
    """K of a datum; 1 for targets of shape [N]."""
    shape = datum.loss_inputs["target_tokens"].shape
    return shape[1] if len(shape) == 2 else 1


def _rows(
    data: Sequence[Datum], name: str, width: int, dtype: type[np.generic], setting: float | None = None
) -> NDArray[np.generic]:
    """One loss input of all data as [T, width], padded with zeros on the right. A datum that lacks it has the setting
    for every token."""
    parts = []
    for datum in data:
        length = datum.tokens.shape[0]
        given = datum.loss_inputs.get(name)
        part = np.full((length, width), setting) if given is None else given.array().reshape(length, -1)
        parts.append(np.pad(part, ((0, 0), (0, width - part.shape[1]))) if part.shape[1] < width else part)
    return np.concatenate(parts).astype(dtype, copy=False)


# ---------------------------------------------------------------------------- split


def _split(
    operation: Forward | ForwardBackward,
    passes: Sequence[Passed],
    gradient: Tensor | None,
    metrics: dict[str, float],
) -> ForwardResult:
    """Read everything from the device at once and give each datum its own part."""
    loss = torch.stack([done.loss for done in passes]).sum()
    numbers = [loss, torch.zeros_like(loss) if gradient is None else gradient.isfinite().all().logical_not()]
    total, broken = torch.stack([number.to(torch.float64) for number in numbers]).tolist()
    if not np.isfinite(total) or broken:
        what = f"loss is {total}" if not np.isfinite(total) else "gradient holds infinities or NaN"
        raise UserError(
            f"{operation.loss}: the {what}; check the loss inputs, and whether earlier steps have made the weights "
            "diverge. The operation had no effect."
        )
    outputs: list[dict[str, Bytes]] = [{} for _ in operation.data]
    for done in passes:
        rows = done.logprobs.cpu().numpy()
        start = 0
        for i in done.batch.shares.members:
            datum = operation.data[i]
            stop = start + datum.tokens.shape[0]
            shape = datum.loss_inputs["target_tokens"].shape
            outputs[i] = {"logprobs": Bytes.of(rows[start:stop, : _width(datum)].reshape(shape))}
            start = stop
    return ForwardResult(outputs=outputs, metrics={**metrics, "loss:sum": total})
