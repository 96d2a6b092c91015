"""What a rank really sends and keeps: every operation of torch is seen, megatron-core's and autograd's own too."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "send": "send",
}
"""Operations of c10d that move floats, by the cost model's names."""


class Watch(TorchDispatchMode):
    """Counts collectives and sends of floats among two ranks or more, with the bytes of the whole tensor of each, and
    knows which memory that was made meanwhile is alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved: Counter[tuple[str, str]] = Counter()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.kept = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.namespace == "c10d":
            self._count(function.__name__.split(".")[0], args)
        else:
            given = {_storage(leaf)._cdata for leaf in tree_leaves((args, kwargs)) if _counts(leaf)}
            for leaf in tree_leaves(out):
                if _counts(leaf) and (storage := _storage(leaf))._cdata not in given:
                    self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> int:
        """Bytes that were made since the watch began and are still there."""
        self.made = {key: pair for key, pair in self.made.items() if not pair[0].expired()}
        return sum(size for _, size in self.made.values())

    def look(self) -> None:
        """Remember the most that is kept at the moments of looking; what only its own circle holds is not."""
        gc.collect()
        self.kept = max(self.kept, self.alive())

    def _count(self, name: str, args: Sequence[Any]) -> None:
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        groups = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject)]
        ranks = dist.ProcessGroup.unbox(groups[0]).size()
        largest = max(tensors, key=lambda tensor: tensor.numel())
        if ranks < 2 or not largest.is_floating_point() or name.startswith("recv"):
            return
        kind = KINDS.get(name, name)
        self.moved[kind, "calls"] += 1
        self.moved[kind, "bytes"] += largest.numel() * largest.itemsize


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def step(folder: str, model: str, told: str) -> None:
    """On a rank of `tests.megatron.ranks`: train one step of `told`'s data under its options, and write what was seen
    to `folder`."""
    from engines.contract.material import supervised
    from engines.megatron.calls import CreateRuns, StepRuns, Train
    from engines.megatron.rank import load_rank
    from engines.operations import CreateRun, ForwardBackward, LoraSpec, OptimStep
    from engines.ranks.meeting import by_file
    from engines.ranks.world import World
    from tests.megatron.conftest import configuration

    case: dict[str, Any] = json.loads(told)
    number, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()  # the engine's own takes its place
    world = World(by_file(Path(folder) / "world", size), number, size, 60.0, torch.device("cpu"))
    config = configuration("megatron", model, Path(folder), **case["options"])
    rank = load_rank(config, world, torch.device("cpu"))
    rank.perform(CreateRuns([("run", CreateRun(LoraSpec(rank=case["rank"], alpha=16.0, seed=1)))]))
    data = [supervised([1] * case["tokens"], [2] * case["tokens"]) for _ in range(case["data"])]
    watch = Watch()
    forward = rank.stage.forward

    def looking(portion: Any, segments: Any) -> Any:
        out = forward(portion, segments)
        watch.look()
        return out

    rank.stage.forward = looking  # type: ignore[method-assign, assignment]
    train = Train([("run", ForwardBackward(data, "cross_entropy", {}))])
    rank.perform(train)  # what the first pass alone makes is not counted
    with watch:
        before = watch.alive()
        watch.kept = 0
        rank.perform(train)
        rank.perform(StepRuns([("run", OptimStep(learning_rate=1e-3))]))
    seen = {
        "moved": {
            kind: [watch.moved[kind, "calls"], watch.moved[kind, "bytes"]] for kind, _ in sorted(watch.moved)
        },
        "kept": watch.kept - before,
        "weights": sum(weight.numel() for weight in _weights(rank)),
        "adapter": rank.runs["run"].adapter.values.numel(),
        "moments": sum(moment.nbytes for moment in rank.runs["run"].optimizer.moments(torch.empty(0))),
    }
    (Path(folder) / f"seen{number}.json").write_text(json.dumps(seen))


def _weights(rank: Any) -> list[torch.Tensor]:
    """The frozen numbers of a rank, tied ones once."""
    found = {weight.data_ptr(): weight for weight in rank.stage.module.parameters()}
    if rank.stage.unembedding is not None:
        found[rank.stage.unembedding.weight.data_ptr()] = rank.stage.unembedding.weight
    return list(found.values())
