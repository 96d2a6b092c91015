"""Decoding steps as CUDA graphs: the thousand kernels of a step are launched in one call.

A step of few rows keeps a device busy for less time than its kernels take to launch. Steps of one form (rows, reach,
adapters' shape; the first two rounded up) are therefore recorded when they have come up a few times, and replayed from
then on. What changes from step to step lies in memory that stays where it is: tokens, positions, slots, and a table of
the adapters at work. Rows that fill up a form decode a token in slots that no sequence has.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engines.hf.kv_cache import DecodeLayout, KvCache, far_longer
from engines.hf.model import BaseModel
from engines.operations import LoraSpec
from engines.tuning.collating import Pack
from engines.tuning.experts import Experts
from engines.tuning.grouped import Band, GroupedRouting, band_shape
from engines.tuning.lora import Adapter
from engines.tuning.transfer import to_device

log = logging.getLogger("engines.hf")

RECORDED_AFTER = 3
"""Steps of a form before it is recorded, which costs about two: those of a short answer never are."""
REACH = 128
"""What reaches are multiples of, as long as they are short; long ones are rounded up by an eighth at most."""
MOST_GRAPHS = 64


Form = tuple[int, int, bool, LoraSpec | None]
"""Rows, reach, whether rows stand in the order of their slots, and the shape of the adapters."""


class Numbers(NamedTuple):
    """Of a step with n rows, each a list of n: rows in the order of the batch, `order` their slots, `inverse` each
    slot's row; `lengths` are the tokens that each slot holds."""

    tokens: list[int]
    positions: list[int]
    order: list[int]
    inverse: list[int]
    lengths: list[int]


class Group(NamedTuple):
    """Rows up to `stop`, from where the group before ends, have this adapter, or none."""

    adapter: Adapter | None
    stop: int


@dataclass
class Recorded:
    """A graph, what it reads, and what it leaves: hidden states [rows, H]."""

    graph: torch.cuda.CUDAGraph
    numbers: Tensor
    hidden: Tensor


class Table:
    """The adapters that graphs of one shape read, stacked; where there are fewer, groups without rows follow."""

    def __init__(self, like: Adapter, groups: int, dtype: torch.dtype) -> None:
        self.values = torch.zeros((groups, like.values.numel()), dtype=dtype, device=like.values.device)
        self.ends = torch.zeros(groups, dtype=torch.int32, device=like.values.device)
        self.size = groups
        self.first = Adapter(like.sites, like.spec, self.values[0])
        self._held: list[Callable[[], Adapter | None]] = [
            _nobody
        ] * groups  # references that keep nothing in memory

    def hold(self, groups: Sequence[Group], rows: int) -> None:
        """Make it that of a step; of adapters that are there already nothing is copied."""
        adapters = [group.adapter for group in groups]
        for place, adapter in enumerate(adapters):
            if adapter is None:
                self.values[place].zero_()
                self._held[place] = _nobody
            elif self._held[place]() is not adapter:
                self.values[place].copy_(adapter.values)
                self._held[place] = weakref.ref(adapter)
        ends = [group.stop for group in groups[:-1]]
        ends += [rows] * (len(self._held) - len(ends))
        self.ends.copy_(to_device(torch.tensor(ends, dtype=torch.int32), self.ends.device))


def _nobody() -> None:
    """What a reference gives that refers to nothing."""


class DecodeGraphs:
    """The graphs of one model and cache, recorded as steps come up; `run` gives None where there is none."""

    def __init__(self, base: BaseModel, cache: KvCache) -> None:
        self.base = base
        self.cache = cache
        self.possible = base.device.type == "cuda" and not any(
            isinstance(part, Experts)
            for part in base.module.modules()  # which ask the device where rows go
        )
        self._generation = cache.generation
        self._seen: Counter[Form] = Counter()
        self._recorded: dict[Form, Recorded] = {}
        self._tables: dict[LoraSpec, Table] = {}
        self._pool: Any = None

    def forget(self) -> None:
        """Let go of all, and of the memory that they use."""
        self._seen.clear()
        self._recorded.clear()
        self._tables.clear()
        self._pool = None

    def run(self, numbers: Numbers, adapters: Sequence[Adapter | None]) -> Tensor | None:
        """Hidden states [n, H] of a step whose rows have these adapters. Good until the next step."""
        if not self.possible or far_longer(numbers.lengths):
            return None
        groups = grouped(adapters)
        shapes = {band_shape(group.adapter) for group in groups if group.adapter is not None}
        if (
            len(shapes) > 1
            or None in shapes
            or (shapes and not isinstance(self.base.routing, GroupedRouting))
        ):
            return None
        rows = min(rounded_rows(len(adapters)), self.cache.max_slots)
        reach = min(rounded_reach(max(numbers.lengths) + 1), self.cache.max_length)
        in_order = numbers.order == sorted(numbers.order)
        shape = shapes.pop() if shapes else None
        key = (rows, reach, in_order, shape)
        self.cache.reserve(rows, reach)
        if self._generation != self.cache.generation or len(self._recorded) > MOST_GRAPHS:
            self.forget()
            self._generation = self.cache.generation
        if key not in self._recorded and not self._worth_recording(key):
            return None
        table = None if shape is None else self._table(shape, groups, rows)
        own = to_device(torch.tensor(filled_up(numbers, rows)), self.base.device)
        self.base.count_pass()
        recorded = self._recorded.get(key)
        if recorded is None:
            hidden = self._record(key, own, reach, in_order, table)
        else:
            recorded.numbers.copy_(own)
            recorded.graph.replay()
            hidden = recorded.hidden
        return hidden[: len(adapters)]

    def _worth_recording(self, key: Form) -> bool:
        self._seen[key] += 1
        return self._seen[key] > RECORDED_AFTER

    def _table(self, shape: LoraSpec, groups: Sequence[Group], rows: int) -> Table:
        """The one of a shape, as large as the most groups yet took; what was recorded with a smaller one is gone."""
        table = self._tables.get(shape)
        if table is None or table.size < len(groups):
            like = next(group.adapter for group in groups if group.adapter is not None)
            table = self._tables[shape] = Table(like, rounded_groups(len(groups)), self.base.dtype)
            self._recorded = {key: each for key, each in self._recorded.items() if key[-1] != shape}
        table.hold(groups, rows)
        return table

    def _record(self, key: Form, numbers: Tensor, reach: int, in_order: bool, table: Table | None) -> Tensor:
        """Compute a step, which makes whatever a first time makes, then record it; gives its hidden states."""
        rows = numbers.shape[1]
        bands = [] if table is None else [Band.of_table(table.first, table.values, table.ends, rows)]

        def step() -> Tensor:
            layout = GraphedLayout(self.cache, numbers[2:], reach, in_order=in_order)
            return self.base.hidden_of_bands(Pack(numbers[0, :, None], numbers[1, :, None]), layout, bands)

        computed = step()
        try:
            graph, hidden = self._captured(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.warning("decoding steps of this model are not recorded as CUDA graphs: %s", error)
            self.possible = False
            self.forget()
        else:
            self._recorded[key] = Recorded(graph, numbers, hidden)
        return computed

    def _captured(self, step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The kernels that a step launches, and where they leave its result."""
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = step()
        return graph, hidden


class GraphedLayout(DecodeLayout):
    """`DecodeLayout` over the first slots whose numbers are on the device alone; no slot attends by itself."""

    def __init__(self, cache: KvCache, batch: Tensor, reach: int, *, in_order: bool) -> None:
        self.cache = cache
        self.slots = slice(0, batch.shape[1])
        self.apart, self.reaches = [], []
        self.reach = reach
        self.sorted = in_order
        self.place(batch)


def grouped(adapters: Sequence[Adapter | None]) -> list[Group]:
    """Neighbours with the same adapter are one group."""
    groups: list[Group] = []
    for row, adapter in enumerate(adapters):
        if groups and groups[-1].adapter is adapter:
            groups[-1] = groups[-1]._replace(stop=row + 1)
        else:
            groups.append(Group(adapter, row + 1))
    return groups


def filled_up(numbers: Numbers, rows: int) -> list[list[int]]:
    """The numbers of a step, with rows that decode token 0 at the begin of the slots behind."""
    count = len(numbers.tokens)
    behind = list(range(count, rows))
    nothing = [0] * len(behind)
    own = (nothing, nothing, behind, behind, nothing)
    return [[*given, *more] for given, more in zip(numbers, own, strict=True)]


def rounded_rows(count: int) -> int:
    """1, 2, 4, 8, and multiples of eight."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def rounded_groups(count: int) -> int:
    """Powers of two."""
    return 1 << (count - 1).bit_length()


def rounded_reach(tokens: int) -> int:
    """Multiples of `REACH`, of larger powers of two from eight times as many on."""
    unit = max(REACH, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // unit) * unit
