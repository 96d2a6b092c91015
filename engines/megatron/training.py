"""The operations of several runs on one rank: share out → collate → schedule → sum gradients → agree.

Data of a call are divided among the data ranks, packed into micro-batches, and go through the stages by
megatron-core's schedule. The last stage turns log-probs into losses, as on any engine. Every rank then hears what all
others have found, and comes to the same decision: an operation takes effect on all of them, or on none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.interface import UserError
from engines.megatron.calls import (
    Scores,
    Verdict,
    decode_scores,
    decode_squares,
    decode_verdicts,
    encode,
)
from engines.megatron.groups import Groups
from engines.megatron.megatron_core import get_forward_backward_func, parallel_state
from engines.megatron.model import Stage
from engines.megatron.moments import Ownership, ownership
from engines.megatron.places import Place
from engines.megatron.portions import Portion, empty, padded, pooled, portion
from engines.megatron.sharding import sum_gradients
from engines.megatron.without_cuda import WithoutCuda
from engines.operations import ForwardResult, OptimStep
from engines.ranks.world import World
from engines.tensors import Tensor as Bytes
from engines.tuning.collating import Batch, Operation, collate, width_of
from engines.tuning.lora import Adapter, Gradient
from engines.tuning.runs import (
    Run,
    Share,
    check,
    judge,
    not_finite,
    optim_step,
    segments_of,
    settle,
    shares_of,
)


class Trainer:
    """One rank's part of passes and steps. Every rank is called with the same operations."""

    def __init__(
        self,
        stage: Stage,
        world: World,
        without_cuda: WithoutCuda | None,
        groups: Groups,
        pass_tokens: int,
        *,
        together: bool,
    ) -> None:
        self._stage = stage
        self._world = world
        self._without_cuda = without_cuda
        self._pass_tokens = pass_tokens
        self._groups = groups
        self._together = together

    def forward(self, items: Sequence[tuple[Run, Operation]]) -> list[ForwardResult | UserError]:
        """Losses and log-probs; no run changes. The results are complete on rank 0, and without outputs elsewhere."""
        shares = shares_of(items)
        with torch.no_grad():
            passes = self._passes(shares, backward=False)
        return self._agree(shares, passes)

    def forward_backward(self, items: Sequence[tuple[Run, Operation]]) -> list[ForwardResult | UserError]:
        """The same, and each gradient is added to its run's, unless anything of it is not finite on any rank."""
        shares = shares_of(items)
        gradients = []
        for share in shares:
            share.gradient = share.run.new_gradient()
            gradients.append(share.gradient)
        passes = self._passes(shares, backward=True)
        sum_gradients(
            self._stage.sharding,
            gradients,
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_data_parallel_group(),
            self._groups.expert_copies,
        )
        outcomes = self._agree(shares, passes)
        settle(shares, outcomes)
        return outcomes

    def optim_step(self, items: Sequence[tuple[Run, OptimStep]]) -> list[float | UserError]:
        """One step of each run; gives the norm of its gradient over all ranks, before clipping."""
        return optim_step(items, self)

    def norms(self, gradients: Sequence[Gradient]) -> list[float]:
        """Of whole gradients, from the squares of the parts that the ranks hold."""
        squares = [self._stage.sharding.square(gradient) for gradient in gradients]
        told = [decode_squares(said) for said in self._world.exchange(encode(squares))]
        return [math.sqrt(sum(parts)) for parts in zip(*told, strict=True)]

    def take(self, run: Run, vector: Tensor) -> Tensor:
        """What this rank steps of a run's vector."""
        return self.ownership(run.adapter).take(vector)

    def put(self, run: Run, own: Tensor) -> None:
        """Tell the copies of the model what this rank has stepped, and hear what they have."""
        self.ownership(run.adapter).put(own, run.adapter.values)

    def ownership(self, adapter: Adapter) -> Ownership:
        """Who steps which values of an adapter."""
        layout = self._stage.place.layout
        copies = parallel_state.get_data_parallel_group() if layout.data * layout.context > 1 else None
        return ownership(self._stage.sharding, adapter, copies, self._groups.expert_copies)

    # ------------------------------------------------------------------ passes

    def _passes(self, shares: Sequence[Share], *, backward: bool) -> list[Tensor]:
        """Run this rank's data through the stages; gives the log-probs of each pass, on the last stage."""
        stage, place = self._stage, self._stage.place
        planned = self._plan([share.operation for share in shares])
        neighbours = place.expert_neighbours()
        passes: list[Tensor] = []

        def step(numbers: Iterator[int], module: Any) -> tuple[Tensor, Any]:
            batches = planned[next(numbers)]
            segments = {
                rank: segments_of(shares, batch, with_gradient=backward) for rank, batch in batches.items()
            }
            count = padded(place.layout, max(batch.pack.tokens.shape[1] for batch in batches.values()))
            own = portion(batches[place.data], segments[place.data], self._groups.context, count)
            of_experts = list(pooled(segments, neighbours, count)) if stage.shape.experts else []
            judged = partial(self._loss, shares, batches[place.data], own, passes, backward)
            return stage.forward(own, of_experts), judged

        if planned:
            with self._around_schedule():
                get_forward_backward_func()(
                    forward_step_func=step,
                    data_iterator=iter(range(len(planned))),
                    model=[stage.module],
                    num_microbatches=len(planned),
                    seq_length=1,  # of no meaning where lengths vary
                    micro_batch_size=1,
                    forward_only=not backward,
                )
        return passes

    def _plan(self, operations: Sequence[Operation]) -> list[dict[int, Batch]]:
        """For each pass what this data rank computes in it; what all do, where ranks that share experts compute each
        other's tokens. These have as many passes, for they wait for each other in every layer."""
        layout, own = self._stage.place.layout, self._stage.place.data
        ranks = range(layout.data) if layout.expert > 1 else [own]
        members = share_out(operations, layout.data, together=self._together)
        batches = [
            list(
                collate(
                    self._stage.device,
                    operations,
                    self._pass_tokens,
                    together=self._together,
                    members=members[rank],
                )
            )
            for rank in ranks
        ]
        nothing = empty(self._stage.device)
        return [
            dict(zip(ranks, batch, strict=True))
            for batch in beside(batches, nothing, together=self._together)
        ]

    def _loss(
        self,
        shares: Sequence[Share],
        batch: Batch,
        own: Portion,
        passes: list[Tensor],
        backward: bool,
        hidden: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """On the last stage: judge a pass. The slope of the losses is the gradient of what is given back."""
        unembedding = self._stage.unembedding
        assert unembedding is not None
        logprobs = unembedding.logprobs(hidden.flatten(0, -2), own.targets, own.segments)
        whole = own.whole(logprobs.detach())
        slope = torch.zeros_like(whole)
        if batch.pieces:
            slope = judge(shares, batch, whole, len(passes), with_slope=backward)
        passes.append(whole)
        total = (logprobs * own.own(slope)).sum() if backward else logprobs.new_zeros(())
        return total, torch.zeros((), dtype=torch.int, device=hidden.device), {}

    def _around_schedule(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._without_cuda is None else self._without_cuda.around_schedule()

    # ------------------------------------------------------------------ agree

    def _agree(self, shares: Sequence[Share], passes: Sequence[Tensor]) -> list[ForwardResult | UserError]:
        """One outcome for each operation, the same on every rank but for the outputs, which rank 0 has."""
        place = self._stage.place
        own = [_verdict(share) for share in shares]
        heard = [decode_verdicts(said) for said in self._world.exchange(encode(own))]
        speaks = [Place.of(place.layout, rank).speaks for rank in range(place.layout.ranks)]
        outcomes = [
            _outcome(share, verdicts, [v for v, counts in zip(verdicts, speaks, strict=True) if counts])
            for share, *verdicts in zip(shares, *heard, strict=True)
        ]
        host = [logprobs.cpu().numpy() for logprobs in passes]
        mine = list(_scores(shares, host)) if place.speaks else []
        for said in self._world.collect(encode(mine)):
            for score in decode_scores(said):
                outcome = outcomes[score.operation]
                if isinstance(outcome, ForwardResult):
                    _put(outcome, shares[score.operation].operation, score)
        return outcomes


def share_out(operations: Sequence[Operation], ranks: int, *, together: bool = True) -> list[list[list[int]]]:
    """For each data rank and each operation the positions of its data: the longest first, to whom has fewest tokens; of
    its own operation, if they are not computed together.

    A function of the data alone, so that every rank comes to the same.
    """
    shares: list[list[list[int]]] = [[[] for _ in operations] for _ in range(ranks)]
    loads = [0] * ranks
    for number, operation in enumerate(operations):
        if not together:
            loads = [0] * ranks
        lengths = [datum.tokens.shape[0] for datum in operation.data]
        for member in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            rank = loads.index(min(loads))
            shares[rank][number].append(member)
            loads[rank] += lengths[member]
    return shares


def beside(batches: Sequence[Sequence[Batch]], nothing: Batch, *, together: bool) -> list[tuple[Batch, ...]]:
    """The passes of several ranks side by side, `nothing` where one has fewer; without `together` those of one
    operation beside those of the same."""
    if together:
        return list(zip_longest(*batches, fillvalue=nothing))
    numbers = dict.fromkeys(batch.pieces[0].operation for own in batches for batch in own)
    return [
        passes
        for number in numbers
        for passes in zip_longest(
            *([batch for batch in own if batch.pieces[0].operation == number] for own in batches),
            fillvalue=nothing,
        )
    ]


def _verdict(share: Share) -> Verdict:
    refusal = None if share.refusal is None else str(share.refusal)
    metrics = {} if share.judge is None or refusal is not None else share.judge.metrics()
    return Verdict(float(share.loss), metrics, math.isfinite(float(check(share))), refusal)


def _outcome(
    share: Share, verdicts: Sequence[Verdict], speaking: Sequence[Verdict]
) -> ForwardResult | UserError:
    refusals = [verdict.refusal for verdict in speaking if verdict.refusal is not None]
    if refusals:
        return UserError(refusals[0])
    loss = sum(verdict.loss for verdict in speaking)
    if not math.isfinite(loss) or not all(verdict.sound for verdict in verdicts):
        return not_finite(share.operation, loss)
    metrics: Counter[str] = Counter()
    for verdict in speaking:
        for name, value in verdict.metrics.items():
            metrics[name] += value  # type: ignore[assignment]  # sums of the ranks' data, means over all data
    return ForwardResult([{} for _ in share.operation.data], {**metrics, "loss:sum": loss})


def _scores(shares: Sequence[Share], host: Sequence[np.ndarray[Any, Any]]) -> Iterator[Scores]:
    """Log-probs of this rank's data, each of its targets' own width."""
    for number, share in enumerate(shares):
        for of_pass, piece in share.rows:
            rows = host[of_pass][piece.rows]
            for member, own in zip(piece.shares.members, piece.shares.rows, strict=True):
                width = width_of(share.operation.data[member])
                yield Scores(number, member, np.ascontiguousarray(rows[own, :width]).tobytes())


def _put(result: ForwardResult, operation: Operation, score: Scores) -> None:
    shape = operation.data[score.member].loss_inputs["target_tokens"].shape
    result.outputs[score.member] = {"logprobs": Bytes("float32", shape, score.logprobs)}
